from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mergeready.cli.app import BaseArgument, ExpertsArgument, StrictOption, app, console, open_all
from mergeready.cli.compare_many import (
    estimate,
    find,
    print_partners,
    print_summary,
    require_tables,
    require_writable,
    show_nearest,
    write,
)
from mergeready.cli.compare_subspaces import require_weights, show_subspaces
from mergeready.cli.compare_tables import (
    CAUTION,
    MOST_IN_TABLES,
    print_comparison,
    print_estimates,
    print_precision,
)
from mergeready.errors import OptionError, listing


@app.command()
def compare(
    base: BaseArgument,
    experts: ExpertsArgument,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "-o",
            "--output",
            help="Also write this file, by its ending: heatmaps (.png, .svg, .pdf), a page to look around in (.html), "
            "or a table of pairs (.parquet). May be given several times.",
        ),
    ] = None,
    estimated: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Take fingerprints of all experts: for many of them, quick and small."
        ),
    ] = False,
    partners_of: Annotated[
        str | None, typer.Option("--partners-of", help="Also look for partners of this one of the experts.")
    ] = None,
    count: Annotated[int, typer.Option("-k", help="How many partners, or nearest experts.", min=1)] = 5,
    nearest: Annotated[
        bool,
        typer.Option(
            "--nearest",
            help="Only find the nearest experts of each, by an approximate index (needs faiss): for very many.",
        ),
    ] = False,
    subspaces: Annotated[
        bool,
        typer.Option(
            "--subspaces",
            help="Also compare singular directions. Slow: a float64 SVD of every matrix of every expert, about 2 CPU "
            "seconds an expert for a six-layer encoder of width 384, and growing with the cube of the width.",
        ),
    ] = False,
    strict: StrictOption = True,
) -> None:
    """Show how experts interfere: cosine, sign conflict and norm ratio of every pair.

    Where one is a fingerprint, all pairs are estimated from fingerprints, with standard errors for up to 200 experts.
    Started by torchrun, ranks share that work.
    """
    from mergeready.experts.fingerprint import is_fingerprint
    from mergeready.metrics.all_pairs import AllPairs
    from mergeready.metrics.compare import compare_vectors

    screen = console()
    chosen = None if partners_of is None else find(experts, partners_of)
    outputs = output or []
    _require_together(
        experts, outputs, partners_of, nearest=nearest, estimated=estimated, subspaces=subspaces
    )
    if nearest:
        show_nearest(screen, base, experts, count, outputs, strict=strict)
        return
    if estimated or any(is_fingerprint(expert) for expert in experts):
        pairs = estimate(base, experts, strict=strict)
        if len(experts) <= MOST_IN_TABLES:
            print_estimates(screen, pairs.as_lists())
        print_precision(screen, pairs)
    else:
        opened_base, opened = open_all(base, experts, strict)
        exact = compare_vectors([expert.vector for expert in opened], opened_base.source)
        pairs = AllPairs.of(exact)
        if len(experts) <= MOST_IN_TABLES:
            print_comparison(screen, exact)
    if len(experts) > MOST_IN_TABLES:
        print_summary(screen, pairs)
    if chosen is not None:
        print_partners(screen, pairs, chosen, count)
    if subspaces:
        show_subspaces(screen, base, experts, strict=strict)
    screen.print(CAUTION, style="dim")
    for path in outputs:
        if not screen.quiet:
            write(path, pairs)
            screen.print(f"Wrote {escape(str(path))}", highlight=False, soft_wrap=True)


def _require_together(
    experts: list[str],
    outputs: list[Path],
    partners_of: str | None,
    *,
    nearest: bool,
    estimated: bool,
    subspaces: bool,
) -> None:
    """Refuse what would fail or have no effect, before anything is compared."""
    if nearest:
        others = {"--partners-of": partners_of is not None, "--estimate": estimated, "--subspaces": subspaces}
        given = [name for name, is_given in others.items() if is_given]
        if given:
            raise OptionError(f"--nearest compares no pairs, so {listing(given)} cannot be had with it.")
        require_tables(outputs)
    else:
        require_writable(outputs, len(experts))
    if subspaces:
        require_weights(experts)
