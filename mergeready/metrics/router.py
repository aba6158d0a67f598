"""Which inputs a change answers most strongly: what routers between experts choose by, layer for layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeready.errors import OptionError, listing
from mergeready.experts.delta import Delta, LowRank, dense
from mergeready.experts.fingerprint import Fingerprint
from mergeready.experts.svd import leading_svd, thin_svd
from mergeready.weights.source import WeightSource

_LOOKED_UP = re.compile(r"embed|\bw[tp]e\b|\bshared\b|lm_head|predictions\.decoder")
"""Parameters that have tokens or positions for inputs, or answer for them: nothing is routed there."""


def prototype(delta: Delta, *, inputs_first: bool = False) -> Tensor:
    """The unit input that a change answers most strongly: ``argmax ‖D v‖``, its first right singular vector.

    The prototype of an expert in Arrow: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of
    LoRAs" (arXiv 2405.11157), section 4.1. Its sign is arbitrary; here the largest entry is positive. *Cost*: QR
    decompositions of the factors for adapters; else an SVD, or ten products with 17 directions where the matrix has
    more than 512 rows and columns.

    Args:
        delta: A matrix's change, not zero, as it is stored.
        inputs_first: Whether it is stored as (inputs, outputs), as by ``Conv1D`` of transformers.

    Returns:
        A vector of as many entries as the layer has inputs, fp32.

    Example:
        >>> from mergeready.experts.delta import Dense
        >>> prototype(Dense(torch.tensor([[0.0, -3.0], [1.0, 0.0]])))
        tensor([0., 1.])
    """
    if isinstance(delta, LowRank):
        B, A = delta.B.double(), delta.A.double()
        outer, inner = (A.T, B) if not inputs_first else (B, A.T)
        basis, triangle = torch.linalg.qr(outer)
        found = basis @ thin_svd(triangle @ torch.linalg.qr(inner, mode="r").R.T, 1)[0][:, 0]
    else:
        matrix = dense(delta).flatten(1).double()
        left, _, right = leading_svd(matrix, 1)
        found = left[:, 0] if inputs_first else right[0]
    unit: Tensor = found * torch.sign(found[found.abs().argmax()])
    return unit.float().cpu()


def routed_layers(source: WeightSource, names: Sequence[str]) -> dict[str, bool]:
    """Which of some parameters are weights of linear layers, and whether they are stored as (inputs, outputs).

    Told by the bias, which is as long as the layer has outputs. Square weights are stored as the model's others that
    have a bias are; without any bias they are taken for (outputs, inputs), as ``nn.Linear`` stores them.

    Example:
        >>> from mergeready.experts import Base
        >>> source = Base.open({"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2)}).source
        >>> routed_layers(source, ["a.weight", "a.bias"])
        {'a.weight': True}
    """
    known = {name: side for name in source.infos if (side := _inputs_first(source, name)) is not None}
    square = bool(known) and all(known.values())
    return {
        name: known.get(name, square and _bias(source, name) is not None)
        for name in names
        if len(source.infos[name].shape) == 2 and not _LOOKED_UP.search(name)
    }


def arrow_scores(inputs: Tensor, name: str, experts: Sequence[Fingerprint]) -> Tensor:
    """How strongly each expert's prototype answers a layer's inputs: ``|h · v|``, of which a router takes the largest.

    Arrow's weights of the experts are the softmax over the ``k`` largest (arXiv 2405.11157, equation 4).

    Args:
        inputs: The layer's inputs, shape (…, inputs).
        name: The layer's weight, by its name in the base.
        experts: Fingerprints with router artefacts. One of an expert that does not change the layer scores 0.

    Returns:
        Scores of shape (…, experts), fp32.

    Raises:
        OptionError: If a fingerprint holds no router artefacts, or the inputs have another width.

    Example:
        >>> from mergeready.experts import Base, open_expert
        >>> from mergeready.metrics.take_fingerprint import take_fingerprint
        >>> base = Base.open({"a.weight": torch.zeros(2, 3)})
        >>> law = open_expert({"a.weight": torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])}, base)
        >>> arrow_scores(torch.eye(3), "a.weight", [take_fingerprint(law.vector, base, router=True)]).T
        tensor([[0., 1., 0.]])
    """
    bare = [expert.label for expert in experts if not expert.router]
    if bare:
        raise OptionError(
            f"{listing(bare)} hold no router artefacts. Take them again with `mergeready fingerprint --router`."
        )
    known = [expert.router.get(name) for expert in experts]
    widths = {len(vector) for vector in known if vector is not None} - {inputs.shape[-1]}
    if widths:
        raise OptionError(f"{name} takes inputs of width {widths.pop()}, not {inputs.shape[-1]}.")
    zero = torch.zeros(inputs.shape[-1])
    vectors = torch.stack([zero if vector is None else vector for vector in known]).to(inputs.device)
    return (inputs.float() @ vectors.T).abs()


def _bias(source: WeightSource, name: str) -> int | None:
    """Length of the bias beside a weight."""
    stem, dot, last = name.rpartition(".")
    info = source.infos.get(f"{stem}{dot}bias")
    return None if last != "weight" or info is None else math.prod(info.shape)


def _inputs_first(source: WeightSource, name: str) -> bool | None:
    """Whether a weight is (inputs, outputs); None where that cannot be told from it alone."""
    shape, bias = source.infos[name].shape, _bias(source, name)
    if len(shape) != 2 or shape[0] == shape[1] or bias is None or bias not in shape:
        return None
    return bias == shape[1]
