"""Whether a folder is what it seems: plain files, all inside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mergeready.errors import listing
from mergeready.validation.check import Limits, Result, check, failed, passed
from mergeready.validation.subject import Subject


@check(
    "F008",
    "file",
    "error",
    "it consists of plain files inside its folder",
    fix="Replace links by copies of the files that they stand for, and delete what is no file.",
)
def plain_files(subject: Subject, limits: Limits) -> Result:
    """Links that lead out of the folder or nowhere, pipes and devices. Follows no link to a folder."""
    root = subject.folder.resolve()
    home = _cache_of(subject.folder) or root
    wrong = sorted(_irregular(subject.folder, home))
    if wrong:
        return failed(listing(wrong), where=tuple(wrong), value=len(wrong))
    return passed("plain files only")


def _irregular(folder: Path, home: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            path = Path(parent, name)
            shown = path.relative_to(folder).as_posix()
            if path.is_symlink():
                target = os.path.realpath(path)
                if not os.path.exists(target):
                    yield f"{shown} is a link that leads nowhere"
                elif not Path(target).is_relative_to(home):
                    yield f"{shown} is a link out of the folder"
            elif name in files and not path.is_file():
                yield f"{shown} is no file"


def _cache_of(folder: Path) -> Path | None:
    """The repository's folder in the hub's cache, whose snapshots are links to files beside them."""
    parent = folder.absolute().parent
    return (
        parent.parent.resolve() if parent.name == "snapshots" and (parent.parent / "blobs").is_dir() else None
    )
