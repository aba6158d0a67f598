from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from mergeready.errors import BusyError, LostRankError, OutputExistsError
from mergeready.weights.atomic import new_folder
from mergeready.weights.resumable import Workspace, resumable_folder
from tests.weights.test_atomic import Interrupt, names


def sit(path: Path, key: str | None, text: str, error: BaseException | None = None, **options: bool) -> bool:
    """Work on a folder; whether there was something to go on with."""
    with resumable_folder(path, key, **options) as workspace:
        if not workspace.resumed and key is not None:
            workspace.set_key(key)
        with (workspace.folder / "log").open("a") as log:
            log.write(text)
        (workspace.root / "notes").write_text("notes")
        if error is not None:
            raise error
    return workspace.resumed


def interrupted(path: Path, key: str | None, text: str = "1", error: BaseException | None = None) -> None:
    error = error or Interrupt()
    with pytest.raises(type(error)):
        sit(path, key, text, error)
    assert not path.exists()


def test_one_sitting(tmp_path: Path) -> None:
    assert not sit(tmp_path / "out", "key", "1")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["log"]


@pytest.mark.parametrize("error", [Interrupt(), KeyboardInterrupt(), LostRankError("gone")])
def test_an_interruption_is_gone_on_from(tmp_path: Path, error: BaseException) -> None:
    interrupted(tmp_path / "out", "key", "1", error)
    interrupted(tmp_path / "out", "key", "2", error)
    assert sit(tmp_path / "out", "key", "3")
    assert (tmp_path / "out" / "log").read_text() == "123"
    assert names(tmp_path) == ["out"]


def test_another_key_starts_afresh(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "key")
    root = Workspace.beside(tmp_path / "out").root
    assert names(root) == ["folder", "key", "lock", "notes"]
    interrupted(tmp_path / "out", "other", "2")
    assert (root / "key").read_text() == "other"
    assert not sit(tmp_path / "out", "key", "3")
    assert (tmp_path / "out" / "log").read_text() == "3"


def test_without_a_key_nothing_is_kept(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", None)
    assert names(tmp_path) == []
    interrupted(tmp_path / "out", "key")
    assert not sit(tmp_path / "out", None, "2")
    assert (tmp_path / "out" / "log").read_text() == "2"


def test_a_failure_is_final(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "key", "1", ValueError())
    assert names(tmp_path) == []


def test_work_without_its_key_does_not_count(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "key")
    (Workspace.beside(tmp_path / "out").root / "key").unlink()
    assert not sit(tmp_path / "out", "key", "2")
    assert (tmp_path / "out" / "log").read_text() == "2"


def test_a_key_whose_folder_has_moved_away_does_not_count(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "key")
    shutil.rmtree(Workspace.beside(tmp_path / "out").folder)
    assert not sit(tmp_path / "out", "key", "2")
    assert (tmp_path / "out" / "log").read_text() == "2"


def test_overwriting(tmp_path: Path) -> None:
    sit(tmp_path / "out", "key", "old")
    with pytest.raises(OutputExistsError, match="out exists"):
        sit(tmp_path / "out", "key", "new")
    assert names(tmp_path) == ["out"]
    with pytest.raises(Interrupt):
        sit(tmp_path / "out", "key", "1", Interrupt(), overwrite=True)
    assert (tmp_path / "out" / "log").read_text() == "old"
    assert sit(tmp_path / "out", "key", "2", overwrite=True)
    assert (tmp_path / "out" / "log").read_text() == "12"
    assert names(tmp_path) == ["out"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with resumable_folder(tmp_path / "out", "key") as workspace:
        for key in ("key", "other", None):
            with pytest.raises(BusyError, match="another process is making"):
                sit(tmp_path / "out", key, "second")
        assert not sit(tmp_path / "other", "key", "elsewhere")
        (workspace.folder / "log").write_text("first")
    assert (tmp_path / "out" / "log").read_text() == "first"


def test_who_waited_finds_the_output_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergeready.weights import resumable

    real = resumable._take_lock

    def after_another(root: Path, path: Path) -> int:
        monkeypatch.undo()
        sit(path, "other", "first")
        return real(root, path)

    monkeypatch.setattr(resumable, "_take_lock", after_another)
    with pytest.raises(OutputExistsError):
        sit(tmp_path / "out", "key", "second")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "log").read_text() == "first"


def test_a_workspace_that_another_removes_this_moment_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, real = Workspace.beside(tmp_path / "out").root, os.mkdir
    root.mkdir()

    def refused(path: Path, *options: int) -> None:
        try:
            real(path, *options)
        except FileExistsError:
            if path == root:
                monkeypatch.undo()
                root.rmdir()
            raise

    monkeypatch.setattr(os, "mkdir", refused)
    assert not sit(tmp_path / "out", "key", "1")
    assert names(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_workspace_is_named(tmp_path: Path) -> None:
    Workspace.beside(tmp_path / "out").root.write_text("mine")
    with pytest.raises(FileExistsError, match=r"\.out\.partial-work"):
        sit(tmp_path / "out", "key", "1")


def test_a_link_that_leads_nowhere_is_an_output_that_exists(tmp_path: Path) -> None:
    """It was met at the last step only, when all work was done."""
    (tmp_path / "out").symlink_to(tmp_path / "unmounted")
    for block in (resumable_folder(tmp_path / "out", None), new_folder(tmp_path / "out")):
        with pytest.raises(OutputExistsError), block:
            pass
    with resumable_folder(tmp_path / "out", None, overwrite=True) as workspace:
        (workspace.folder / "x").write_text("new")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()
