from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from mergeready.cli.app import BaseOption, ExpertArgument, app, console
from mergeready.cli.options import parse_bytes
from mergeready.errors import OptionError
from mergeready.targets import find_target

if TYPE_CHECKING:
    from torch import nn

    from mergeready.training.batches import Batches

_FEW = 100


@app.command()
def factors(
    expert: ExpertArgument,
    base: BaseOption,
    data: Annotated[
        str,
        typer.Option(
            help="module:function that takes the base and returns a model of its architecture, with the task's head, "
            "and batches of the expert's inputs.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write; NAME.factors.safetensors here by default."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="How others shall call the expert; its folder's name by default.")
    ] = None,
    at: Annotated[
        Literal["base", "expert"], typer.Option(help="Weights at which the curvature is taken.")
    ] = "base",
    draws: Annotated[int, typer.Option(help="Labels drawn from the model for each example.")] = 1,
    largest: Annotated[int, typer.Option(help="Layers with a longer side are left out.")] = 8192,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the factors in the file.")
    ] = "float32",
    memory: Annotated[str, typer.Option(help="For factors at a time; more layers mean more passes.")] = "2GB",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Write what other teams need to keep their experts out of this one's way: curvature, without any data."""
    import torch

    from mergeready.experts import Base, open_expert
    from mergeready.experts.factors import SUFFIX
    from mergeready.merging.in_place import MergedInPlace
    from mergeready.metrics.labels import own_name
    from mergeready.training.kronecker import write_factors

    opened_base = Base.open(base)
    opened = open_expert(expert, opened_base, strict=False)
    name = label or own_name(opened.label)
    model, batches = _call(data, base)
    path = output or Path(name + SUFFIX)
    weights = [1.0] if at == "expert" else [0.0]
    with MergedInPlace(model, opened_base, [opened], weights=weights, include_model=False):
        made = write_factors(
            path,
            model,
            batches,
            base=opened_base,
            draws=draws,
            largest=largest,
            label=name,
            seed=seed,
            memory=parse_bytes(memory) or 0,
            dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        )
    screen = console()
    screen.print(
        f"{escape(name)}: {len(made.layers)} layers from {made.facts['examples']} examples at the {at}, "
        f"{path.stat().st_size / 1e6:.1f} MB in {escape(str(path))}",
        highlight=False,
    )
    if made.facts["examples"] < _FEW:
        screen.print(
            f"[yellow]note:[/] the second moments of {made.facts['examples']} examples may give those away; use {_FEW} "
            "or more before you share the file.",
            highlight=False,
        )


def _call(target: str, base: str) -> tuple[nn.Module, Batches]:
    """What ``module:function`` returns."""
    from torch import nn

    made = find_target(target, "data")(base)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise OptionError(f"{target} must return a model and batches, not a {type(made).__name__}.")
    return made
