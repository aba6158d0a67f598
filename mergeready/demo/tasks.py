from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import pyarrow.parquet as parquet

_DATA = files("mergeready.demo") / "data"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Texts and their class indices."""

    texts: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, count: int | None) -> Split:
        """The first ``count`` examples; all for None."""
        return Split(self.texts[:count], self.labels[:count])


@dataclass(frozen=True)
class DemoTask:
    """A text classification task that ships with the package.

    Attributes:
        name: Short name, also of its folders.
        title: What readers see.
        label_texts: One English phrase a class, from which the zero-shot head is made.
        splits: ``train``, ``validation`` and ``test``.
    """

    name: str
    title: str
    label_texts: Sequence[str]
    splits: Mapping[str, Split]


def load_tasks() -> list[DemoTask]:
    """The demo's tasks, in the order in which their experts are trained."""
    facts = json.loads((_DATA / "tasks.json").read_text(encoding="utf-8"))
    with (_DATA / "suite.parquet").open("rb") as file:
        rows = parquet.read_table(file).to_pylist()
    tasks = []
    for name, fact in facts.items():
        splits = {
            split: Split(
                [row["text"] for row in rows if row["task"] == name and row["split"] == split],
                [row["label"] for row in rows if row["task"] == name and row["split"] == split],
            )
            for split in SPLITS
        }
        tasks.append(DemoTask(name, fact["title"], fact["label_texts"], splits))
    return tasks
