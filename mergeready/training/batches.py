"""What a batch is and how a model is run on it, where data are needed to merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from mergeready.errors import OptionError

Batches: TypeAlias = Iterable[Any]
"""Batches as a DataLoader gives them: dicts of tensors, tuples that begin with the inputs, or tensors."""

Forward: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""Runs a model on a batch and returns its logits, (examples, …, classes)."""

F = TypeVar("F", bound=Callable[..., object])

LABELS = ("labels", "label", "label_ids")


def forward_logits(model: nn.Module, batch: Any) -> Tensor:
    """Logits as models of transformers, and plain modules, give them; labels are left out of the call.

    Raises:
        OptionError: If the model returns something else.
    """
    output = call(model, batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise OptionError(
            f"{type(model).__name__} returned {type(output).__name__}, which holds no logits: pass `forward`, a "
            "function of model and batch that returns them."
        )
    return logits


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, without its labels."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name not in LABELS})
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def labels_of(batch: Any) -> Tensor:
    """The labels in a batch.

    Raises:
        OptionError: If there are none.
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise OptionError(f"a batch holds no labels: none of {', '.join(LABELS)}, no second tensor.")
    return found


def mask_of(batch: Any) -> Tensor | None:
    """Which positions of a batch are real, if it says so: its attention mask, (examples, positions)."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def size_of(batch: Any) -> int:
    """Number of examples in a batch.

    Raises:
        OptionError: If it holds no tensor.
    """
    values = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    sizes = [len(value) for value in values if isinstance(value, Tensor) and value.ndim]
    if not sizes:
        raise OptionError(f"a batch of type {type(batch).__name__} holds no tensor of examples.")
    return sizes[0]


def examples_of(batch: Any) -> Iterator[Any]:
    """The examples of a batch, each as a batch of one; what is no tensor of that length goes to each of them."""
    size = size_of(batch)

    def cut(index: int, tensor: Tensor) -> Tensor:
        return tensor[index : index + 1] if tensor.ndim and len(tensor) == size else tensor

    for index in range(size):
        yield _map(batch, partial(cut, index))


def on_device_of(model: nn.Module, batches: Batches) -> Iterator[Any]:
    """Batches with their tensors where the model is.

    Raises:
        OptionError: If there are no batches.
    """
    device = next(model.parameters()).device
    empty = True
    for batch in batches:
        empty = False
        yield _map(batch, lambda tensor: tensor.to(device, non_blocking=True))
    if empty:
        raise OptionError("`batches` is empty: there is nothing to learn from.")


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a batch, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(batch, keep)
    return found


def one_each(given: F | Sequence[F] | None, default: F, count: int) -> list[F]:
    """A function for each set of data, from one for all, one each, or none.

    Raises:
        OptionError: If their number is wrong.
    """
    if given is None or callable(given):
        return [default if given is None else given] * count
    if len(given) != count:
        raise OptionError(f"`forward` has {len(given)} functions for {count} sets of data.")
    return list(given)


def require_repeatable(batches: Batches) -> None:
    """Check that batches can be gone through more than once.

    Raises:
        OptionError: If they are an iterator, which is used up after one pass.
    """
    if isinstance(batches, Iterator):
        raise OptionError(
            "`batches` are needed more than once: pass a list or a DataLoader, not an iterator."
        )


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _map(value, change) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_map(value, change) for value in batch]
    return batch


def positions(logits: Tensor, batch: Any) -> Tensor:
    """Logits as (positions, classes), without padding where the batch's attention mask tells.

    >>> import torch
    >>> positions(torch.zeros(2, 3, 5), {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}).shape
    torch.Size([4, 5])
    """
    mask = mask_of(batch)
    if mask is not None and logits.shape[:-1] == mask.shape:
        return logits[mask.to(logits.device)]
    return logits.reshape(-1, logits.shape[-1])
