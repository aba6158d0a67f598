from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergeready.errors import NonFiniteError
from mergeready.experts.delta import Delta, LowRank, dense
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.information import Information, InformationLike, require_shares
from mergeready.merging.method import MatrixMethod, Place
from mergeready.merging.registry import make_method, register, require_elementwise, require_fraction
from mergeready.weights.source import TensorInfo

TRANSPOSED = "^T"
"""Ends the name of the Gram matrix of a layer that stores its weight as (in, out), as GPT-2's ``Conv1D`` does."""

_ROUNDING = 2.0**-23


@register
@dataclass(frozen=True, kw_only=True)
class RegMean(MatrixMethod):
    """The linear layer whose outputs are closest to each expert's outputs on that expert's own inputs.

    ``W = argmin Σ wᵢ ‖Xᵢ W − Xᵢ Wᵢ‖²``, hence ``τ = (Σ wᵢ G̃ᵢ)⁻¹ Σ wᵢ G̃ᵢ τᵢ`` with ``Gᵢ = Xᵢᵀ Xᵢ / nᵢ``, the mean outer
    product of layer inputs (:func:`mergeready.training.activations.input_grams`), whose off-diagonal entries are
    shrunk: ``G̃ = α G + (1 − α) diag(G)``. Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language
    Models" (arXiv 2212.09849). Solved in float64.

    Where the inputs say nothing, as for a feature that is always zero, the result is the mean weighted by ``wᵢ``.
    With α near 1 the diagonal is raised towards that mean by up to ``in · 2⁻²³`` of itself, as much as rounding to
    fp32 may take from the smallest eigenvalues; for smaller α the shrinkage has done so already. Parameters without
    a Gram matrix (embeddings, convolutions, norms, biases) go to ``rest``; the paper averages them. ``wᵢ`` must not
    be negative.

    A Gram matrix is stored under its parameter's name, or with ``^T`` behind it where the layer stores its weight as
    (in, out).

    Attributes:
        rest: Name of the elementwise method, with its defaults, for the other parameters.
        grams: One source an expert, in their order: files, dicts of tensors, or what ``input_grams`` returned.
        alpha: Share of the off-diagonal entries that stays, in [0, 1]. 0.9 in most of the paper's runs; 1 is plain
            least squares, 0 weighs each input feature by itself.
    """

    name: ClassVar[str] = "regmean"
    rest: str = "average"
    grams: InformationLike
    alpha: float = 0.9

    def __post_init__(self) -> None:
        require_fraction("alpha", self.alpha, zero=True)
        require_elementwise("rest", self.rest)
        object.__setattr__(self, "grams", Information.open(self.grams, "input_grams"))

    @property
    def _information(self) -> Information:
        return Information.open(self.grams, "input_grams")

    def describe(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "rest": self.rest,
            "grams": self._information.describe(),
            "alpha": self.alpha,
        }

    def check(self, vectors: Sequence[TaskVector], names: Sequence[str], weights: Sequence[float]) -> None:
        require_shares(self.name, weights)
        self._information.require_fit(vectors)
        infos = {name: vector.infos[name] for vector in vectors for name in vector}
        self._information.require_shapes(vectors, self._wanted(names, infos))
        others = [name for name in names if not self.handles(name, infos[name])]
        if others:
            make_method(self.for_vectors()).check(vectors, others, weights)

    def scratch_bytes(self, info: TensorInfo, experts: int) -> int:
        if len(info.shape) != 2:
            return super().scratch_bytes(info, experts)
        # Of square matrices a Gram as read and in float64, their sum and its factor; of deltas six in float64.
        return 40 * max(info.shape) ** 2 + (48 + 4 * experts) * info.numel

    def _wanted(
        self, names: Sequence[str], infos: dict[str, TensorInfo]
    ) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for name in names:
            key = self._key(name)
            if key is not None:
                side = 0 if key.endswith(TRANSPOSED) else -1
                length = infos[name].shape[side] if infos[name].shape else 1
                yield name, key, (length, length)

    def handles(self, name: str, info: TensorInfo) -> bool:
        return len(info.shape) == 2 and self._key(name) is not None

    def _key(self, name: str) -> str | None:
        """What the Gram matrices of a parameter are called; None if there are none."""
        slots = range(len(self._information))
        for key in (name, name + TRANSPOSED):
            if any(self._information.shape(slot, key) is not None for slot in slots):
                return key
        return None

    def combine_matrices(
        self, deltas: Sequence[Delta | None], weights: Sequence[float], place: Place
    ) -> Tensor:
        key = self._key(place.name) or place.name
        columns_are_inputs = not key.endswith(TRANSPOSED)
        rows, columns = next(delta.shape for delta in deltas if delta is not None)
        inputs, outputs = (columns, rows) if columns_are_inputs else (rows, columns)
        total = torch.zeros(inputs, inputs, dtype=torch.float64)
        moved = torch.zeros(inputs, outputs, dtype=torch.float64)
        mean = torch.zeros(inputs, outputs, dtype=torch.float64)
        shares = [w if self._information.shape(i, key) is not None else 0.0 for i, w in enumerate(weights)]
        for slot, (delta, share) in enumerate(zip(deltas, shares, strict=True)):
            if not share:
                continue
            gram = self._shrunk(slot, key).mul_(share)
            total += gram
            if delta is not None:
                left, right = _factors(delta, columns_are_inputs)
                moved += gram @ left if right is None else (gram @ left) @ right
                mean += share / sum(shares) * (left if right is None else left @ right)
        diagonal = total.diagonal()
        lacking = max(inputs * _ROUNDING - (1 - self.alpha), 0.0)
        ridge = (lacking * diagonal).masked_fill_(diagonal == 0, 1.0)
        diagonal.add_(ridge)
        solution = _solve(total, moved.add_(mean.mul_(ridge[:, None])), place.name)
        return (solution.T if columns_are_inputs else solution).float().contiguous()

    def _shrunk(self, slot: int, key: str) -> Tensor:
        gram = self._information.read(slot, key).to(device="cpu", dtype=torch.float64, copy=True)
        diagonal = gram.diagonal().clone()
        gram.mul_(self.alpha).diagonal().copy_(diagonal)
        return gram


def _factors(delta: Delta, columns_are_inputs: bool) -> tuple[Tensor, Tensor | None]:
    """A change as (inputs, outputs) in float64: one matrix, or two whose product it is."""
    if isinstance(delta, LowRank):
        A, B = delta.A.cpu().double(), delta.B.cpu().double()
        return (A.T, B.T) if columns_are_inputs else (B, A)
    value = dense(delta).cpu().double()
    return (value.T if columns_are_inputs else value), None


def _solve(total: Tensor, moved: Tensor, name: str) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise NonFiniteError(
            f"the Gram matrices of {name} are NaN, infinite or not positive. Collect them again with `input_grams`."
        )
    solution: Tensor = torch.cholesky_solve(moved, factor)
    return solution
