from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergeready.errors import EvaluationError, MergeReadyError, UnsupportedError
from mergeready.weights.ranks import Ranks
from tests.ranks import run_ranks


class Strange(Exception):
    pass


def conversation() -> dict[str, Any]:
    ranks = Ranks.world()
    mine = ranks.rank + 1
    first, second = torch.full((2, 2), float(mine), dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    ranks.add([first, second])
    caught = {}
    for name, raised in {"own": EvaluationError("no data"), "foreign": Strange("odd")}.items():
        try:
            with ranks.together():
                if ranks.rank == 1:
                    raise raised
        except Exception as error:  # noqa: BLE001 - whatever was raised is what is looked at
            caught[name] = (type(error).__name__, str(error))
    with ranks.together():
        pass
    return {
        "sums": (first.tolist(), second.tolist()),
        "each": ranks.each(mine),
        "same": ranks.same({"mine": mine}),
        "on_first": ranks.on_first(lambda: ranks.rank),
        "caught": caught,
        "one_group": Ranks.world()._group is ranks._group,
    }


def test_what_ranks_tell_each_other() -> None:
    for rank, found in enumerate(run_ranks(conversation, 2)):
        assert found["sums"] == ([[3.0, 3.0], [3.0, 3.0]], [2.0, 2.0, 2.0])
        assert found["each"] == [1, 2]
        assert found["same"] == {"mine": 1}
        assert found["on_first"] == 0
        assert found["one_group"]
        own, foreign = found["caught"]["own"], found["caught"]["foreign"]
        if rank == 1:
            assert (own, foreign) == (("EvaluationError", "no data"), ("Strange", "odd"))
        else:
            assert own == ("EvaluationError", "on rank 1: no data")
            assert foreign == ("MergeReadyError", "rank 1 raised Strange: odd")


def leaving() -> tuple[float, float]:
    """When this rank had read who failed, and when it left the section; the first one takes its time."""
    ranks = Ranks.world()
    each, read = ranks.each, 0.0

    def late(value: Any) -> Any:
        nonlocal read
        found = each(value)
        time.sleep(0.5 if ranks.rank == 0 else 0)
        read = time.monotonic()
        return found

    ranks.each = late  # type: ignore[method-assign]
    try:
        with ranks.together():
            if ranks.rank == 1:
                raise Strange("odd")
    except (Strange, MergeReadyError):
        return read, time.monotonic()
    return 0.0, 0.0


def test_a_rank_that_failed_waits_until_others_have_read_why() -> None:
    """It may end then and there, and what it sent would end with it."""
    (read, _), (_, left) = run_ranks(leaving, 2)
    assert 0 < read < left


def test_alone() -> None:
    ranks = Ranks.world()  # no process group was made
    assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
    sums = torch.ones(2, dtype=torch.float64)
    ranks.add([sums])
    assert sums.tolist() == [1.0, 1.0]
    assert ranks.each("a") == ["a"]
    assert ranks.same("b") == "b"
    assert ranks.on_first(lambda: 3) == 3
    with pytest.raises(MergeReadyError, match=r"^as it is$"), ranks.together():
        raise MergeReadyError("as it is")


@pytest.mark.parametrize(("count", "refused"), [(1, False), (8, True)])
def test_processes_of_xla_that_nobody_here_knows_of(
    monkeypatch: pytest.MonkeyPatch, count: int, refused: bool
) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", SimpleNamespace(world_size=lambda: count))
    if not refused:
        assert Ranks.world().size == 1
        return
    with pytest.raises(UnsupportedError, match="8 XLA processes"):
        Ranks.world()
