from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from filecmp import cmp
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergeready.errors import LostRankError, OptionError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike
from mergeready.experts.record import write_record
from mergeready.merging.double import Arithmetic, in_arithmetic
from mergeready.merging.inputs import job_key
from mergeready.merging.journal import Finished, Journal
from mergeready.merging.parameter import add_delta, all_finite, merged_chunks, raise_if_broken
from mergeready.merging.plan import MergeJob
from mergeready.merging.provenance import public, write_card, write_recipe
from mergeready.merging.ranks import open_ranks
from mergeready.merging.registry import MethodLike
from mergeready.merging.rounding import RoundingLoss, rounding_sums
from mergeready.merging.statistics import Statistics, merged_statistic
from mergeready.merging.workers import run_bounded
from mergeready.weights.json_file import read_json_object
from mergeready.weights.layout import DEFAULT_SHARD_BYTES, FolderLayout
from mergeready.weights.open import WeightsLike
from mergeready.weights.ranks import Ranks
from mergeready.weights.resumable import Workspace, resumable_folder
from mergeready.weights.source import chunk_ranges, is_mergeable
from mergeready.weights.writer import PieceWriter, copy_companions, module_weights

Progress = Callable[[int, int], None]
"""Called from any thread, one call at a time, with bytes moved so far and bytes to move."""

_STOP = "stop"
_CONFIG_NAME = "config.json"


