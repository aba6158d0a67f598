"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mergeready.errors import MergeReadyError, OptionError

if TYPE_CHECKING:
    from mergeready.experts import Base
    from mergeready.experts.open import Expert
    from mergeready.metrics.compare import Comparison
    from mergeready.metrics.inspection import Inspection

app = typer.Typer(
    help="Fine-tune experts that merge well: measure, steer and verify composability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BaseArgument = Annotated[str, typer.Argument(help="Folder or hub id of the base.", show_default=False)]
ExpertsArgument = Annotated[
    list[str],
    typer.Argument(help="Folders or hub ids of experts: full models or LoRA adapters.", show_default=False),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        help="Refuse experts whose parameter names differ from the base's; otherwise leave those out."
    ),
]


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
    console = _console()
    with LiveDisplay(console, settings.methods[0]) as display:
        results, pictures = run_demo(output, settings, display)
    console.print(results_table(results))
    for line in verdict(results):
        console.print(line, highlight=False)
    console.print(
        f"Took {results.seconds / 60:.1f} minutes. Look at {escape(str(pictures[0]))}; "
        f"everything is in {escape(str(output))}/."
    )


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

    parameters = dict(_parse_parameter(text) for text in param or [])
    if density is not None:
        parameters["density"] = density
    folder = merge_folders(
        base,
        experts,
        output,
        make_method(method, **parameters),
        scale=scale,
        weights=_parse_numbers(weights),
        dtype=_parse_dtype(dtype),
        strict=strict,
        overwrite=overwrite,
    )
    _console().print(f"Merged {len(experts)} experts with {method} into {escape(str(folder))}/")


@app.command()
def compare(
    base: BaseArgument,
    experts: ExpertsArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also draw heatmaps to this file.")
    ] = None,
    strict: StrictOption = True,
) -> None:
    """Show how experts interfere: cosine, sign conflict and norm ratio of every pair."""
    from mergeready.metrics.compare import compare as compare_vectors
    from mergeready.metrics.heatmap import draw_heatmaps

    opened_base, opened = _open_all(base, experts, strict)
    comparison = compare_vectors([expert.vector for expert in opened], opened_base.source)
    _print_comparison(_console(), comparison)
    if output is not None:
        draw_heatmaps(comparison, output)
        _console().print(f"Heatmaps are in {escape(str(output))}")


@app.command()
def inspect(
    expert: Annotated[str, typer.Argument(help="Folder or hub id of the expert.", show_default=False)],
    base: Annotated[
        str, typer.Option("-b", "--base", help="Folder or hub id of its base.", show_default=False)
    ],
    strict: StrictOption = True,
) -> None:
    """Show what one expert changed: norms by layer and group, rank, sparsity."""
    from mergeready.metrics.inspection import inspect as inspect_vector

    opened_base, [opened] = _open_all(base, [expert], strict)
    _print_inspection(_console(), opened, inspect_vector(opened.vector, opened_base.source))


def main() -> None:
    """Entry point: errors that we raise on purpose become one line and exit code 1."""
    try:
        app()
    except MergeReadyError as error:
        message = escape(" ".join(str(error).splitlines()))
        Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _open_all(base: str, experts: list[str], strict: bool) -> tuple[Base, list[Expert]]:
    from mergeready.experts import Base, open_expert

    opened_base = Base.open(base)
    return opened_base, [open_expert(expert, opened_base, strict=strict) for expert in experts]


def _print_comparison(console: Console, comparison: Comparison) -> None:
    from rich.table import Table

    from mergeready.metrics.heatmap import short_labels

    labels = [escape(label) for label in short_labels(comparison.labels)]
    sizes = Table(title="Task vectors", title_justify="left")
    for column in ("", "expert", "norm", "norm / base"):
        sizes.add_column(column, justify="left" if column == "expert" else "right")
    for index, label in enumerate(labels):
        sizes.add_row(
            str(index + 1), label, f"{comparison.norms[index]:.4g}", f"{comparison.relative_norms[index]:.2%}"
        )
    console.print(sizes)
    for title, matrix in (("Cosine", comparison.cosine), ("Sign conflict", comparison.sign_conflict)):
        table = Table(title=f"{title} (0.5 by chance)" if title != "Cosine" else title, title_justify="left")
        table.add_column("expert")
        for index in range(len(labels)):
            table.add_column(str(index + 1), justify="right")
        for index, label in enumerate(labels):
            cells = ["" if other == index else f"{value:.3f}" for other, value in enumerate(matrix[index])]
            table.add_row(f"{index + 1} {label}", *cells)
        console.print(table)
    console.print(
        f"Norm ratio {comparison.norm_ratio:.2f}. Sign conflict of all together {comparison.conflict_of_all:.3f}, "
        f"{comparison.conflict_normalised:.2f} of what chance gives.",
        highlight=False,
    )
    console.print(
        "These are diagnostics: they predict merged quality badly. Merge and evaluate to know.", style="dim"
    )


def _print_inspection(console: Console, expert: Expert, found: Inspection) -> None:
    from rich.table import Table

    checked = {
        "recorded": "verified against its record",
        "weights": "plausible from the weights",
        "nothing": "not checked: an adapter without a record",
    }
    facts = Table(title=escape(expert.label), title_justify="left", show_header=False)
    facts.add_row("format", expert.format)
    facts.add_row("base", checked[expert.base_checked])
    facts.add_row("norm", f"{found.norm:.4g} ({found.relative_norm:.2%} of the base)")
    facts.add_row("unchanged entries", f"{found.sparsity:.1%}")
    facts.add_row("mass in top 1 %", f"{found.top_mass:.1%}")
    facts.add_row("rank", f"at most {found.rank}; stable rank {found.stable_rank:.1f} on average")
    if expert.extra:
        facts.add_row("not in the base", escape(", ".join(expert.extra)))
    console.print(facts)
    for title, values in (("group", found.groups), ("layer", found.layers)):
        table = Table()
        table.add_column(title)
        table.add_column("norm", justify="right")
        table.add_column("")
        largest = max(values.values(), default=0.0)
        for name, value in sorted(values.items()) if title == "layer" else values.items():
            bar = "█" * round(30 * value / largest) if largest else ""
            table.add_row(escape(str(name)), f"{value:.4g}", bar)
        if values:
            console.print(table)


def _parse_parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise OptionError(f"{text!r} is not of the form name=value.")
    for convert in (int, float):
        try:
            return name, convert(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False}.get(value.lower(), value)


def _parse_numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"{text!r} is not a list of numbers such as 1,0.5.") from error


def _parse_dtype(text: str | None) -> Any:
    import torch

    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text is not None and text not in names:
        raise OptionError(f"`dtype` must be one of {', '.join(names)}, not {text}.")
    return None if text is None else names[text]
