from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import UnsupportedError
from mergeready.weights.ranks import Ranks
from mergeready.weights.shards import Held
from mergeready.weights.shares import Shares
from mergeready.weights.source import TensorInfo


class Told(Ranks):
    """One rank of several, that is told what the others would say."""

    def __init__(self, rank: int, spans: list[dict[str, tuple[int, int]]]) -> None:
        super().__init__()
        self.rank, self.size, self._spans = rank, len(spans), spans

    def each(self, value: Any) -> list[Any]:
        assert value == self._spans[self.rank]
        return self._spans


def shares(infos: dict[str, TensorInfo], blocks: list[dict[str, Held]]) -> list[Shares]:
    spans = [{name: block.span or (0, 0) for name, block in own.items()} for own in blocks]
    return [Shares(infos, own, Told(rank, spans)) for rank, own in enumerate(blocks)]


def rows(info: TensorInfo, start: int, stop: int) -> Held:
    rest = (0,) * (len(info.shape) - 1)
    return Held(info.shape, (start, *rest), (stop - start, *info.shape[1:]))


@given(data=st.data(), groups=st.integers(1, 3), copies=st.integers(1, 3))
def test_all_ranks_together_cover_every_element_once(data: st.DataObject, groups: int, copies: int) -> None:
    """``groups`` shards, each on ``copies`` ranks; some parameters whole on all."""
    infos, blocks = {}, [{} for _ in range(groups * copies)]
    for index in range(data.draw(st.integers(1, 6))):
        shape = (data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 2**17, 2**19])))
        infos[f"p{index}"] = info = TensorInfo(shape, torch.float32)
        cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), min_size=groups - 1, max_size=groups - 1)))
        ends = list(zip([0, *cuts], [*cuts, shape[0]], strict=True))
        if data.draw(st.booleans()):
            ends = [(0, shape[0])] * groups
        for rank, own in enumerate(blocks):
            own[f"p{index}"] = rows(info, *ends[rank % groups])
    found = shares(infos, blocks)
    for name, info in infos.items():
        pieces = sorted(piece for share in found for piece in share.of(name))
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == info.numel
        for own, share in zip(blocks, found, strict=True):
            start, stop = own[name].span or (0, 0)
            assert all(start <= a <= b <= stop for a, b in share.of(name))


def test_replicas_share_the_work_evenly() -> None:
    infos = {
        f"{i}.{kind}": TensorInfo(s, torch.float32)
        for i in range(8)
        for kind, s in (("weight", (64, 512)), ("bias", (64,)))
    }
    whole = {name: rows(info, 0, info.rows) for name, info in infos.items()}
    loads = [
        sum(stop - start for name in infos for start, stop in share.of(name))
        for share in shares(infos, [whole] * 4)
    ]
    assert max(loads) - min(loads) <= 64 * 512
    assert sum(loads) == sum(info.numel for info in infos.values())


def test_ranks_that_do_not_fit_together_are_refused() -> None:
    info = TensorInfo((4, 2), torch.float32)
    for ends in ([(0, 2), (1, 4)], [(0, 2), (3, 4)], [(0, 2), (2, 3)]):
        with pytest.raises(UnsupportedError, match="overlapping or incomplete parts of weight"):
            shares({"weight": info}, [{"weight": rows(info, *end)} for end in ends])
    with pytest.raises(UnsupportedError, match="pipeline parallelism"):
        Shares({"weight": info}, {}, Told(0, [{"weight": (0, 8)}, {"other": (0, 8)}]))