def merge_folders(
    base: WeightsLike | Base,
    experts: Sequence[ExpertLike],
    output: str | Path,
    method: MethodLike = "task_arithmetic",
    *,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    arithmetic: Arithmetic = "float32",
    statistics: Statistics = "base",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = True,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    memory: int | None = None,
    threads: int | None = None,
    distributed: bool | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Path:
    """Merge experts into a model folder, parameter by parameter, in bounded memory.

    Everything is opened and checked before the first byte is written; the folder appears when it is complete. The
    result's bytes depend on inputs and settings alone: not on threads, ranks, memory, or how often the merge was
    interrupted. If the process dies or is interrupted, the same call goes on where it stopped.

    Args:
        base: The base that all experts started from.
        experts: Experts of any kind that ``open_expert`` understands.
        output: The folder to make; it must not contain an input's folder.
        method: A method's name or a method with its parameters.
        scale: Factor on the merged delta.
        weights: One factor an expert; 1 each by default.
        dtype: Floating dtype of merged parameters; the base's own by default.
        arithmetic: Dtype of sums, ``float32`` or ``float64``.
        statistics: Where running statistics come from: ``base``, or the ``average`` over full experts.
        overrides: What differs for groups of parameters; see ``MergeSettings.make``.
        strict: See ``open_expert``.
        overwrite: Replace ``output`` if it exists.
        shard_bytes: Upper size of one file in bytes.
        memory: Most memory in bytes that tensors may take together, so that fewer parameters are merged at a time.
        threads: Number of threads; one a core by default.
        distributed: Whether to share the work with the other ranks; see ``open_ranks``. All ranks must call then,
            with paths that lead to the same files.
        progress: Told how many bytes have been moved, and of how many. On a rank, of its own part.
        **parameters: The method's parameters, such as ``density=0.2``.

    Returns:
        The path of the folder.

    Raises:
        MergeReadyError: One of the kinds that ``open_expert`` lists; ``OutputExistsError``; ``OptionError``;
            ``NonFiniteError`` if the result would hold NaN or infinite values; ``BusyError`` if another process is
            making the same folder. Nothing is left behind then. ``LostRankError`` if another rank died.
    """
    output = Path(output)
    with open_ranks(distributed) as ranks:
        with ranks.together():
            job = MergeJob.make(
                base,
                experts,
                method,
                scale=scale,
                weights=weights,
                overrides=overrides,
                dtype=dtype,
                arithmetic=arithmetic,
                statistics=statistics,
                strict=strict,
                shard_bytes=shard_bytes,
                memory=memory,
                threads=threads,
                **parameters,
            )
            require_apart(output, [job.base.folder, *(expert.folder for expert in job.experts)])
            if strict:
                _require_modules_of_the_base(job)
            _config_of_result(job)  # to fail before work is done, not after
            key = job_key(job)
        _require_same(ranks, job, key)
        with _shared_workspace(ranks, output, key, overwrite, job.layout) as workspace:
            _merge(job, ranks, workspace, memory, progress)
    return output


def require_apart(output: Path, inputs: Sequence[Path | None]) -> None:
    """Refuse an output whose replacement would delete what is being read.

    Raises:
        OptionError: If an input lies inside it.
    """
    for folder in inputs:
        if folder is not None and output.resolve() in folder.resolve().parents:
            raise OptionError(
                f"{output} holds {folder}, which is an input of this merge. Name another output."
            )


def _require_modules_of_the_base(job: MergeJob) -> None:
    """Refuse experts that trained weights which lie beside the model's own and come from the base.

    Raises:
        UnsupportedError: If there are any.
    """
    for expert in job.experts:
        if job.base.folder is None or expert.folder is None:
            continue
        pairs = {
            file: (job.base.folder / file, expert.folder / file) for file in module_weights(expert.folder)
        }
        trained = [
            f for f, (old, new) in pairs.items() if not old.is_file() or not cmp(old, new, shallow=False)
        ]
        if trained:
            raise UnsupportedError(
                f"{expert.label} has weights of its own in {listing(map(str, trained))}. Modules of a sentence "
                "encoder beside its transformer are not merged: pass strict=False to keep the base's."
            )


def _require_same(ranks: Ranks, job: MergeJob, key: str | None) -> None:
    facts = key or json.dumps([job.base.identity.fingerprint, job.settings.describe()], default=str)
    if len(set(ranks.each(facts))) > 1:
        raise OptionError("ranks were given different inputs or settings. Start all with the same arguments.")


@contextmanager
def _shared_workspace(
    ranks: Ranks, output: Path, key: str | None, overwrite: bool, layout: FolderLayout
) -> Iterator[Workspace]:
    """The output's workspace with its files made: entered and left by the first rank, known to all."""
    with ExitStack() as stack:
        workspace = Workspace.beside(output)
        with ranks.together():
            if ranks.is_first:
                workspace = stack.enter_context(resumable_folder(output, key, overwrite=overwrite))
                _set_up(workspace, key, layout)
        yield workspace
        with ranks.together():
            stack.close()


def _set_up(workspace: Workspace, key: str | None, layout: FolderLayout) -> None:
    (workspace.root / _STOP).unlink(missing_ok=True)
    if not workspace.resumed:
        layout.create(workspace.folder)
        if key is not None:
            workspace.set_key(key)


def _merge(
    job: MergeJob, ranks: Ranks, workspace: Workspace, memory: int | None, progress: Progress | None
) -> None:
    done = Journal.read(workspace.root)
    mine = _share(job, ranks)

    with ranks.together():
        try:
            part = _Worker(job, workspace, ranks.rank, mine, done, progress).run(memory)
        except BaseException:
            (workspace.root / _STOP).touch()  # so that other ranks need not finish first
            raise
    parts = ranks.each(part)
    finished = {entry.name: entry for part in parts for entry in part}
    names = list(job.layout.infos)
    if len(finished) < len(names):
        raise LostRankError(
            "another rank of this merge stopped. The same command continues where it stopped."
        )
    entries = [finished[name] for name in names]
    raise_if_broken(
        [entry.name for entry in entries if entry.broken], [expert.vector for expert in job.experts]
    )
    if ranks.is_first:
        _write_rest(job, workspace.folder, entries)


def _share(job: MergeJob, ranks: Ranks) -> list[str]:
    """The tensors that a rank writes: whole files where there are enough, the next always to whom has least."""
    files = [list(file.offsets) for file in job.layout.files]
    units = files if len(files) >= ranks.size else [[name] for names in files for name in names]
    loads, shares = [0] * ranks.size, [list[str]() for _ in range(ranks.size)]
    for unit in units:
        rank = loads.index(min(loads))
        loads[rank] += sum(job.layout.infos[name].nbytes for name in unit)
        shares[rank] += unit
    return shares[ranks.rank]


class _Worker:
    """One rank's part of a merge."""

    def __init__(
        self,
        job: MergeJob,
        workspace: Workspace,
        rank: int,
        names: Sequence[str],
        done: Mapping[str, Finished],
        progress: Progress | None,
    ) -> None:
        self._job, self._workspace, self._rank = job, workspace, rank
        self._vectors = [expert.vector for expert in job.experts]
        self._finished = {name: done[name] for name in names if name in done}
        self._todo = [name for name in names if name not in done]
        self._progress = _Meter(job, names, self._finished, progress)

    def run(self, memory: int | None) -> list[Finished]:
        plan = self._job.plan
        with ExitStack() as stack:
            self._writer = stack.enter_context(PieceWriter(self._workspace.folder, self._job.layout))
            self._journal = Journal(self._workspace.root, self._rank, self._writer.sync)
            stack.callback(self._journal.close)
            jobs = ((plan.needs[name], partial(self._do, name)) for name in self._todo)
            run_bounded(jobs, threads=plan.threads, memory=memory)
        return list(self._finished.values())

    def _do(self, name: str) -> None:
        if (self._workspace.root / _STOP).exists():
            return
        entry = self._merge_one(name)
        self._writer.require_whole([name])
        self._finished[name] = entry
        self._journal.add(entry, self._job.layout.infos[name].nbytes)

    def _merge_one(self, name: str) -> Finished:
        job = self._job
        source = job.base.source
        info, out = source.infos[name], job.layout.infos[name].dtype
        if not is_mergeable(name, info):
            self._write(name, merged_statistic(name, source, job.experts, job.statistics), 0)
            return Finished(name)
        setting = job.settings.at(name)
        method = in_arithmetic(job.arithmetic, setting.method)
        change, error, broken, written = 0.0, 0.0, False, False
        for start, stop, delta in merged_chunks(method, name, info, self._vectors, setting.weights):
            original = source.read_flat(name, start, stop)
            merged = add_delta(original, delta, setting.scale, out)
            moved, lost = rounding_sums(original, delta, setting.scale, merged)
            change, error, written = change + moved, error + lost, True
            broken = broken or not all_finite(merged)
            self._write(name, merged, start)
        for start, stop in chunk_ranges(info) if not written else ():
            kept = source.read_flat(name, start, stop).to(out)
            broken = broken or not all_finite(kept)
            self._write(name, kept, start)
        return Finished(name, change, error, broken)

    def _write(self, name: str, values: torch.Tensor, start: int) -> None:
        self._writer.write(name, values, start)
        self._progress.add(values.numel() * self._job.layout.infos[name].dtype.itemsize)


class _Meter:
    """Counts written bytes and tells them as bytes moved: reading takes its share of the time evenly."""

    def __init__(
        self, job: MergeJob, names: Sequence[str], finished: Mapping[str, Finished], told: Progress | None
    ) -> None:
        infos, plan = job.layout.infos, job.plan
        self._whole = max(sum(infos[name].nbytes for name in names), 1)
        self._written = 0
        self._factor = (plan.read_bytes + plan.write_bytes) / max(plan.write_bytes, 1)
        self._told, self._lock = told, threading.Lock()
        self.add(sum(infos[name].nbytes for name in finished))

    def add(self, nbytes: int) -> None:
        if self._told is not None:
            with self._lock:
                self._written += nbytes
                self._told(int(self._written * self._factor), int(self._whole * self._factor))


def _write_rest(job: MergeJob, folder: Path, entries: Sequence[Finished]) -> None:
    """Everything but the weights."""
    if job.base.folder is not None:
        copy_companions(job.base.folder, folder)
    job.layout.write_index(folder)
    facts = public(job.settings.describe()) | {"experts": len(job.experts)}
    dtypes = [job.layout.infos[entry.name].dtype for entry in entries if entry.change]
    rounding = RoundingLoss.of(entries, dtypes)
    write_record(folder, job.base.identity, merge=facts, rounding=rounding.describe())
    write_recipe(folder, job)
    write_card(folder, job, rounding)
    config = _config_of_result(job)
    if config is not None:
        (folder / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config_of_result(job: MergeJob) -> dict[str, Any] | None:
    """The model's configuration with the output's dtype; None where the base's can be copied as it is.

    Raises:
        FormatError: If the base's cannot be read.
    """
    if job.dtype is None or job.base.folder is None or not (job.base.folder / _CONFIG_NAME).is_file():
        return None
    config = read_json_object(job.base.folder / _CONFIG_NAME)
    return {**config, "dtype" if "dtype" in config else "torch_dtype": str(job.dtype).removeprefix("torch.")}
