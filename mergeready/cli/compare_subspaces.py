"""Prints how experts share singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from mergeready.cli.app import open_all
from mergeready.cli.compare_tables import print_matrix
from mergeready.errors import OptionError, listing

if TYPE_CHECKING:
    from mergeready.metrics.subspaces import SubspaceComparison


def require_weights(experts: Sequence[str]) -> None:
    """Raise if one is a fingerprint, which holds no matrices.

    Raises:
        OptionError: If so.
    """
    from mergeready.experts.fingerprint import is_fingerprint

    sketches = [expert for expert in experts if is_fingerprint(expert)]
    if sketches:
        raise OptionError(
            f"--subspaces needs the weights of all experts, and {listing(sketches)} are fingerprints: leave them out."
        )


def show_subspaces(screen: Console, base: str, experts: Sequence[str], *, strict: bool) -> None:
    """Compare experts by their singular directions, and print what was found."""
    from mergeready.metrics.subspaces import compare_subspaces

    _, opened = open_all(base, list(experts), strict)
    print_subspaces(screen, compare_subspaces([expert.vector for expert in opened]))


def print_subspaces(screen: Console, found: SubspaceComparison) -> None:
    """Two tables and two sentences."""
    from rich.table import Table

    from mergeready.metrics.labels import short_labels

    labels = [escape(label) for label in short_labels(found.labels)]
    table = Table(title="Singular directions", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("expert", overflow="fold")
    for title in ("alignment with the sum", "stable rank", "effective rank"):
        table.add_column(title, justify="right")
    columns = zip(labels, found.alignment, found.stable_rank, found.effective_rank, strict=True)
    for index, (label, alignment, stable, effective) in enumerate(columns, 1):
        table.add_row(str(index), label, f"{alignment:.3f}", f"{stable:.1f}", f"{effective:.1f}")
    screen.print(table)
    print_matrix(
        screen,
        f"Overlap of leading inputs ({found.overlap_by_chance:.3f} by chance)",
        found.labels,
        found.overlap,
    )
    screen.print(
        f"Means over {found.matrices} matrices. Singular task interference of leading directions "
        f"{found.interference:.3f} of their singular values; the sum does {found.times_over:.2f} times over what the "
        "experts do.",
        highlight=False,
    )
