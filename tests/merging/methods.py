"""Every registered method, ready to merge: those that need data get some that was made up."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mergeready.merging import MergeMethod, make_method
from mergeready.merging.information import Collected


def built(name: str, state: Mapping[str, Tensor], count: int, folder: Path | None = None) -> MergeMethod:
    """A method with its defaults for so many experts on a base; what it needs from data is made up.

    Args:
        name: The method.
        state: The base's tensors, or any of their shapes.
        count: Number of experts.
        folder: Where to put files, for tests that need the data on disk.
    """
    makers = {"fisher": ("fisher", made_up_fisher), "regmean": ("grams", made_up_grams)}
    if name not in makers:
        return make_method(name)
    field, maker = makers[name]
    collected = [maker(state, seed) for seed in range(count)]
    if folder is None:
        return make_method(name, **{field: collected})
    return make_method(
        name, **{field: [c.save(folder / f"{i}.safetensors") for i, c in enumerate(collected)]}
    )


def _random(name: str, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode())))


def made_up_fisher(state: Mapping[str, Tensor], seed: int) -> Collected:
    """Fisher values over several orders of magnitude, a few of them zero."""
    values = {n: (4 * _random(n, seed, *t.shape)).exp() for n, t in state.items() if t.is_floating_point()}
    return Collected({n: v * (v > 1e-3) for n, v in values.items()}, "fisher")


def made_up_grams(state: Mapping[str, Tensor], seed: int) -> Collected:
    """Mean outer products of 40 inputs for every matrix that is no embedding."""
    matrices = {n: t for n, t in state.items() if t.ndim == 2 and "embed" not in n}
    inputs = {n: _random(n, seed, 40, t.shape[1]) for n, t in matrices.items()}
    return Collected({n: x.T @ x / 40 for n, x in inputs.items()}, "input_grams")
