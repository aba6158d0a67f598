"""The change of a linear layer as one matrix, which Kronecker factors fit, and back to what trains of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError
from mergeready.experts.factors import FactoredLayer, KroneckerFactors, each_sum, open_factors
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.trained import Trained

Factors = Sequence[str | Path | KroneckerFactors]


class LayerChange:
    """A layer of which the weight, the bias or both train.

    Args:
        layer: The layer.
        weight: Its weight, if that trains.
        bias: Its bias, if that trains; ignored where the layer's matrix has no column for it.
    """

    def __init__(self, layer: FactoredLayer, weight: Trained | None, bias: Trained | None) -> None:
        self._layer, self._weight = layer, weight
        self._bias = bias if layer.bias is not None else None
        self.device = next(part.target.device for part in (self._weight, self._bias) if part is not None)

    def matrix(self) -> Tensor:
        """D of this moment, (outputs, columns), fp32. A collective where the model is sharded."""
        layer = self._layer
        if self._weight is None:
            weight = torch.zeros(layer.weight_shape, device=self.device)
        else:
            weight = self._weight.whole_delta()
        return layer.matrix(weight, None if self._bias is None else self._bias.whole_delta())

    def parts(self, matrix: Tensor) -> Iterator[tuple[Trained, Tensor]]:
        """What trains, each with its own part of such a matrix, in the shape of what this rank holds."""
        layer = self._layer
        if self._weight is not None:
            own = matrix[:, : layer.inputs]
            yield self._weight, self._weight.block.of(own.T if layer.transposed else own)
        if self._bias is not None:
            yield self._bias, self._bias.block.of(matrix[:, layer.inputs])


def require_list(factors: Factors) -> None:
    """Raise unless factors are a list with one entry at least.

    Raises:
        OptionError: If so.
    """
    if isinstance(factors, str | Path | KroneckerFactors) or not factors:
        raise OptionError("`factors` must be a list of files of peers' factors, with one at least.")


def summed_layers(
    factors: Factors, weights: Sequence[float] | None, run: TechniqueRun
) -> Iterator[tuple[LayerChange, tuple[Tensor, Tensor]]]:
    """Each layer that trains and has factors, with the sums of B and A, where the layer is.

    Raises:
        MismatchError: If there is none.
        MergeReadyError: As ``open_factors`` and ``sum_factors``.
    """
    opened = [open_factors(given, run.live.base) for given in factors]
    found = False

    def trains(name: str, layer: FactoredLayer) -> bool:
        return name in run.weights or layer.bias in run.weights

    for name, layer, pair in each_sum(opened, weights, trains):
        change = LayerChange(layer, run.weights.get(name), run.weights.get(layer.bias or ""))
        yield change, (pair[0].to(change.device), pair[1].to(change.device))
        found = True
    if not found:
        label = " + ".join(made.label for made in opened)
        raise MismatchError(f"the factors {label} are of no layer that trains in this run.")
