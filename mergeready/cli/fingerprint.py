from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mergeready.cli.app import BaseOption, ExpertArgument, StrictOption, app, console, open_all


@app.command()
def fingerprint(
    expert: ExpertArgument,
    base: BaseOption,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write; NAME.fingerprint.safetensors here by default."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="How others shall call the expert; its folder's name by default.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Sampled coordinates of the whole model, 2 bytes each.")] = 2
    ** 18,
    router: Annotated[
        bool,
        typer.Option(
            "--router",
            help="Also hold what routers choose experts by: one direction of inputs a linear layer.",
        ),
    ] = False,
    strict: StrictOption = True,
) -> None:
    """Write a small file against which others can measure interference without the expert's weights."""
    from mergeready.experts.fingerprint import SUFFIX
    from mergeready.metrics.take_fingerprint import take_fingerprint
    from mergeready.training.rounding_warning import WORTH_SAYING

    opened_base, [opened] = open_all(base, [expert], strict)
    made = take_fingerprint(opened.vector, opened_base, label=label, budget=budget, router=router)
    path = made.save(output or Path(made.label + SUFFIX))
    console().print(
        f"{escape(made.label)}: norm {made.norm:.4g}, {len(made.shapes)} changed parameters, "
        f"{path.stat().st_size / 1000:.0f} kB in {escape(str(path))}",
        highlight=False,
    )
    if made.facts.get("resolution", 0) > WORTH_SAYING:
        console().print(
            f"Rounding alone would give {made.facts['resolution']:.0%} of that norm: the expert is stored in 16 bits. "
            "Take the fingerprint from finer weights if there are any.",
            highlight=False,
        )
