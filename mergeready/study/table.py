"""A study's results as rows and as Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergeready.study.cells import EXPERT
from mergeready.study.results import Contents
from mergeready.weights.atomic import new_file


def rows(contents: Contents) -> Iterator[dict[str, Any]]:
    """One row for each cell and task."""
    for cell, content in contents.items():
        for task, result in content["tasks"].items():
            test = result["test"]
            yield {
                "arm": cell.arm,
                "seed": cell.seed,
                "at": cell.at,
                "method": cell.method,
                "count": cell.count,
                "task": task,
                "step": content["steps"][task],
                "scale": content.get("scale"),
                "scale_inside": content.get("inside"),
                "validation": float(result["validation"]),
                "test": sum(test) / len(test),
                "base_test": _mean(content["base"][task]["test"]) if cell.method == EXPERT else None,
                "examples": [float(value) for value in test],
            }


def write_parquet(contents: Contents, path: Path) -> None:
    """Write the rows, in order, as one Parquet file that replaces an older one in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("arm", pa.string()),
            ("seed", pa.int64()),
            ("at", pa.string()),
            ("method", pa.string()),
            ("count", pa.int64()),
            ("task", pa.string()),
            ("step", pa.int64()),
            ("scale", pa.float64()),
            ("scale_inside", pa.bool_()),
            ("validation", pa.float64()),
            ("test", pa.float64()),
            ("base_test", pa.float64()),
            ("examples", pa.list_(pa.float64())),
        ]
    )
    with new_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows(contents)), schema=schema), temporary)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
