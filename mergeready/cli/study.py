from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from mergeready.cli.app import app, console

if TYPE_CHECKING:
    from mergeready.study.run import Runner


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="Study file, in YAML.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of results; beside the file by default.")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints; inside the results by default.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="Compute one kept cell again from scratch, and compare: arm/seed/at/method-count."),
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures", help="Only draw tables and figures from what is there.")
    ] = False,
) -> None:
    """Study what training, stopping and merging do to each other: every combination, computed once, resumable."""
    # Threads that wait by spinning halve the speed of a machine that does anything else. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mergeready.study.report import write_report
    from mergeready.study.run import Runner
    from mergeready.study.settings import load_study

    settings = load_study(file)
    screen = console()
    folder = output or file.with_suffix("")
    runner = Runner(
        settings, folder, checkpoints, lambda text: screen.print(escape(text), highlight=False, style="dim")
    )
    if only is not None:
        _rerun(runner, only)
        return
    if not figures:
        computed = runner.run()
        screen.print(f"{computed} cells computed, {runner.trained} training runs.", highlight=False)
    for path in write_report(runner):
        screen.print(escape(str(path)), highlight=False)


def _rerun(runner: Runner, only: str) -> None:
    screen = console()
    again = runner.rerun(only)
    if not again.differences:
        screen.print(f"{escape(only)}: every number is the same.", highlight=False)
        return
    screen.print(f"[bold red]{escape(only)} differs[/] in {len(again.differences)} numbers:", highlight=False)
    for line in again.differences[:20]:
        screen.print(escape(line), highlight=False)
    raise typer.Exit(1)
