from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergeready.errors import OutputExistsError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside it; on success it takes the place of ``path`` in one step.

    Yields the temporary path. On any exception the temporary file is removed and ``path`` is as it was.
    """
    temporary = _beside(path)
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name beside it; on success it becomes ``path``, complete.

    With ``overwrite``, the old folder is moved aside first and deleted last, so that at every moment at least
    one complete folder exists. Where ``path`` is a link, the link is replaced and its target stays.

    Raises:
        OutputExistsError: If ``path`` exists and ``overwrite`` is not set; nothing was written.
    """
    require_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        take_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free(path: Path, overwrite: bool) -> None:
    """Raise if something lies at a path that may not be replaced.

    Raises:
        OutputExistsError: If so.
    """
    if is_taken(path) and not overwrite:
        raise OutputExistsError(f"{path} exists. Name another output, or allow overwriting it (`overwrite`).")


def is_taken(path: Path) -> bool:
    """Whether something lies at a path, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def is_partial(path: Path, name: str) -> bool:
    """Whether this is ``name`` while it is written, or what a killed process left of it."""
    return path.name.startswith(_prefix(name))


def take_place(temporary: Path, path: Path) -> None:
    """Rename a complete folder to ``path``; what was there is moved aside first and deleted last."""
    old = _beside(path) if is_taken(path) else None
    if old is not None:
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    sync_folder(path.parent)
    if old is not None and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    elif old is not None:
        old.unlink()


def sync_file(path: Path) -> None:
    """Flush a file to the disk, so that a rename cannot make a half written file look finished."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Flush all files of a folder to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, where the system can (Windows cannot open folders)."""
    if os.name == "posix":
        sync_file(path)


def _beside(path: Path) -> Path:
    return path.with_name(_prefix(path.name) + secrets.token_hex(4))


def _prefix(name: str) -> str:
    return f".{name}.partial-"
