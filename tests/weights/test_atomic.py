from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mergeready.errors import OutputExistsError
from mergeready.weights.atomic import is_partial, new_file, new_folder


class Interrupt(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_file(tmp_path / "x.json") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "x.json").exists()
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
    assert (tmp_path / "x.json").read_text() == "new"
    assert names(tmp_path) == ["x.json"]


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with new_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "x").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new"


def fail_in_file(path: Path, error: BaseException) -> None:
    with new_file(path) as temporary:
        temporary.write_text("half")
        raise error


def fail_in_folder(path: Path, error: BaseException, overwrite: bool) -> None:
    with new_folder(path, overwrite=overwrite) as temporary:
        (temporary / "half").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError(), Interrupt(), OSError(errno.ENOSPC, "disk full")])
def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(type(error)):
        fail_in_file(tmp_path / "x", error)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_disk_that_fills_up_at_the_flush_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), new_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_nothing_is_renamed_before_it_was_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    real = os.fsync

    def record(fd: int) -> None:
        flushed.append(((tmp_path / "x").exists(), os.fstat(fd).st_ino))
        real(fd)

    monkeypatch.setattr(os, "fsync", record)
    with new_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert flushed == [(False, (tmp_path / "x").stat().st_ino), (True, tmp_path.stat().st_ino)]


def test_a_file_is_told_from_itself_while_it_is_written(tmp_path: Path) -> None:
    with new_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert is_partial(temporary, "x")
        assert not is_partial(temporary, "y")
    assert not is_partial(tmp_path / "x", "x")


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert (tmp_path / "deep" / "out" / "sub" / "a").read_text() == "a"


def test_an_existing_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="out exists"), new_folder(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["out"]


def test_an_old_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_folder(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "new").write_text("new")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError(), Interrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    if overwrite:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(type(error)):
        fail_in_folder(tmp_path / "out", error, overwrite)
    assert names(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or names(tmp_path / "out") == ["old"]


def test_a_rename_that_fails_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and target.name == "out" and (self / "new").exists():
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(OSError, match="Input/output"),
        new_folder(tmp_path / "out", overwrite=True) as temporary,
    ):
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_what_is_overwritten_may_be_a_file_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("stays")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("old")
    for name in ("link", "file"):
        with new_folder(tmp_path / name, overwrite=True) as temporary:
            (temporary / "new").write_text("new")
        assert names(tmp_path / name) == ["new"]
        assert not (tmp_path / name).is_symlink()
    assert names(tmp_path) == ["file", "link", "target"]
    assert names(tmp_path / "target") == ["precious"]
