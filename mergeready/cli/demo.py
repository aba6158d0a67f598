from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mergeready.cli.app import app, console


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder to make.")] = Path(
        "mergeready-demo"
    ),
    quick: Annotated[bool, typer.Option(help="A smoke run: everything happens, nothing is learned.")] = False,
    joint: Annotated[
        bool, typer.Option(help="Also train one model on all tasks, as an upper bound.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """The whole story on real weights and real text: four experts, merged; a table and a picture."""
    # Threads that wait by spinning halve the speed of a machine that does anything else. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from mergeready.demo.display import LiveDisplay, results_table, verdict
    from mergeready.demo.run import run_demo
    from mergeready.demo.settings import DemoSettings

    settings = DemoSettings.quick(joint=joint, seed=seed) if quick else DemoSettings(joint=joint, seed=seed)
    screen = console()
    with LiveDisplay(screen, settings.methods[0]) as display:
        results, pictures = run_demo(output, settings, display)
    screen.print(results_table(results, screen.width))
    for line in verdict(results):
        screen.print(line, highlight=False)
    screen.print(
        f"Took {results.seconds / 60:.1f} minutes. Look at {escape(str(pictures[0]))}; "
        f"everything is in {escape(str(output))}/."
    )
