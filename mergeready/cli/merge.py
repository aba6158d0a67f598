from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mergeready.cli.app import BaseArgument, ExpertsArgument, StrictOption, app, console
from mergeready.cli.options import parse_dtype, parse_numbers, parse_parameter


@app.command()
def merge(
    base: BaseArgument,
    experts: ExpertsArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)],
    method: Annotated[str, typer.Option("-m", "--method", help="Merge method.")] = "task_arithmetic",
    scale: Annotated[float, typer.Option(help="Factor on the merged delta.")] = 1.0,
    weights: Annotated[str | None, typer.Option(help="One factor an expert, such as 1,0.5.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries kept, for methods that drop some.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("-p", "--param", help="Another parameter: name=value.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Output dtype: float32, bfloat16 or float16.")] = None,
    strict: StrictOption = True,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder if it exists.")] = False,
) -> None:
    """Merge experts of one base into a model folder."""
    from mergeready.merging import make_method, merge_folders

    parameters = dict(parse_parameter(text) for text in param or [])
    if density is not None:
        parameters["density"] = density
    folder = merge_folders(
        base,
        experts,
        output,
        make_method(method, **parameters),
        scale=scale,
        weights=parse_numbers(weights),
        dtype=parse_dtype(dtype),
        strict=strict,
        overwrite=overwrite,
    )
    console().print(f"Merged {len(experts)} experts with {method} into {escape(str(folder))}/")
