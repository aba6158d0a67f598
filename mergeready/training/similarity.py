"""How alike two models represent the same inputs: linear CKA, summed up batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError, listing
from mergeready.training.batches import Batches, call, mask_of, on_device_of
from mergeready.weights.guard import untouched
from mergeready.weights.module import unwrap


class LinearCka:
    """Linear CKA of two representations of the same inputs, from running sums.

    ``CKA = ‖Yᵀ X‖²_F / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)`` of centred X (n, p) and Y (n, q): 1 for the same up to rotation and one
    factor, near 0 for unrelated ones where n is far above p and q; with few inputs it is biased upwards. Kornblith et
    al. (arXiv 1905.00414), equation 3. Memory: (p + q)² numbers, whatever n is.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
        >>> cka = LinearCka()
        >>> for row in x:
        ...     cka.update(row[None], 2 * row.flip(0)[None])
        >>> round(cka.result(), 6)
        1.0
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(0)
        self._scatter = torch.zeros(0)
        self._split = 0

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add the representations of some inputs, (inputs, features) each; the last dimension are features.

        Raises:
            OptionError: If the two are not of the same inputs, or other features than before.
        """
        x, y = (part.detach().reshape(-1, part.shape[-1]).double() for part in (first, second))
        if len(x) != len(y):
            raise OptionError(f"{len(x)} and {len(y)} representations are not of the same inputs.")
        rows = torch.cat([x, y.to(x.device)], dim=1)
        if not self._count:
            self._split = x.shape[1]
            self._mean = torch.zeros(rows.shape[1], dtype=rows.dtype, device=rows.device)
            self._scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
        if (x.shape[1], rows.shape[1]) != (self._split, len(self._mean)):
            raise OptionError("representations have other features than those before.")
        if not len(rows):
            return
        # Chan, Golub and LeVeque's update: raw sums of products would cancel where means are large.
        mean = rows.mean(0)
        centred, shift = rows - mean, mean - self._mean
        total = self._count + len(rows)
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self._count * len(rows) / total)
        self._mean = self._mean + shift * (len(rows) / total)
        self._count = total

    def result(self) -> float:
        """CKA of all that was added; NaN where either does not vary."""
        first, second = (
            self._scatter[: self._split, : self._split],
            self._scatter[self._split :, self._split :],
        )
        size = float(first.norm() * second.norm())
        return float(self._scatter[self._split :, : self._split].square().sum()) / size if size else math.nan


def representation_similarity(
    first: nn.Module,
    second: nn.Module,
    batches: Batches,
    layers: Sequence[str],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, float]:
    """Linear CKA of two models' layer outputs on the same inputs, such as an expert and a merge on the expert's task.

    Positions that an attention mask calls padding do not count.

    *Evidence*: arXiv 2603.09463 reports that incompatible representations go with bad merges, and conflicts between
    parameters hardly do. *Cost*: one forward pass of each model, and products of the layers' outputs.

    Args:
        first: One model.
        second: The other, of the same or another architecture, with layers of the same names.
        batches: The inputs.
        layers: Names of modules whose outputs are compared, as in ``named_modules``.
        forward: Runs a model on a batch; by default ``model(**batch)`` without labels, or ``model(batch[0])`` for
            tuples.

    Raises:
        OptionError: If a model has no such layer, all are listed; one does not run, or its output is no tensor; or
            there are no batches.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        >>> found = representation_similarity(model, model, [torch.randn(9, 2)], ["0", "1"])
        >>> [round(value, 6) for value in found.values()]
        [1.0, 1.0]
    """
    models = [unwrap(first), unwrap(second)]
    missing = [name for model in models for name in layers if name not in dict(model.named_modules())]
    if missing:
        raise OptionError(
            f"there are no layers {listing(dict.fromkeys(missing))}; see `model.named_modules()`."
        )
    sums = {name: LinearCka() for name in layers}
    with untouched(models[0], {}), untouched(models[1], {}), torch.no_grad():
        for model in models:
            model.eval()
        for batch in on_device_of(models[0], batches):
            outputs = [_outputs(model, batch, layers, forward or call) for model in models]
            for name, total in sums.items():
                total.update(*(_kept(found[name], batch) for found in outputs))
    return {name: total.result() for name, total in sums.items()}


def _outputs(
    model: nn.Module, batch: Any, layers: Iterable[str], forward: Callable[[nn.Module, Any], object]
) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in layers]
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    mute = [name for name in layers if not isinstance(found.get(name), Tensor)]
    if mute:
        raise OptionError(
            f"{listing(mute)} of {type(model).__name__} did not run, or give something else than a tensor: name other "
            "layers."
        )
    return found


def _kept(output: Tensor, batch: Any) -> Tensor:
    mask = mask_of(batch)
    if mask is not None and output.shape[:-1] == mask.shape:
        return output[mask.to(output.device)]
    return output
