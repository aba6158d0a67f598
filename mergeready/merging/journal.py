from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

COMMIT_BYTES = 2**28
COMMIT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known about a tensor of the result once it is written.

    Attributes:
        name: The tensor.
        change: ‖scale · merged delta‖² before rounding.
        error: ‖what rounding to the output's dtype did to it‖².
        broken: Whether values are NaN or infinite.
    """

    name: str
    change: float = 0.0
    error: float = 0.0
    broken: bool = False


class Journal:
    """Which tensors are finished, one JSON line each, so that another sitting need not do them again.

    A line is written after the tensor's values were flushed to the disk, some of them at a time since flushing is
    slow: what the journal says is true also after a power cut.

    Args:
        root: Folder of the journals, one a rank.
        rank: Whose this is.
        sync: Flushes all values that were written so far.
    """

    def __init__(self, root: Path, rank: int, sync: Callable[[], None]) -> None:
        self._sync = sync
        self._lock = threading.Lock()
        self._pending: list[Finished] = []
        self._bytes, self._since = 0, time.monotonic()
        path = root / f"finished-{rank}.jsonl"
        whole = len("".join(_whole_lines(path)).encode()) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)  # the last line may have been cut short with its writer

    @staticmethod
    def read(root: Path) -> dict[str, Finished]:
        """What all ranks of earlier sittings finished, by name."""
        lines = [line for path in sorted(root.glob("finished-*.jsonl")) for line in _whole_lines(path)]
        done = [Finished(**json.loads(line)) for line in lines]
        return {entry.name: entry for entry in done}

    def add(self, entry: Finished, nbytes: int) -> None:
        """Note a tensor of ``nbytes`` as written; from any thread."""
        with self._lock:
            self._pending.append(entry)
            self._bytes += nbytes
            if self._bytes >= COMMIT_BYTES or time.monotonic() - self._since >= COMMIT_SECONDS:
                self._commit()

    def close(self) -> None:
        """Commit what is pending."""
        with self._lock, self._file:
            self._commit()

    def _commit(self) -> None:
        self._sync()
        self._file.write("".join(json.dumps(asdict(entry)) + "\n" for entry in self._pending).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._pending, self._bytes, self._since = [], 0, time.monotonic()


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]
