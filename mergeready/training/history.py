from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mergeready.errors import HistoryError
from mergeready.training.records import (
    ADAPTER,
    DecisionRecord,
    MetricsRecord,
    ProbeRecord,
    Record,
    SampledRecord,
    StartRecord,
)
from mergeready.weights.atomic import new_file


class History(Sequence[Record]):
    """The records of a run in order. Lives in memory; ``HistoryFile`` also keeps it on disk."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self._records = list(records)
        self._json = [_to_json(record) for record in self._records]

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def append(self, record: Record) -> None:
        """Add a record.

        Raises:
            HistoryError: If it is older than the last one.
        """
        if self._records and record.step < self._records[-1].step:
            raise HistoryError(
                f"step {record.step} cannot follow step {self._records[-1].step} in a history."
            )
        self._records.append(record)
        self._json.append(_to_json(record))

    @property
    def start(self) -> StartRecord | None:
        """The newest start record."""
        return next((r for r in reversed(self._records) if isinstance(r, StartRecord)), None)

    @property
    def probes(self) -> list[ProbeRecord]:
        """All probes."""
        return [record for record in self._records if isinstance(record, ProbeRecord)]

    @property
    def metrics(self) -> list[MetricsRecord]:
        """All measurements."""
        return [record for record in self._records if isinstance(record, MetricsRecord)]

    @property
    def sampled(self) -> list[SampledRecord]:
        """All estimates from sampled coordinates."""
        return [record for record in self._records if isinstance(record, SampledRecord)]

    @property
    def decisions(self) -> list[DecisionRecord]:
        """All decisions to stop."""
        return [record for record in self._records if isinstance(record, DecisionRecord)]

    @property
    def sign(self) -> float:
        """1 if the metric should grow, −1 if it should fall."""
        return 1.0 if self.start is None or self.start.greater_is_better else -1.0

    def merged(self, method: str) -> list[tuple[int, float]]:
        """Step and mean merged metric of every probe that ran a method."""
        return [(p.step, p.merges[method].merged) for p in self.probes if method in p.merges]

    def expert(self) -> list[tuple[int, float]]:
        """Step and expert metric of every probe."""
        return [(p.step, p.expert.value) for p in self.probes]

    def groups(self, *, merged: bool) -> list[tuple[float, list[ProbeRecord]]]:
        """Probes that can be compared with each other, in order: runs are resumed with other peers or another metric.

        Args:
            merged: Whether merges are to be compared, which depend on the peers; else experts alone.

        Returns:
            By group, ``sign`` of its metric and its probes.
        """
        found: list[tuple[float, list[ProbeRecord]]] = []
        start: StartRecord | None = None
        last: object = None
        for record in self._records:
            if isinstance(record, StartRecord):
                start = record
            elif isinstance(record, ProbeRecord):
                kind = _kind(start, record, merged=merged)
                if not found or kind != last:
                    found.append((1.0 if start is None or start.greater_is_better else -1.0, []))
                found[-1][1].append(record)
                last = kind
        return found

    def alike(self, *, merged: bool) -> tuple[float, list[ProbeRecord]]:
        """The last of :meth:`groups`: the probes that can be compared with the newest one."""
        groups = self.groups(merged=merged)
        return groups[-1] if groups else (self.sign, [])

    @property
    def methods(self) -> list[str]:
        """Labels of the methods that were probed, the leading one first."""
        probed = {label for probe in self.probes for label in probe.merges}
        declared = [r.methods for r in self._records if isinstance(r, StartRecord)]
        order = [str(method["label"]) for methods in declared for method in methods]
        return [label for label in dict.fromkeys([*order, *sorted(probed)]) if label in probed]

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-ready records; :meth:`from_json` restores them without loss.

        The same list at each call: it grows with the history.
        """
        return self._json

    @classmethod
    def from_json(cls, content: Sequence[object], what: str = "the state") -> History:
        """Rebuild a history.

        Raises:
            HistoryError: If a record is not understood.
        """
        try:
            return cls([ADAPTER.validate_python(item) for item in content])
        except ValidationError as error:
            raise HistoryError(f"{what} holds a record that cannot be understood: {error}") from error


class HistoryFile(History):
    """A history that is also a file of JSON lines, appended to and flushed record by record.

    Args:
        path: The file. It is made with the first record.
        records: What the run knows already. Lines on disk beyond that are from steps that will be trained again:
            they move to ``<name>.superseded.jsonl``, and the file equals ``records`` again.
    """

    def __init__(self, path: Path, records: Sequence[Record] = ()) -> None:
        super().__init__(records)
        self.path = path
        wanted = [_line(record) for record in records]
        # What is damaged is kept as it is.
        text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
        found = text.splitlines(keepends=True)
        if found == wanted:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(wanted))
        if found[same:]:
            with path.with_suffix(".superseded.jsonl").open(
                "a", encoding="utf-8", errors="surrogateescape"
            ) as file:
                file.writelines(line if line.endswith("\n") else line + "\n" for line in found[same:])
        with new_file(path) as temporary:
            temporary.write_text("".join(wanted), encoding="utf-8")

    def append(self, record: Record) -> None:
        super().append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
            file.flush()
            # There may be one of these at every step. Should the machine lose them, a resumed run writes them again.
            if not isinstance(record, SampledRecord):
                os.fsync(file.fileno())


def read_history(path: str | Path) -> History:
    """Read ``history.jsonl``. A last line that a crash cut short is left out.

    Raises:
        HistoryError: If another line cannot be understood.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records: list[object] = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break was cut short
        try:
            records.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise HistoryError(f"line {number} of {path} is not JSON ({error}).") from error
    return History.from_json(records, str(path))


def _kind(start: StartRecord | None, probe: ProbeRecord, *, merged: bool) -> object:
    """What a probe's figures depend on beside the weights."""
    if start is None:
        return probe.surrogate if merged else None
    metric = (start.metric, start.greater_is_better)
    peers = {label: norm for label, norm in start.peers.items() if label not in start.fingerprints}
    return (metric, probe.surrogate, peers, sorted(start.references)) if merged else metric


def _to_json(record: Record) -> dict[str, Any]:
    content: dict[str, Any] = ADAPTER.dump_python(record, mode="json")
    return content


def _line(record: Record) -> str:
    return json.dumps(_to_json(record), separators=(",", ":"), sort_keys=True, allow_nan=False) + "\n"
