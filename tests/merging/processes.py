"""Processes of their own for tests: ones that may be killed, and ones that share a merge."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mergeready.errors import MergeReadyError
from mergeready.merging import folders, journal
from tests.ranks import CONTEXT


def start(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def run(target: Callable[..., Any], *arguments: Any) -> int | None:
    """Exit code of a process that does one thing."""
    process = start(target, *arguments)
    process.join(60)
    return process.exitcode


def run_ranks(count: int, target: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """Exit codes of processes that torchrun would have started."""
    with socket.socket() as held:
        # Bound and not listening, it leaves its port to the rank that asks for it by number, and to nobody else.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        processes = [start(_as_rank, rank, count, port, target, arguments) for rank in range(count)]
        for process in processes:
            process.join(60)
    return [process.exitcode for process in processes]


def _as_rank(
    rank: int, count: int, port: int, target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    target(*arguments)


class Fuse:
    """Counts what a process does to files, and kills it before a given one."""

    def __init__(self, limit: int | None) -> None:
        self.count, self.limit = 0, limit
        for owner, names in (
            (os, ("pwrite", "fsync", "mkdir", "rmdir")),
            (Path, ("rename", "replace", "unlink")),
        ):
            for name in names:
                setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.count == self.limit:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return real(*arguments, **options)

        return call


def merge_with_fuse(
    limit: int | None, report: Path | None, folder: Path, output: Path, options: dict[str, Any]
) -> None:
    """Merge ``base`` and ``expert-*`` of a folder; each tensor is committed by itself."""
    journal.COMMIT_BYTES = 1
    fuse = Fuse(limit)
    folders.merge_folders(folder / "base", sorted(folder.glob("expert-*")), output, **options)
    if report is not None:
        report.write_text(str(fuse.count))


def merge_or_say(folder: Path, output: Path, said: Path, options: dict[str, Any]) -> None:
    """Merge, and write the error if there is one."""
    try:
        folders.merge_folders(folder / "base", sorted(folder.glob("expert-*")), output, **options)
    except MergeReadyError as error:
        rank = os.environ.get("RANK", "0")
        said.with_name(said.name + rank).write_text(f"{type(error).__name__}: {error}")


def leave_the_journal(folder: Path, output: Path, options: dict[str, Any]) -> None:
    real = folders._write_rest

    def copy_first(job: Any, made: Path, entries: Any) -> None:
        for path in made.parent.glob("finished-*"):
            shutil.copy(path, output.parent)
        real(job, made, entries)

    folders._write_rest = copy_first
    merge_or_say(folder, output, output.parent / "said", options)


def fail_on_one(folder: Path, output: Path, said: Path, options: dict[str, Any]) -> None:
    if os.environ["RANK"] == "1":

        def fail(*_: Any) -> int:
            raise OSError("disk on fire")

        os.pwrite = fail
    merge_or_say(folder, output, said, options)


def merge_by_rank(folder: Path, output: Path, said: Path) -> None:
    merge_or_say(folder, output, said, {"scale": 1.0 + int(os.environ["RANK"])})


def die_on_one(victim: int, folder: Path, output: Path, said: Path, options: dict[str, Any]) -> None:
    if int(os.environ["RANK"]) == victim:
        merge_with_fuse(60, None, folder, output, options)
    merge_or_say(folder, output, said, options)
