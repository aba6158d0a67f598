from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense, LowRank
from mergeready.metrics import Accumulator, Chunk, GramAccumulator, NormAccumulator, accumulate
from mergeready.weights import StateDictSource
from mergeready.weights.source import CHUNK_ELEMENTS
from tests.metrics.chunks import Values, base_of, experts, task_vectors

NOBODY = BaseIdentity({})


class Recorder(Accumulator):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.sums = torch.zeros(0)
        self.chunks: list[Chunk] = []

    def update(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    def values(self, name: str, expert: int) -> Tensor:
        return torch.cat([c.deltas[expert] for c in self.chunks if c.name == name] or [torch.zeros(0)])


@given(found=experts())
def test_every_value_is_shown_once_and_in_order(found: list[Values]) -> None:
    seen, base = Recorder(), base_of(found[0])
    accumulate(task_vectors(found), base, [seen])
    for name in found[0]:
        for expert, values in enumerate(found):
            assert torch.equal(seen.values(name, expert), values[name].reshape(-1))
        shown = torch.cat([c.base for c in seen.chunks if c.name == name] or [torch.zeros(0)])
        assert torch.equal(shown, base.read(name).reshape(-1))


def test_chunks_are_no_longer_than_promised() -> None:
    found = [{"x": torch.ones(2 * CHUNK_ELEMENTS + 1)}]
    seen = Recorder()
    accumulate(task_vectors(found), base_of(found[0]), [seen])
    assert [len(chunk.base) for chunk in seen.chunks] == [CHUNK_ELEMENTS, CHUNK_ELEMENTS, 1]


def test_zeros_stand_in_for_what_an_expert_has_not() -> None:
    base = StateDictSource({"x": torch.ones(2), "y": torch.ones(3)})
    one = DeltaTaskVector({"x": Dense(torch.full((2,), 5.0))}, base.infos, NOBODY, "one")
    two = DeltaTaskVector({"y": Dense(torch.full((3,), 7.0))}, base.infos, NOBODY, "two")
    seen = Recorder()
    accumulate([one, two], base, [seen])
    assert seen.values("x", 0).tolist() == [5, 5]
    assert seen.values("x", 1).tolist() == [0, 0]
    assert seen.values("y", 0).tolist() == [0, 0, 0]
    assert seen.values("y", 1).tolist() == [7, 7, 7]


def test_only_the_given_names_are_read() -> None:
    found = [{"x": torch.ones(2), "y": torch.ones(2)}]
    seen = Recorder()
    accumulate(task_vectors(found), base_of(found[0]), [seen], ["y"])
    assert [chunk.name for chunk in seen.chunks] == ["y"]


def test_values_are_fp32_whatever_is_stored() -> None:
    base = StateDictSource({"x": torch.ones(4, 4).bfloat16()})
    low = LowRank(torch.ones(4, 1).bfloat16(), torch.ones(1, 4).bfloat16(), (4, 4))
    seen = Recorder()
    accumulate([DeltaTaskVector({"x": low}, base.infos, NOBODY, "low")], base, [seen])
    assert {seen.chunks[0].base.dtype, seen.chunks[0].deltas[0].dtype} == {torch.float32}


def test_several_accumulators_share_one_pass() -> None:
    found = [{"x": torch.tensor([3.0, 4.0])}, {"x": torch.tensor([0.0, 2.0])}]
    norms, gram = NormAccumulator(["x"], 2), GramAccumulator(2)
    accumulate(task_vectors(found), base_of(found[0]), [norms, gram])
    assert (norms.norm(0), norms.norm(1)) == (5.0, 2.0)
    assert gram.sums.tolist() == [[25, 8], [8, 4]]


def test_only_sums_of_the_same_kind_add_up() -> None:
    with pytest.raises(OptionError, match="a NormAccumulator of another layout"):
        GramAccumulator(1).merge(NormAccumulator(["x"], 1))
    with pytest.raises(OptionError, match="another layout"):
        NormAccumulator(["x", "y"], 1).merge(NormAccumulator(["y", "x"], 1))
    same = NormAccumulator(["x"], 1)
    same.merge(NormAccumulator(["x"], 1))
    assert float(same.sums.sum()) == 0


def test_what_is_read_at_once_does_not_grow_with_the_number_of_experts() -> None:
    sizes = []
    for count in (2, 9, 33, 400):
        found = [{"x": torch.ones(CHUNK_ELEMENTS // 100, 120)}] * count
        seen = Recorder()
        accumulate(task_vectors(found), base_of(found[0]), [seen])
        assert torch.equal(seen.values("x", count - 1), found[0]["x"].reshape(-1))
        lengths = [len(chunk.base) for chunk in seen.chunks]
        assert all(length % 120 == 0 for length in lengths)
        sizes.append(max(lengths) * (1 + count))
    assert max(sizes[:3]) <= 10 * CHUNK_ELEMENTS
    assert sizes[3] <= 401 * 2**14
