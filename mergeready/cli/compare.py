from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mergeready.cli.app import BaseArgument, ExpertsArgument, StrictOption, app, console, open_all

if TYPE_CHECKING:
    from mergeready.metrics.all_pairs import EstimatedComparison
    from mergeready.metrics.compare import Comparison, Pairs

_CAUTION = "These are diagnostics: they predict merged quality badly. Merge and evaluate to know."


@app.command()
def compare(
    base: BaseArgument,
    experts: ExpertsArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also draw heatmaps to this file.")
    ] = None,
    strict: StrictOption = True,
) -> None:
    """Show how experts interfere: cosine, sign conflict and norm ratio of every pair.

    Where one is a fingerprint, all pairs are estimated from fingerprints.
    """
    from mergeready.experts.fingerprint import is_fingerprint
    from mergeready.metrics.compare import compare_vectors
    from mergeready.metrics.heatmap import draw_heatmaps

    if any(is_fingerprint(expert) for expert in experts):
        comparison: Pairs = _estimated(base, experts, strict)
        _print_estimates(console(), comparison)
    else:
        opened_base, opened = open_all(base, experts, strict)
        comparison = exact = compare_vectors([expert.vector for expert in opened], opened_base.source)
        _print_comparison(console(), exact)
    if output is not None:
        draw_heatmaps(comparison, output)
        console().print(f"Heatmaps are in {escape(str(output))}")


def _estimated(base: str, experts: list[str], strict: bool) -> EstimatedComparison:
    from mergeready.experts import Base, open_expert
    from mergeready.experts.fingerprint import is_fingerprint, open_fingerprint
    from mergeready.metrics.all_pairs import compare_fingerprints
    from mergeready.metrics.take_fingerprint import take_fingerprint

    opened_base = Base.open(base)
    loaded = {expert: open_fingerprint(expert, opened_base) for expert in experts if is_fingerprint(expert)}
    budget = min(made.budget for made in loaded.values())
    for expert in experts:
        if expert not in loaded:
            opened = open_expert(expert, opened_base, strict=strict)
            loaded[expert] = take_fingerprint(opened.vector, opened_base, budget=budget, subspaces=False)
    return compare_fingerprints([loaded[expert] for expert in experts])


def _print_estimates(screen: Console, comparison: Pairs) -> None:
    _print_sizes(screen, comparison, {"norm": [f"{norm:.4g}" for norm in comparison.norms]})
    _print_pairs(screen, comparison)
    screen.print("Estimated from fingerprints. ", end="", style="dim")
    screen.print(_CAUTION, style="dim")


def _print_comparison(screen: Console, comparison: Comparison) -> None:
    relative = [f"{value:.2%}" for value in comparison.relative_norms]
    norms = [f"{value:.4g}" for value in comparison.norms]
    _print_sizes(screen, comparison, {"norm": norms, "norm / base": relative})
    _print_pairs(screen, comparison)
    screen.print(
        f"Norm ratio {comparison.norm_ratio:.2f}. Sign conflict of all together {comparison.conflict_of_all:.3f}, "
        f"{comparison.conflict_normalised:.2f} of what chance gives.",
        highlight=False,
    )
    screen.print(_CAUTION, style="dim")


def _print_sizes(screen: Console, comparison: Pairs, columns: Mapping[str, Sequence[str]]) -> None:
    from rich.table import Table

    from mergeready.metrics.heatmap import short_labels

    table = Table(title="Task vectors", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("expert")
    for column in columns:
        table.add_column(column, justify="right")
    for index, label in enumerate(short_labels(comparison.labels)):
        table.add_row(str(index + 1), escape(label), *(values[index] for values in columns.values()))
    screen.print(table)


def _print_pairs(screen: Console, comparison: Pairs) -> None:
    from rich.table import Table

    from mergeready.metrics.heatmap import short_labels

    for title, matrix in (("Cosine", comparison.cosine), ("Sign conflict", comparison.sign_conflict)):
        table = Table(title=f"{title} (0.5 by chance)" if title != "Cosine" else title, title_justify="left")
        table.add_column("expert")
        for index in range(len(comparison.labels)):
            table.add_column(str(index + 1), justify="right")
        for index, label in enumerate(short_labels(comparison.labels)):
            cells = ["" if other == index else f"{value:.3f}" for other, value in enumerate(matrix[index])]
            table.add_row(f"{index + 1} {escape(label)}", *cells)
        screen.print(table)
