from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mergeready.cli.app import app, console
from mergeready.errors import OptionError

if TYPE_CHECKING:
    from mergeready.recipes.recipe import Recipe
    from mergeready.recipes.result import RunResult


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="The recipe, a YAML file.", show_default=False)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change a setting: key=value, such as optimisation.steps=200.", show_default=False
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run: all happens, nothing is learned.")
    ] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON schema of recipes, for editors, and do nothing else."),
    ] = False,
) -> None:
    """Train as a recipe says, watched. The same command goes on after an interruption.

    A recipe can name Python functions, which are run: use recipes that you trust.
    """
    from mergeready.recipes.recipe import json_schema, read_recipe

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if recipe is None:
        raise typer.BadParameter("name a recipe.", param_hint="'RECIPE'")
    out = console()
    try:
        read = read_recipe(recipe, changes or (), quick=quick)
    except OptionError as error:
        for line in str(error).splitlines():  # one problem each
            Console(stderr=True).print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    out.print(f"{escape(str(recipe))} → {escape(read.output)}/", highlight=False)
    _print_result(read, _run(read))


def _run(recipe: Recipe) -> RunResult:
    from mergeready.recipes.quiet import quieten_libraries

    quieten_libraries()
    if recipe.team is not None:
        from mergeready.recipes.team import run_team

        return run_team(recipe)
    from mergeready.recipes.run import run_recipe

    return run_recipe(recipe)


def _print_result(recipe: Recipe, result: RunResult) -> None:
    from rich.table import Table

    out = console()
    out.print(
        f"{result.metric} after {result.steps} steps", highlight=False
    )  # a title would be cut to the table's width
    table = Table()
    table.add_column("task" if result.merged else "split", overflow="fold")
    table.add_column("expert", justify="right")
    for method, scale in result.scales.items():
        table.add_column(f"{method}\nscale {scale:g}", justify="right")
    for name, value in result.scores.items():
        merged = (scores[name] for scores in result.merged.values())
        table.add_row(escape(name), f"{value:.4f}", *(f"{score:.4f}" for score in merged))
    out.print(table)
    if result.stopped is not None:
        out.print(f"Stopped early: {escape(result.stopped)}.", highlight=False)
    for label, folder in result.picks.items():
        out.print(f"{label}: {escape(recipe.output)}/{escape(folder)}", highlight=False)
