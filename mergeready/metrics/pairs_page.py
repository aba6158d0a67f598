"""All pairs of up to 200 experts as one page to look around in: no network, no other file."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mergeready.errors import OptionError
from mergeready.metrics.all_pairs import AllPairs
from mergeready.metrics.compatible import Groups, most_compatible
from mergeready.metrics.labels import short_labels
from mergeready.weights.atomic import new_file

MOST = 200
"""Experts that a page shows: more cannot be told apart, and the file would grow with their square."""
PARTNERS = 10


def write_pairs_page(path: str | Path, pairs: AllPairs, grouped: Groups) -> Path:
    """Write a page with a heatmap of all pairs, each cell's figures, and partners for every expert.

    Args:
        path: The HTML file.
        pairs: All pairs.
        grouped: Their groups.

    Raises:
        OptionError: If there are more than 200 experts.
        OSError: If it cannot be written; an older page is left as it was then.
    """
    from jinja2 import Environment

    if len(pairs.labels) > MOST:
        raise OptionError(
            f"a page shows up to {MOST} experts, not {len(pairs.labels)}. Write a .parquet table instead."
        )
    source = (files("mergeready.metrics") / "templates" / "pairs.html").read_text(encoding="utf-8")
    data = _data(pairs, grouped)
    sizes = [len(members) for members in grouped.members()]
    similar, alone = sum(size > 1 for size in sizes), sizes.count(1)
    worst = None if pairs.cosine_error is None else float(pairs.cosine_error.max())
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(source)
        .render(data=data, labels=data["labels"], groups=similar, alone=alone, error=worst)
    )
    with new_file(Path(path)) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(path)


def _data(pairs: AllPairs, grouped: Groups) -> dict[str, Any]:
    count = len(pairs.labels)
    partners = [most_compatible(pairs.sign_conflict, pairs.cosine, i, PARTNERS) for i in range(count)]
    return {
        "labels": short_labels(pairs.labels),
        "norms": pairs.norms.tolist(),
        "cosine": _rounded(pairs.cosine),
        "sign": _rounded(pairs.sign_conflict),
        "error": None if pairs.cosine_error is None else _rounded(pairs.cosine_error),
        "group": grouped.group,
        "order": grouped.order,
        "partners": partners,
    }


def _rounded(matrix: Any) -> list[list[float | None]]:
    rows = np.asarray(matrix, dtype=np.float64).round(4).tolist()
    return [[None if math.isnan(value) else value for value in row] for row in rows]
