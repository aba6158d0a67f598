"""The heart of every engine: the merged delta of one parameter, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergeready.errors import NonFiniteError, OptionError, listing
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.allocation import keep_freed_memory
from mergeready.merging.held import HeldDeltas, HeldVector, read_all
from mergeready.merging.method import ElementwiseMethod, MatrixMethod, MergeMethod, Place
from mergeready.merging.registry import make_method
from mergeready.weights.source import TensorInfo, chunk_ranges


def merged_chunks(
    method: MergeMethod,
    name: str,
    info: TensorInfo,
    vectors: Sequence[TaskVector],
    weights: Sequence[float],
    span: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """The merged delta of one parameter as (start, stop, fp32 values), in order and without gaps.

    Yields nothing where no expert has a delta, or the parameter has no elements. Every engine merges through this
    function, and results do not depend on the pieces, which is why engines agree bit by bit.

    Args:
        method: The merge method.
        name: The parameter.
        info: Its shape.
        vectors: The experts' task vectors.
        weights: One factor an expert.
        span: Only these elements of the result, ``start`` to ``stop``; all of them by default. The method still reads
            the whole deltas where it needs a statistic of them.
    """
    if not info.numel or not any(name in vector for vector in vectors):
        return
    if isinstance(method, MatrixMethod):
        if method.handles(name, info):
            yield from _merged_matrix(method, name, info, vectors, weights, span)
            return
        method = make_method(method.for_vectors())
    if not isinstance(method, ElementwiseMethod):
        raise OptionError(f"{method.name} is of an unknown kind.")
    keep_freed_memory()
    held = HeldDeltas(vectors, name, info) if _hold(method, name, info, vectors) else None
    read = partial(read_all, vectors, name) if held is None else held.read
    prepared = [
        _prepared(method, vector, name, slot, held) if name in vector else None
        for slot, vector in enumerate(vectors)
    ]
    joint = method.prepare_jointly(read, info, weights, prepared)
    for start, stop in chunk_ranges(info, span=span):
        deltas = read(start, stop)
        yield start, stop, method.combine(deltas, weights, prepared, Place(name, start, stop, joint))


def _merged_matrix(
    method: MatrixMethod,
    name: str,
    info: TensorInfo,
    vectors: Sequence[TaskVector],
    weights: Sequence[float],
    span: tuple[int, int] | None,
) -> Iterator[tuple[int, int, Tensor]]:
    deltas = [vector.get(name) for vector in vectors]
    place = Place(name, 0, info.numel, memories=[vector.memory for vector in vectors])
    flat = method.combine_matrices(deltas, weights, place).reshape(-1)
    for start, stop in chunk_ranges(info, span=span):
        yield start, stop, flat[start:stop]


def _hold(method: ElementwiseMethod, name: str, info: TensorInfo, vectors: Sequence[TaskVector]) -> bool:
    """Whether to read deltas once and hold them: not if one pass suffices for all but one, whose rest is remembered."""
    fresh = sum(not _remembers(vector, (method, name, slot)) for slot, vector in enumerate(vectors))
    return method.holds(info, len(vectors)) and (method.passes > 2 or fresh > 1)


def _remembers(vector: TaskVector, key: tuple[Any, ...]) -> bool:
    return vector.memory is not None and key in vector.memory


def _prepared(
    method: ElementwiseMethod, vector: TaskVector, name: str, slot: int, held: HeldDeltas | None
) -> Any:
    key = (method, name, slot)
    if vector.memory is not None and key in vector.memory:
        return vector.memory[key]
    found = method.prepare(vector if held is None else HeldVector(vector, name, held, slot), name, slot)
    if vector.memory is not None:
        vector.memory[key] = found
    return found


def merged_delta(
    method: MergeMethod, name: str, info: TensorInfo, vectors: Sequence[TaskVector], weights: Sequence[float]
) -> Tensor | None:
    """The whole merged delta of one parameter in its shape, fp32; None where no expert has one."""
    flat = merged_span(method, name, info, vectors, weights)
    return None if flat is None else flat.reshape(info.shape)


def merged_span(
    method: MergeMethod,
    name: str,
    info: TensorInfo,
    vectors: Sequence[TaskVector],
    weights: Sequence[float],
    span: tuple[int, int] | None = None,
) -> Tensor | None:
    """The merged delta of one parameter or of a span of its elements, 1-D, fp32; None where no expert has one."""
    pieces = [values for _, _, values in merged_chunks(method, name, info, vectors, weights, span)]
    return torch.cat(pieces) if pieces else None


def add_delta(base: Tensor, delta: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``base + scale · delta`` in the delta's precision, or in float64 if the base is; rounded once to ``dtype``.

    In two steps for the reason given at :func:`mergeready.merging.method.weighted_sum`.
    """
    change = delta if scale == 1 else delta.mul(scale)
    if base.dtype == torch.float64:  # else what no expert changes would lose digits
        return base.add(change.to(base.device)).to(dtype)
    return base.to(delta).add(change).to(dtype)


