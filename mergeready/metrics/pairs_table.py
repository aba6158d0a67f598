"""Pairs as a Parquet table, for those who want to work on with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergeready.metrics.all_pairs import AllPairs
from mergeready.weights.atomic import new_file

_ROWS_OF_A_GROUP = 2**20


def write_pairs(path: str | Path, pairs: AllPairs, groups: Sequence[int] | None = None) -> Path:
    """Write one row a pair: ``a``, ``b``, ``cosine``, ``sign_conflict``, their errors, ``norm_ratio``, ``same_group``.

    Rows are written a million at a time, so that millions of pairs need no memory of their own.

    Args:
        path: The Parquet file.
        pairs: All pairs.
        groups: The group of each expert, if known.

    Raises:
        OSError: If it cannot be written; an older file is left as it was then.
    """
    import pyarrow
    from pyarrow import parquet

    fields = [("a", pyarrow.string()), ("b", pyarrow.string())]
    fields += [
        (name, pyarrow.float32()) for name in ("cosine", "sign_conflict", "cosine_error", "sign_error")
    ]
    schema = pyarrow.schema([*fields, ("norm_ratio", pyarrow.float32()), ("same_group", pyarrow.bool_())])
    with new_file(Path(path)) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for columns in _columns(pairs, groups):
            writer.write_table(pyarrow.table(columns, schema=schema))
    return Path(path)


def _columns(pairs: AllPairs, groups: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    count = len(pairs.labels)
    height = max(_ROWS_OF_A_GROUP // count, 1)
    labels = np.array(pairs.labels, dtype=object)
    for start in range(0, count - 1, height):
        above = np.arange(start, min(start + height, count))[:, None] < np.arange(count)
        rows, columns = np.nonzero(above)
        rows += start
        unknown = np.full(len(rows), None)
        smaller = np.minimum(pairs.norms[rows], pairs.norms[columns])
        larger = np.maximum(pairs.norms[rows], pairs.norms[columns])
        yield {
            "a": labels[rows],
            "b": labels[columns],
            "cosine": _with_gaps(pairs.cosine[rows, columns]),
            "sign_conflict": _with_gaps(pairs.sign_conflict[rows, columns]),
            "cosine_error": unknown if pairs.cosine_error is None else pairs.cosine_error[rows, columns],
            "sign_error": unknown
            if pairs.sign_error is None
            else _with_gaps(pairs.sign_error[rows, columns]),
            "norm_ratio": _with_gaps(larger / np.where(smaller > 0, smaller, np.nan)),
            "same_group": unknown if groups is None else np.array(groups)[rows] == np.array(groups)[columns],
        }


def _with_gaps(values: Any) -> Any:
    """NaN as null."""
    return np.where(np.isnan(values), None, values)
