from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mergeready.errors import UnsupportedError
from mergeready.training.batches import LABELS
from mergeready.training.difficulty.ids import ID_FIELD, LABEL_FIELD
from mergeready.training.difficulty.tracker import DifficultyTracker
from mergeready.weights.module import unwrap

_OURS = (ID_FIELD, LABEL_FIELD)
_observers: WeakKeyDictionary[nn.Module, ForwardObserver] = WeakKeyDictionary()


class ForwardObserver:
    """Hooks on a model that take example ids out of its inputs and give its logits to a tracker, in training mode only.

    The model is called as ever, with a batch that carries ``example_id``; it never sees it. Nothing of what it
    computes changes. The input of the last linear layer is looked at, too: where its output is the logits, that gives
    the norm of its gradient.

    Args:
        model: The model; wrappers are looked through.
        tracker: What learns from it.

    Raises:
        UnsupportedError: If it is a ``DataParallel``, whose threads mix up examples.

    Example:
        >>> import torch
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Linear(2, 2)
        ...
        ...     def forward(self, x):
        ...         return self.head(x)
        >>> model, tracker = Net(), DifficultyTracker()
        >>> observer = ForwardObserver(model, tracker)
        >>> batch = {"x": torch.ones(3, 2), "labels": torch.tensor([0, 1, 0]), "example_id": torch.tensor([5, 6, 7])}
        >>> labels = batch.pop("labels")
        >>> logits = model(**batch, example_label=labels)
        >>> tracker.table().id.tolist()
        [5, 6, 7]
        >>> observer.remove()
    """

    def __init__(self, model: nn.Module, tracker: DifficultyTracker) -> None:
        if isinstance(model, nn.DataParallel):
            raise UnsupportedError(
                "difficulty cannot be tracked under DataParallel: use one process a device, as torchrun makes them."
            )
        inner = unwrap(model)
        earlier = _observers.get(inner)
        if earlier is not None:  # of a run that ended in the middle
            earlier.remove()
        _observers[inner] = self
        self._tracker, self._shifts = tracker, _is_causal(inner)
        self._ids: Tensor | None = None
        self._labels: Tensor | None = None
        self._last: tuple[nn.Linear, Tensor, Tensor] | None = None
        self._handles = [
            inner.register_forward_pre_hook(self._take, with_kwargs=True),
            inner.register_forward_hook(self._see, with_kwargs=True),
        ]
        self._handles += [
            module.register_forward_hook(self._pass)
            for module in inner.modules()
            if isinstance(module, nn.Linear) and module is not inner
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardObserver:
        return self  # copies of the model, such as averages of its weights, need no tracker of their own

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _take(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._ids = self._labels = self._last = None
        position = next((i for i, a in enumerate(args) if isinstance(a, Mapping) and ID_FIELD in a), None)
        given: Mapping[str, Any] = kwargs if position is None else args[position]
        if not any(name in given for name in _OURS):
            return None
        if module.training:
            self._ids = given.get(ID_FIELD)
            named = next((given[name] for name in LABELS if name in given), None)
            self._labels = given.get(LABEL_FIELD, named)
        rest = {name: value for name, value in given.items() if name not in _OURS}
        if position is None:
            return args, rest
        return (*args[:position], rest, *args[position + 1 :]), kwargs

    def _pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._ids is not None and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            assert isinstance(module, nn.Linear)  # noqa: S101 - hooked onto nothing else
            self._last = (module, args[0], output)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids, labels, last = self._ids, self._labels, self._last
        self._ids = self._labels = self._last = None
        if ids is None:
            return
        logits = _logits_of(output)
        if logits is None or labels is None:
            missing, where = ("labels", "inputs") if labels is None else ("logits", "output")
            raise UnsupportedError(
                f"{type(module).__name__} was given example ids, but no {missing} can be found in its {where}: "
                "collate with `collate_with_ids`, or call the tracker's `observe` yourself."
            )
        head = last if last is not None and last[2] is logits else None
        self._tracker.observe(
            ids,
            logits,
            labels,
            inputs=None if head is None else head[1],
            bias=head is not None and head[0].bias is not None and head[0].bias.requires_grad,
            shift=self._shifts and logits.ndim == 3,
        )


def _logits_of(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    return found if isinstance(found, Tensor) else None


def _is_causal(model: nn.Module) -> bool:
    """Whether a model's logits are of the next position, as far as its class or that of the model inside it says so."""
    adapted: Any = getattr(model, "get_base_model", None)
    inner = model if adapted is None else adapted()
    names = [kind.__name__ for kind in (*type(inner).__mro__, *type(model).__mro__)]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
