from __future__ import annotations

import pytest
import torch.distributed as dist

from mergeready.errors import OptionError
from mergeready.merging.ranks import open_ranks


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_alone() -> None:
    for distributed in (None, False):
        with open_ranks(distributed) as ranks:
            assert (ranks.rank, ranks.size) == (0, 1)
        assert not dist.is_initialized()


def test_ranks_are_needed_where_they_are_asked_for() -> None:
    with pytest.raises(OptionError, match="`distributed` needs ranks"), open_ranks(True):
        pass


def test_torchrun_may_start_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with open_ranks(True) as ranks:
        assert ranks.size == 1


def test_sharing_can_be_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with open_ranks(False) as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
