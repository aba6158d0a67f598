from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergeready.merging import ElementwiseMethod, make_method
from mergeready.merging.held import HeldDeltas, HeldVector, read_all
from mergeready.merging.registry import method_class, method_names
from mergeready.weights.source import TensorInfo
from tests.merging.formulas import NAME, merged, several_chunks, vectors

INFO = TensorInfo((300, 2000), torch.float32)


@pytest.mark.parametrize("span", [(0, 9), (261_900, 262_500), (5, 600_000), (599_999, 600_000)])
def test_held_values_are_those_that_were_read(span: tuple[int, int]) -> None:
    read = vectors([*several_chunks(2), None])
    held = HeldDeltas(read, NAME, INFO)
    for ours, theirs in zip(held.read(*span), read_all(read, NAME, *span), strict=True):
        assert torch.equal(ours, theirs)


def test_a_held_vector_gives_copies() -> None:
    read = vectors(several_chunks(2))
    vector = HeldVector(read[1], NAME, HeldDeltas(read, NAME, INFO), 1)
    vector.flat(NAME, 0, 10).zero_()
    assert torch.equal(vector[NAME].value, read[1][NAME].value)
    assert list(vector) == [NAME]


def elementwise() -> list[str]:
    kinds = {name: method_class(name) for name in method_names()}
    return [n for n, kind in kinds.items() if issubclass(kind, ElementwiseMethod) and kind.passes > 1]


@pytest.mark.parametrize(
    ("name", "experts"),
    [(name, experts) for name in elementwise() for experts in (2, 3) if (name, experts) != ("slerp", 3)],
)
def test_results_do_not_depend_on_holding(name: str, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas: list[Tensor] = several_chunks(experts)
    method: Any = make_method(name)
    weights = [1.0, 0.5, -2.0][:experts] if name != "slerp" else [1.0, 1.0]
    assert method.holds(INFO, experts)
    held = merged(method, deltas, weights)
    for module in ("method", "pcb", "selection"):
        monkeypatch.setattr(f"mergeready.merging.{module}.can_be_held", lambda *_: False)
    assert not method.holds(INFO, experts)
    torch.testing.assert_close(merged(method, deltas, weights), held, rtol=1e-6, atol=0)