def check_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """One finite factor an expert; 1 each where None is given.

    Raises:
        OptionError: If their number is wrong or one is not finite.
    """
    if weights is None:
        return [1.0] * count
    given: object = weights
    if isinstance(given, str) or not hasattr(given, "__len__"):
        raise OptionError(f"`weights` must be a list of numbers, not {weights!r}.")
    if len(weights) != count:
        raise OptionError(f"`weights` has {len(weights)} values for {count} experts.")
    for weight in weights:
        require_number("weights", weight)
    broken = [str(w) for w in weights if not abs(w) < float("inf")]
    if broken:
        raise OptionError(f"`weights` must be finite, not {listing(broken)}.")
    return [float(weight) for weight in weights]


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """A floating dtype of more than 8 bits, or None.

    Raises:
        OptionError: If it is another one.
    """
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise OptionError(f"`dtype` must be a floating dtype of 16 bits or more, not {dtype}.")
    return dtype


def check_scale(scale: float) -> float:
    """A finite scale.

    Raises:
        OptionError: If it is not.
    """
    require_number("scale", scale)
    if not abs(scale) < float("inf"):
        raise OptionError(f"`scale` must be finite, not {scale}.")
    return float(scale)


def require_number(name: str, value: object) -> None:
    """Raise if a value is no number, such as 1e-1, which YAML takes for text.

    Raises:
        OptionError: If so.
    """
    if not hasattr(value, "__float__"):
        raise OptionError(f"`{name}` must be numeric, not {value!r}.")


def require_finite_chunk(values: Tensor, name: str, broken: list[str]) -> None:
    """Note a parameter whose merged values are NaN or infinite."""
    if name not in broken and not all_finite(values):
        broken.append(name)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. A sum is finite only then, and costs little; if it overflows, they tell."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def raise_if_broken(
    broken: Sequence[str], vectors: Sequence[TaskVector], looked_at: Sequence[str] | None = None
) -> None:
    """Raise if merged values were not finite.

    Args:
        broken: The parameters where they were not.
        vectors: The experts' task vectors.
        looked_at: Those of the parameters in which to look for the expert to blame; by default all.

    Raises:
        NonFiniteError: Naming the parameters and, where one can be found, the expert to blame.
    """
    if not broken:
        return
    culprits = [v.label for v in vectors if any(_is_broken(v, name) for name in looked_at or broken)]
    if not culprits:
        raise NonFiniteError(
            f"NaN or infinite values after merging: {listing(broken)}. Nothing was written. A scale or weight is too "
            "large, the dtype too narrow, or the base holds such values itself."
        )
    raise NonFiniteError(
        f"NaN or infinite values in {listing(culprits)}: {listing(broken)}. Nothing was written. "
        "Its training diverged or its file is damaged; use an earlier checkpoint."
    )


def _is_broken(vector: TaskVector, name: str) -> bool:
    if name not in vector:
        return False
    ranges = chunk_ranges(vector.infos[name])
    return any(not bool(torch.isfinite(vector.flat(name, a, b)).all()) for a, b in ranges)
