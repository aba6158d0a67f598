from __future__ import annotations

from pathlib import Path

import pytest

from mergeready.merging import journal
from mergeready.merging.journal import Finished, Journal

ENTRIES = [Finished("a", 0.1, 1e-9), Finished("b", broken=True), Finished("ö.weight", 2.0)]


def write(root: Path, rank: int, entries: list[Finished]) -> None:
    book = Journal(root, rank, lambda: None)
    for entry in entries:
        book.add(entry, 10)
    book.close()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 0, ENTRIES[:1])
    write(tmp_path, 0, ENTRIES[1:2])  # another sitting
    write(tmp_path, 1, ENTRIES[2:])
    assert Journal.read(tmp_path) == {entry.name: entry for entry in ENTRIES}


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_line_that_was_cut_short_does_not_count(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, ENTRIES[:2])
    path = tmp_path / "finished-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(Journal.read(tmp_path)) == ["a"]
    write(tmp_path, 0, ENTRIES[1:])
    assert Journal.read(tmp_path) == {entry.name: entry for entry in ENTRIES}


def test_values_reach_the_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "COMMIT_BYTES", 25)
    known: list[list[str]] = []
    book = Journal(tmp_path, 0, lambda: known.append(list(Journal.read(tmp_path))))
    for name in "abcde":
        book.add(Finished(name), 10)
    assert list(Journal.read(tmp_path)) == ["a", "b", "c"]
    book.close()
    assert known == [[], ["a", "b", "c"]]
    assert list(Journal.read(tmp_path)) == list("abcde")


def test_slow_merges_commit_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    book = Journal(tmp_path, 0, lambda: None)
    book.add(Finished("a"), 1)
    assert Journal.read(tmp_path) == {}
    now[0] += journal.COMMIT_SECONDS
    book.add(Finished("b"), 1)
    assert list(Journal.read(tmp_path)) == ["a", "b"]
    book.close()
