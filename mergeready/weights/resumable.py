from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergeready.errors import BusyError, LostRankError
from mergeready.weights.atomic import is_taken, new_file, require_free, sync_folder, sync_tree, take_place

_LOCK, _KEY, _FOLDER = "lock", "key", "folder"


@dataclass(frozen=True)
class Workspace:
    """A hidden folder beside the output, where it is made in one sitting or several.

    Attributes:
        root: The hidden folder; notes about what is finished go here.
        resumed: Whether an earlier sitting with the same key left finished work here.
    """

    root: Path
    resumed: bool = False

    @classmethod
    def beside(cls, path: Path) -> Workspace:
        """The workspace of an output, whether it exists or not."""
        return cls(path.with_name(f".{path.name}.partial-work"))

    @property
    def folder(self) -> Path:
        """What becomes the output."""
        return self.root / _FOLDER

    def set_key(self, key: str) -> None:
        """Say whose work this is, once there is something that another sitting can go on with."""
        sync_folder(self.folder)
        with new_file(self.root / _KEY) as temporary:
            temporary.write_text(key, encoding="utf-8")


@contextmanager
def resumable_folder(path: Path, key: str | None, *, overwrite: bool = False) -> Iterator[Workspace]:
    """Fill a folder in a workspace beside it; on success it becomes ``path``, complete.

    A process that dies leaves its workspace behind, and the next one with the same ``key`` goes on there; one with
    another key starts afresh. An exception is a verdict on the work and removes it, but an interruption
    (``KeyboardInterrupt``, a lost rank) is not, and keeps it. A lock that the system takes back when a process
    dies keeps a second process out.

    Args:
        path: The folder to make.
        key: What the result depends on; None if that cannot be told, and nothing can be continued.
        overwrite: Replace ``path`` if it exists, as :func:`mergeready.weights.atomic.new_folder` does.

    Raises:
        OutputExistsError: If ``path`` exists and ``overwrite`` is not set; nothing was written.
        BusyError: If another process is making the same folder.
    """
    require_free(path, overwrite)
    root = Workspace.beside(path).root
    lock = _take_lock(root, path)
    keep = False
    try:
        require_free(path, overwrite)  # again: its maker may have finished just before the lock was free
        workspace = Workspace(root, key is not None and _key_of(root) == key)
        if not workspace.resumed:
            _clear(root)
            workspace.folder.mkdir()
        yield workspace
        sync_tree(workspace.folder)
        take_place(workspace.folder, path)
    except BaseException as error:
        keep = key is not None and (isinstance(error, LostRankError) or not isinstance(error, Exception))
        raise
    finally:
        if not keep:
            _clear(root)
            (root / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # the next one may have begun to work here since the lock is gone
                root.rmdir()
        os.close(lock)


def _take_lock(root: Path, path: Path) -> int:
    import fcntl  # where the system has none, positional writes are missing as well

    root.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            root.mkdir(exist_ok=True)
        except FileExistsError:
            if is_taken(root) and not root.is_dir():
                raise
            continue  # whoever had finished removed the folder while `mkdir` looked at what is there
        try:
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # or after that
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(root / _LOCK)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise BusyError(
                f"another process is making {path} now. Wait for it, or name another output."
            ) from None
        except FileNotFoundError:  # the lock that was taken is one that somebody had removed
            pass
        os.close(lock)


def _key_of(root: Path) -> str | None:
    file = root / _KEY
    usable = file.is_file() and (root / _FOLDER).is_dir()  # a finished folder has moved away
    return file.read_text(encoding="utf-8") if usable else None


def _clear(root: Path) -> None:
    """Remove everything but the lock; the key first, so that no half removed work looks whole."""
    (root / _KEY).unlink(missing_ok=True)
    for entry in root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _LOCK:
            entry.unlink()
