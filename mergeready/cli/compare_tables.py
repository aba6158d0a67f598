"""Comparisons of a few experts as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
        f"{comparison.conflict_normalised:.2f} of what chance gives.",
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
    from mergeready.metrics.labels import short_labels

    for title, matrix in (("Cosine", comparison.cosine), ("Sign conflict", comparison.sign_conflict)):
        table = Table(title=f"{title} (0.5 by chance)" if title != "Cosine" else title, title_justify="left")
        table.add_column("expert", overflow="fold")
        for index in range(len(comparison.labels)):
            table.add_column(str(index + 1), justify="right")
        for index, label in enumerate(short_labels(comparison.labels)):
            cells = ["" if other == index else f"{value:z.3f}" for other, value in enumerate(matrix[index])]
            table.add_row(f"{index + 1} {escape(label)}", *cells)
        screen.print(table)
