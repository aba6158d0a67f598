"""Kronecker factors of the curvature that an expert's data give a base: shared without the data, added over peers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mergeready.errors import FormatError, MismatchError, NonFiniteError, OptionError, listing
from mergeready.experts.base import Base
from mergeready.experts.identity import BaseIdentity
from mergeready.weights.safetensors_folder import SafetensorsFolder
from mergeready.weights.source import TensorInfo, WeightSource
from mergeready.weights.state_dict import StateDictSource
from mergeready.weights.writer import write_file

SUFFIX = ".factors.safetensors"
SCHEMA = "1"
_SCHEMA_KEY, _ABOUT_KEY = "mergeready.factors", "mergeready.about"
_ASYMMETRY = 1e-2  # of the largest entry: what rounding to bf16 and a foreign implementation may leave

_PIECE = 2**16  # elements


@dataclass(frozen=True, slots=True)
class FactoredLayer:
    """A linear layer ``y = W x + b`` seen as one matrix ``[W b]`` of shape (outputs, inputs + 1).

    Attributes:
        outputs: Length of y.
        inputs: Length of x.
        bias: Base name of b; None where it has none, or it takes no part: the matrix is W alone then.
        transposed: Whether the base stores the weight as (inputs, outputs).
    """

    outputs: int
    inputs: int
    bias: str | None = None
    transposed: bool = False

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.inputs + (self.bias is not None)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape in which the base stores the weight."""
        return (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's matrix, from (changes of) its weight and bias as the base stores them; differentiable."""
        matrix = weight.T if self.transposed else weight
        if self.bias is None:
            return matrix
        column = matrix.new_zeros(self.outputs) if bias is None else bias.to(matrix.dtype)
        return torch.cat([matrix, column[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """For each linear layer the factors of its block of the Gauss-Newton matrix, ``E[Jᵀ H J] ≈ B ⊗ A``.

    ``A = E[a aᵀ]`` over the layer's inputs a, with a 1 behind them for the bias, (columns, columns);
    ``B = E[g gᵀ]`` over the gradients g of the loss by its outputs, (outputs, outputs).
    Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (arXiv 1503.05671).

    Attributes:
        label: How messages call the expert.
        base: Identity of its base; None if nobody said.
        layers: The layers by the base name of their weight.
        source: Where the factors are, ``inputs/<name>`` and ``outputs/<name>``; read when they are asked for.
        facts: How they were collected, JSON-ready.
    """

    label: str
    base: BaseIdentity | None
    layers: Mapping[str, FactoredLayer]
    source: WeightSource
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        layers: Mapping[str, FactoredLayer],
        *,
        label: str = "factors",
        base: BaseIdentity | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> KroneckerFactors:
        """Factors in memory, from B and A by layer.

        Raises:
            FormatError: If shapes do not fit the layers; all are listed.
        """
        tensors = {f"outputs/{name}": pair[0] for name, pair in pairs.items()}
        tensors |= {f"inputs/{name}": pair[1] for name, pair in pairs.items()}
        source = StateDictSource(tensors, label)
        _require_consistent(label, layers, source)
        return cls(label, base, dict(layers), source, dict(facts or {}))

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """B and A of one layer, fp32.

        Raises:
            NonFiniteError: If they hold NaN or infinite values.
            FormatError: If they are no second moments: not symmetric, or with a negative diagonal.
        """
        pair = self.source.read(f"outputs/{name}").float(), self.source.read(f"inputs/{name}").float()
        for kind, factor in zip(("outputs", "inputs"), pair, strict=True):
            _require_second_moment(factor, f"{kind}/{name} of {self.label}")
        return pair

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write a safetensors file, one factor at a time; ``.factors.safetensors`` is the customary ending.

        It holds second moments and names, no inputs, labels or weights. Second moments of a handful of examples give
        those away all the same: collect from a hundred or more.

        Args:
            path: The file.
            dtype: Of the factors in the file; bfloat16 halves it, at 0.4 % of rounding.

        Raises:
            OSError: If it cannot be written; an older file is left as it was then.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        infos = factor_infos(self.layers, dtype)
        with write_file(path, infos, self.metadata()) as writer:
            for name in infos:
                writer.write(name, self.source.read(name))
        return path

    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        about = {
            "label": self.label,
            "base": None if self.base is None else self.base.to_json(),
            "layers": {
                name: {
                    "outputs": layer.outputs,
                    "inputs": layer.inputs,
                    "bias": layer.bias,
                    "transposed": layer.transposed,
                }
                for name, layer in self.layers.items()
            },
            "facts": dict(self.facts),
        }
        return {_SCHEMA_KEY: SCHEMA, _ABOUT_KEY: json.dumps(about)}

    @classmethod
    def load(cls, path: str | Path) -> KroneckerFactors:
        """Open a file of factors; values are read when they are asked for.

        Raises:
            FormatError: If the file is none, is of an unknown schema, is cut short, or contradicts itself.
            BaseMismatchError: If its record of the base was altered.
        """
        source = SafetensorsFolder(Path(path))
        metadata = source.metadata
        if _SCHEMA_KEY not in metadata:
            raise FormatError(f"{path} holds no Kronecker factors. Make them with `mergeready factors`.")
        if metadata[_SCHEMA_KEY] != SCHEMA:
            raise FormatError(
                f"{path} holds factors of schema {metadata[_SCHEMA_KEY]!r}; this version reads schema {SCHEMA}."
            )
        try:
            about = json.loads(metadata[_ABOUT_KEY])
            label, facts = str(about["label"]), dict(about["facts"])
            layers = {str(name): _layer(entry) for name, entry in about["layers"].items()}
            base = (
                None if about["base"] is None else BaseIdentity.from_json(about["base"], f"base of {label}")
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"{path} does not describe itself as factors do ({error}).") from error
        _require_consistent(path, layers, source)
        return cls(label, base, layers, source, facts)


def is_factors(path: object) -> TypeGuard[str | Path]:
    """Whether something is a path that ends like that of a file of factors."""
    return isinstance(path, str | Path) and str(path).endswith(SUFFIX)


def open_factors(given: str | Path | KroneckerFactors, base: Base) -> KroneckerFactors:
    """Factors of an expert on this base, opened if they are a path.

    Raises:
        FormatError: If the file holds no factors.
        BaseMismatchError: If they were collected on another base.
        MismatchError: If they are of layers that the base does not have in these shapes; all are listed.
    """
    made = given if isinstance(given, KroneckerFactors) else KroneckerFactors.load(given)
    if made.base is not None:
        base.identity.require_same(made.base, f"factors {made.label}", made.layers)
    infos = base.source.infos
    strange = [
        name
        for name, layer in made.layers.items()
        if name not in infos
        or infos[name].shape != layer.weight_shape
        or (
            layer.bias is not None
            and (layer.bias not in infos or infos[layer.bias].shape != (layer.outputs,))
        )
    ]
    if strange:
        raise MismatchError(
            f"factors {made.label} are of layers that {base.identity.label or 'the base'} does not have in these "
            f"names and shapes: {listing(strange)}. Collect them again, with `base=` this base."
        )
    return made


def sum_factors(
    given: Sequence[KroneckerFactors], weights: Sequence[float] | None = None
) -> KroneckerFactors:
    """One pair of factors a layer for the curvatures of several experts: ``Σₜ Bₜ ⊗ Aₜ ≈ (Σₜ Bₜ) ⊗ (Σₜ λₜ Aₜ)``.

    Exact for one expert with λ = 1 and, with the default λₜ = 1/T, for T equal ones; otherwise it also counts the
    cross terms ``λₛ Bₜ ⊗ Aₛ``. What it costs to use does not grow with the number of peers. "Dataless weight
    disentanglement" (arXiv 2602.17385). Layers that some of them lack count as free of curvature there.

    Args:
        given: Factors on one base.
        weights: λₜ, none negative; 1/T each by default.

    Raises:
        OptionError: If there are none, or weights do not fit.
        BaseMismatchError: If they were collected on different bases.
        MismatchError: If a layer differs between them.
        NonFiniteError, FormatError: As :meth:`KroneckerFactors.read`.

    Example:
        >>> one = KroneckerFactors.of({"w": (torch.eye(2), 3 * torch.eye(2))}, {"w": FactoredLayer(2, 2)})
        >>> B, A = sum_factors([one, one]).read("w")
        >>> float(torch.kron(B, A)[0, 0])  # twice 1 · 3
        6.0
    """
    summed = list(each_sum(given, weights))
    pairs = {name: pair for name, _, pair in summed}
    layers = {name: layer for name, layer, _ in summed}
    base = next((made.base for made in given if made.base is not None), None)
    return KroneckerFactors.of(pairs, layers, label=" + ".join(made.label for made in given), base=base)


def each_sum(
    given: Sequence[KroneckerFactors],
    weights: Sequence[float] | None = None,
    wanted: Callable[[str, FactoredLayer], bool] = lambda name, layer: True,
) -> Iterator[tuple[str, FactoredLayer, tuple[Tensor, Tensor]]]:
    """What :func:`sum_factors` adds, layer by layer, so that no more than one need be in memory.

    Args:
        given: As there.
        weights: As there.
        wanted: Which layers to read.

    Yields:
        Name, layer, and the sums of B and of A, fp32; they belong to the caller.

    Raises:
        MergeReadyError: As there.
    """
    if not given:
        raise OptionError("there are no factors to add: pass at least one.")
    shares = [1 / len(given)] * len(given) if weights is None else list(weights)
    if len(shares) != len(given) or min(shares) < 0:
        raise OptionError(
            f"`weights` must be {len(given)} numbers, one for each of the factors, none negative, not {shares}."
        )
    base = next((made.base for made in given if made.base is not None), None)
    layers: dict[str, FactoredLayer] = {}
    for made in given:
        if base is not None and made.base is not None:
            base.require_same(made.base, f"factors {made.label}", made.layers)
        for name, layer in made.layers.items():
            if layers.setdefault(name, layer) != layer:
                raise MismatchError(
                    f"{name} is {layer} in the factors {made.label}, but {layers[name]} in others."
                )
    for name, layer in layers.items():
        if wanted(name, layer):
            having = [(share, m) for share, m in zip(shares, given, strict=True) if name in m.layers]
            pair = (
                _added([(1.0, made.source) for _, made in having], f"outputs/{name}", layer.outputs),
                _added([(share, made.source) for share, made in having], f"inputs/{name}", layer.columns),
            )
            _require_sums(pair, name, [made for _, made in having])
            yield name, layer, pair


def _added(parts: Sequence[tuple[float, WeightSource]], name: str, side: int) -> Tensor:
    """A weighted sum of square matrices, fp32, in pieces that stay in the processor's cache meanwhile."""
    total = torch.empty(side * side)
    for start in range(0, len(total), _PIECE):
        piece = total[start : start + _PIECE]
        for index, (weight, source) in enumerate(parts):
            read = source.read_flat(name, start, start + len(piece)).to("cpu", torch.float32)
            if index:
                piece.add_(read, alpha=weight)
            else:
                torch.mul(read, weight, out=piece)
    return total.reshape(side, side)


def _require_sums(pair: tuple[Tensor, Tensor], name: str, made: Sequence[KroneckerFactors]) -> None:
    """Check sums, which costs a part of checking each; where one is broken, name whose factors are."""
    try:
        for kind, factor in zip(("outputs", "inputs"), pair, strict=True):
            _require_second_moment(factor, f"{kind}/{name} of the sum")
    except (FormatError, NonFiniteError):
        for one in made:
            one.read(name)
        raise


def factor_infos(layers: Mapping[str, FactoredLayer], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Names, shapes and dtype of a file's tensors, in their order.

    Raises:
        OptionError: If the dtype is none of floating-point numbers.
    """
    if not dtype.is_floating_point:
        raise OptionError(f"`dtype` of factors must be one of floating-point numbers, not {dtype}.")
    infos = {}
    for name, layer in layers.items():
        infos[f"outputs/{name}"] = TensorInfo((layer.outputs, layer.outputs), dtype)
        infos[f"inputs/{name}"] = TensorInfo((layer.columns, layer.columns), dtype)
    return infos


def _layer(entry: Mapping[str, Any]) -> FactoredLayer:
    bias = entry["bias"]
    return FactoredLayer(
        int(entry["outputs"]),
        int(entry["inputs"]),
        None if bias is None else str(bias),
        bool(entry["transposed"]),
    )


def _require_consistent(path: object, layers: Mapping[str, FactoredLayer], source: WeightSource) -> None:
    wanted = {name: info.shape for name, info in factor_infos(layers, torch.float32).items()}
    names = [*source.infos, *source.aliases]
    found = {name: source.infos[source.aliases.get(name, name)] for name in names}
    problems = [f"{name} is not there" for name in wanted if name not in found]
    problems += [f"{name} belongs to no layer" for name in found if name not in wanted]
    problems += [
        f"{name} is {info.shape} of {info.dtype}, not {wanted[name]} of floats"
        for name, info in found.items()
        if name in wanted and (info.shape != wanted[name] or not info.dtype.is_floating_point)
    ]
    if problems:
        raise FormatError(f"{path} contradicts itself: {listing(problems)}. Make it again.")


def _require_second_moment(factor: Tensor, what: str) -> None:
    low, high = factor.aminmax() if factor.numel() else (torch.zeros(()), torch.zeros(()))
    largest = float(torch.maximum(high, -low))  # NaN if there is one
    if not largest < float("inf"):
        raise NonFiniteError(f"{what} holds NaN or infinite values. Collect it again, in float32.")
    if not _is_symmetric(factor, _ASYMMETRY * largest) or bool((factor.diagonal() < 0).any()):
        raise FormatError(f"{what} is no mean of outer products: not symmetric, or with a negative diagonal.")


def _is_symmetric(factor: Tensor, tolerance: float) -> bool:
    """Whether it is its transpose. Products with random signs show most that are, at a part of the cost."""
    signs = torch.randint(2, (len(factor),), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs = signs.to(factor.device)
    if bool(((factor @ signs - signs @ factor).abs() <= tolerance).all()):
        return True
    return bool(((factor - factor.T).abs() <= tolerance).all())
