"""Comparisons of a few experts as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from mergeready.metrics.all_pairs import AllPairs, EstimatedComparison
    from mergeready.metrics.compare import Comparison, Pairs

CAUTION = "These are diagnostics: they predict merged quality badly. Merge and evaluate to know."
MOST_IN_TABLES = 16
"""Experts up to which all pairs are printed."""


def print_estimates(screen: Console, comparison: EstimatedComparison) -> None:
    """All pairs."""
    _print_sizes(screen, comparison, {"norm": [f"{norm:.4g}" for norm in comparison.norms]})
    _print_pairs(screen, comparison)


def print_precision(screen: Console, pairs: AllPairs) -> None:
    """That pairs are estimates, and how exact these are."""
    import numpy as np

    found = ""
    if pairs.cosine_error is not None and pairs.sign_error is not None:
        cosine, signs = (float(np.nanmax(errors)) for errors in (pairs.cosine_error, pairs.sign_error))
        found = f", standard errors at most {cosine:.2g} (cosine) and {signs:.2g} (sign conflict)"
    screen.print(f"Estimated from fingerprints{found}.", style="dim", highlight=False)


def print_comparison(screen: Console, comparison: Comparison) -> None:
    """All pairs, exact, and figures of all experts together."""
    relative = [f"{value:.2%}" for value in comparison.relative_norms]
    norms = [f"{value:.4g}" for value in comparison.norms]
    _print_sizes(screen, comparison, {"norm": norms, "norm / base": relative})
    _print_pairs(screen, comparison)
    screen.print(
        f"Norm ratio {comparison.norm_ratio:.2f}. Sign conflict of all together {comparison.conflict_of_all:.3f}, "
        f"{comparison.conflict_normalised:.2f} times that of chance."
        if math.isfinite(comparison.norm_ratio)
        else "An expert equals its base: it has no direction to compare.",
        highlight=False,
    )


def _print_sizes(screen: Console, comparison: Pairs, columns: Mapping[str, Sequence[str]]) -> None:
    from mergeready.metrics.labels import short_labels

    table = Table(title="Task vectors", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("expert", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for index, label in enumerate(short_labels(comparison.labels)):
        table.add_row(str(index + 1), escape(label), *(values[index] for values in columns.values()))
    screen.print(table)


def _print_pairs(screen: Console, comparison: Pairs) -> None:
    print_matrix(screen, "Cosine", comparison.labels, comparison.cosine)
    print_matrix(screen, "Sign conflict (0.5 by chance)", comparison.labels, comparison.sign_conflict)


def print_matrix(
    screen: Console, title: str, labels: Sequence[str], values: Sequence[Sequence[float]]
) -> None:
    """A number for every pair of different experts, never cut off.

    Rows go by number alone where names leave no room for the numbers, and columns that do not fit stand below.
    """
    from mergeready.metrics.labels import short_labels

    cells = [["" if i == j else number(value) for j, value in enumerate(row)] for i, row in enumerate(values)]
    width = max(len(cell) for row in cells for cell in row) + 3  # two spaces and a line
    heads = [f"{index} {label}" for index, label in enumerate(short_labels(labels), 1)]
    if max(map(cell_len, heads)) + 4 + width * len(heads) > screen.width:
        heads = [str(index) for index in range(1, len(heads) + 1)]
    room = max((screen.width - 4 - max(len("expert"), *map(cell_len, heads))) // width, 1)
    screen.print(title, style="italic", highlight=False)
    for first in range(0, len(heads), room):
        columns = range(first, min(first + room, len(heads)))
        table = Table()
        table.add_column("expert", no_wrap=True)
        for index in columns:
            table.add_column(str(index + 1), justify="right", no_wrap=True, min_width=width - 3)
        for head, row in zip(heads, cells, strict=True):
            table.add_row(escape(head), *(row[index] for index in columns))
        screen.print(table)


def number(value: float) -> str:
    """Three decimals; a dash for what is not known, as for an expert that equals its base.

    >>> number(-0.0001), number(0.25), number(float("nan"))
    ('0.000', '0.250', '–')
    """
    return f"{value:z.3f}" if math.isfinite(value) else "–"
