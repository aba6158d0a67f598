from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from mergeready.cli.app import StrictOption, app, console
from mergeready.cli.merge_adapters import merge_into_adapter
from mergeready.cli.options import parse_bytes, parse_dtype, parse_numbers, parse_parameter
from mergeready.errors import OptionError, listing

if TYPE_CHECKING:
    from mergeready.merging.plan import MergePlan
    from mergeready.merging.recipe import MergeRecipe


@app.command()
def merge(
    base: Annotated[
        str | None, typer.Argument(help="Folder or hub id of the base.", show_default=False)
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders or hub ids of experts: full models or LoRA adapters.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="A recipe that a merge wrote, or a configuration of mergekit; instead of the options below up to "
            "`--arithmetic`. Base and experts given here replace its own.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option("-m", "--method", help="Merge method; task_arithmetic by default.", show_default=False),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Factor on the merged delta; 1 by default.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One factor an expert, such as 1,0.5; 1 each by default.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of entries kept, for methods that drop some; each has its own default."),
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("-p", "--param", help="Another parameter: name=value.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Output dtype: float32, bfloat16 or float16; the base's by default.")
    ] = None,
    arithmetic: Annotated[
        str | None, typer.Option(help="Dtype of sums: float32, the default, or float64.", show_default=False)
    ] = None,
    form: Annotated[
        str, typer.Option("--as", help="What to write: model, adapter (of PEFT) or adapterhub.")
    ] = "model",
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of an adapter, or the share of energy to keep, such as 0.9; by default what is exact.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Most memory for tensors, such as 500MB; no limit by default.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Number of threads; one a core by default.", show_default=False)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
    strict: StrictOption = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
    mergekit: Annotated[
        Path | None,
        typer.Option(help="Also write the merge as a configuration of mergekit.", show_default=False),
    ] = None,
) -> None:
    """Merge experts of one base into a model folder.

    After an interruption the same command goes on where it stopped. Started by torchrun, ranks share the work.
    """
    from mergeready.merging import merge_folders, merge_plan
    from mergeready.merging.mergekit_yaml import to_mergekit

    parameters = dict(parse_parameter(text) for text in param or [])
    parameters |= {} if density is None else {"density": density}
    given = {
        "method": method,
        "parameters": parameters or None,
        "scale": scale,
        "weights": parse_numbers(weights),
        "dtype": dtype if parse_dtype(dtype) else None,
        "arithmetic": arithmetic,
    }
    recipe = _recipe(base, experts, config, {name: v for name, v in given.items() if v is not None})
    if mergekit is not None:
        mergekit.write_text(to_mergekit(recipe), encoding="utf-8")
    options = recipe.options() | {"memory": parse_bytes(memory), "threads": threads, "strict": strict}
    out = console()
    is_model = form == "model" and rank is None
    options_of_models = {"--plan": plan, "--memory": memory is not None, "--threads": threads is not None}
    idle = [] if is_model else [name for name, is_given in options_of_models.items() if is_given]
    if idle:
        raise OptionError(
            f"{listing(idle)} is for merges into a model: leave it out, or leave out `--as` and `--rank`."
        )
    if plan:
        _print_plan(out, merge_plan(recipe.base, recipe.experts, **options))
        return
    if output is None:
        raise typer.BadParameter("name the folder to write.", param_hint="'--output'")
    if not is_model:
        merge_into_adapter(out, recipe, output, form, rank, strict=strict, overwrite=overwrite)
        return
    with _progress_bar(out) as progress:
        folder = merge_folders(
            recipe.base, recipe.experts, output, overwrite=overwrite, progress=progress, **options
        )
    out.print(f"Merged {len(recipe.experts)} experts with {recipe.method} into {escape(str(folder))}/")
    _print_rounding(out, folder)


def _recipe(
    base: str | None, experts: list[str] | None, config: Path | None, given: dict[str, Any]
) -> MergeRecipe:
    """What to merge, by a file or by options."""
    from mergeready.merging.recipe import RECIPE_NAME, MergeRecipe, read_recipe

    if config is None:
        if base is None or not experts:
            raise typer.BadParameter("name the base and at least one expert, or a `--config`.")
        return MergeRecipe(base, tuple(experts), **{"method": "task_arithmetic"} | given)
    if given:
        names = listing(f"`{name}`" for name in given)
        raise OptionError(f"{config} says how to merge: change {names} there, or leave the file out.")
    recipe = read_recipe(config)
    if base is None and config.name == RECIPE_NAME:
        _require_found(recipe, config)
    if base is not None and len(experts or ()) != len(recipe.experts):
        raise OptionError(
            f"{config} merges {len(recipe.experts)} experts, and {len(experts or ())} are given: name all or none."
        )
    return recipe if base is None else replace(recipe, base=base, experts=tuple(experts or ()))


def _require_found(recipe: MergeRecipe, config: Path) -> None:
    """A merge records its inputs by name and content, and not where they lay.

    Raises:
        OptionError: If one is neither a folder here nor a hub id.
    """
    missing = [name for name in (recipe.base, *recipe.experts) if "/" not in name and not Path(name).exists()]
    if missing:
        raise OptionError(
            f"{config} names {listing(missing)}, and not where they lie. Name base and experts, in its order, before "
            "`--config`."
        )


def _print_plan(out: Console, plan: MergePlan) -> None:
    from rich.table import Table

    inputs = Table(title="Inputs", title_justify="left")
    for column in ("", "format", "parameters", "size", "passes"):
        inputs.add_column(column, justify="left" if column in ("", "format") else "right", overflow="fold")
    for given in plan.inputs:
        size = decimal(given.nbytes)
        inputs.add_row(escape(given.label), given.format, f"{given.parameters}", size, f"{given.passes}")
    methods = Table(title="Methods", title_justify="left")
    for column in ("", "parameters", "elements", "passes"):
        methods.add_column(column, justify="right" if column else "left")
    for used in plan.methods:
        methods.add_row(used.name, f"{used.parameters}", f"{used.elements:,}", f"{used.passes}")
    outputs = Table(title="Output", title_justify="left")
    outputs.add_column("file", overflow="fold")
    outputs.add_column("size", justify="right")
    for name, size_in_bytes in plan.files.items():
        outputs.add_row(name, decimal(size_in_bytes))
    for table in (inputs, methods, outputs):
        out.print(table)
    out.print(
        f"Reads {decimal(plan.read_bytes)}, writes {decimal(plan.write_bytes)}; tensors take at most "
        f"{decimal(plan.peak_bytes)} of memory on {plan.threads} threads.",
        highlight=False,
    )


@contextmanager
def _progress_bar(out: Console) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with throughput, on a terminal."""
    if not out.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_rounding(out: Console, folder: Path) -> None:
    from mergeready.experts.record import read_record

    record = read_record(folder)
    loss = None if record is None else record["rounding"]
    if loss is None or loss["total"] < 0.001:  # nobody would see less
        return
    out.print(f"Rounding to {loss['dtype']} loses {loss['total']:.1%} of the merged change. Most in:")
    for name, share in loss["worst"].items():
        out.print(f"  {share:.1%} {escape(name)}", highlight=False)
