from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from mergeready.cli.app import BaseOption, ExpertArgument, StrictOption, app, console, open_all

if TYPE_CHECKING:
    from mergeready.experts.open import Expert
    from mergeready.metrics.inspection import Inspection


@app.command()
def inspect(
    expert: ExpertArgument,
    base: BaseOption,
    strict: StrictOption = True,
) -> None:
    """Show what one expert changed: norms by layer and group, rank, sparsity."""
    from mergeready.metrics.inspection import inspect_vector

    opened_base, [opened] = open_all(base, [expert], strict)
    _print_inspection(console(), opened, inspect_vector(opened.vector, opened_base.source))


def _print_inspection(screen: Console, expert: Expert, found: Inspection) -> None:
    from rich.table import Table

    checked = {
        "recorded": "verified against its record",
        "weights": "plausible from the weights",
        "nothing": "not checked: an adapter without a record",
    }
    changed = found.norm > 0
    facts = Table(title=escape(expert.label), title_justify="left", show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("format", expert.format)
    facts.add_row("base", checked[expert.base_checked])
    facts.add_row("norm", f"{found.norm:.4g} ({found.relative_norm:.2%} of the base)")
    facts.add_row("unchanged entries", f"{found.sparsity:.1%}")
    facts.add_row("mass in top 1%", f"{found.top_mass:.1%}" if changed else "–")
    ranks = f"at most {found.rank}; stable rank {found.stable_rank:.1f} on average"
    facts.add_row("rank", ranks if changed else "–: it equals its base")
    if expert.extra:
        facts.add_row("not in the base", escape(", ".join(expert.extra)))
    for note in expert.notes:
        facts.add_row("note", escape(note))
    screen.print(facts)
    for title, values in (("group", found.groups), ("layer", found.layers)):
        table = Table()
        table.add_column(title, overflow="fold")
        table.add_column("norm", justify="right")
        table.add_column("")
        largest = max(values.values(), default=0.0)
        for name, value in sorted(values.items()) if title == "layer" else values.items():
            bar = "█" * round(30 * value / largest) if largest else ""
            table.add_row(escape(str(name)), f"{value:#.4g}" if value else "0", bar)
        if values:
            screen.print(table)
