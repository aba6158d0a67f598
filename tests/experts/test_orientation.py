"""Which way round weights are stored, told by the biases of their neighbours."""

from __future__ import annotations

import torch

from mergeready.experts.orientation import is_swapped, orientations
from mergeready.weights.source import TensorInfo
from tests.models import tiny_bert, tiny_gpt2


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name.replace("__", "."): TensorInfo(shape, torch.float32) for name, shape in shapes.items()}


def test_real_models() -> None:
    for make, wanted in ((tiny_gpt2, True), (tiny_bert, False)):
        model = make()
        found = orientations({n: TensorInfo(tuple(p.shape), p.dtype) for n, p in model.named_parameters()})
        layers = [n for n, p in model.named_parameters() if p.ndim == 2 and ("h.0." in n or "layer.0." in n)]
        assert layers
        assert {is_swapped(name, found) for name in layers} == {wanted}


def test_the_nearest_layers_tell() -> None:
    found = orientations(
        infos(
            h__0__a__weight=(4, 12), h__0__a__bias=(12,), h__1__b__weight=(12, 4), h__1__b__bias=(12,),
            score__weight=(2, 4), score__bias=(2,),
        )
    )  # fmt: skip
    assert found == {"h.0": True, "h.1": False, "h": None}
    assert is_swapped("h.0.c.weight", found) is True
    assert is_swapped("h.1.c.weight", found) is False
    assert is_swapped("h.2.c.weight", found) is None, "its neighbours differ"
    assert is_swapped("score.weight", found) is None, "a head may be of another kind than the body"


def test_square_weights_and_lone_ones_tell_nothing() -> None:
    assert orientations(infos(h__0__a__weight=(4, 4), h__0__a__bias=(4,), h__1__b__weight=(4, 12))) == {}
