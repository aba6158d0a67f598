from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from mergeready.cli.app import ExpertArgument, app, console
from mergeready.cli.evaluation import choose_evaluation
from mergeready.errors import MergeReadyError, OptionError

if TYPE_CHECKING:
    from mergeready.validation import Report

_COLOURS = {"passed": "green", "error": "red", "warning": "yellow", "info": "cyan", "not checked": "dim"}
_COULD_NOT_RUN = 2


@app.command()
def validate(
    expert: ExpertArgument,
    base: Annotated[str | None, typer.Option("-b", "--base", help="Folder or hub id of its base.")] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peers", help="Another expert on the base; may be given several times."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="module:function that takes the base and returns an Evaluation; or lm-eval:TASK,… with the expert's "
            "own task first, then those of its peers.",
        ),
    ] = None,
    eval_tasks: Annotated[
        Path | None, typer.Option(help="For --eval lm-eval:…, a folder with task files of your own.")
    ] = None,
    eval_limit: Annotated[
        int | None, typer.Option(help="For --eval lm-eval:…, examples of each task at most; all by default.")
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --eval, a folder of held-out examples that datasets reads; see --pipeline."
        ),
    ] = None,
    pipeline: Annotated[
        Literal["text-classification"] | None,
        typer.Option(help="How transformers evaluates them: accuracy, from the columns text and label."),
    ] = None,
    level: Annotated[
        Literal["file", "base", "behaviour", "composition"], typer.Option(help="The deepest level to check.")
    ] = "composition",
    fail_on: Annotated[
        Literal["error", "warning", "info"], typer.Option(help="Least severity that makes the exit code 1.")
    ] = "error",
    thresholds: Annotated[
        Path | None, typer.Option(help="YAML file with thresholds of your own; the others stay as shipped.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the report: .json, or .html for a page.")
    ] = None,
    history: Annotated[
        Path | None, typer.Option(help="history.jsonl of its training run, for the page's curves.")
    ] = None,
    card: Annotated[bool, typer.Option(help="Also write our section into the expert's README.md.")] = False,
    push: Annotated[
        str | None,
        typer.Option(help="Also upload card, report and fingerprint to this repository of the hub."),
    ] = None,
    private: Annotated[bool, typer.Option(help="Make that repository private if it does not exist.")] = False,
) -> None:
    """Check an expert before it is shared.

    Exit code 0: nothing failed; 1: something did; 2: it, or one of its checks, could not run.
    """
    from mergeready.training.history import read_history
    from mergeready.validation import validate as run_checks
    from mergeready.validation.card import write_card
    from mergeready.validation.page import write_page
    from mergeready.validation.push import push_report
    from mergeready.validation.share import fingerprint_of
    from mergeready.weights.atomic import new_file
    from mergeready.weights.open import resolve_folder

    try:
        is_page = output is not None and output.suffix == ".html"
        _require_used(output, history, push, private=private, is_page=is_page)
        if peers and base is None:
            raise OptionError("--peers are compared on the base: --base is missing.")
        run = None if history is None else read_history(history)
        if card and not Path(expert).is_dir():
            raise OptionError(
                f"--card writes into the expert's folder, and {expert} is none. Download it first."
            )
        looked_at = choose_evaluation(
            expert, base, evaluation, data=eval_data, pipeline=pipeline, tasks=eval_tasks, limit=eval_limit
        )
        report = run_checks(
            expert, base, peers=peers or (), evaluation=looked_at, level=level, thresholds=thresholds
        )
        _print_report(console(), report)
        if output is not None and is_page:
            write_page(output, report, run)
        elif output is not None:
            with new_file(output) as temporary:
                temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        if output is not None:
            _say_written(output)
        if card:
            _say_written(write_card(expert, report, base=base))
        if push is not None:
            made = None if base is None else fingerprint_of(expert, base)
            address = push_report(
                resolve_folder(expert), push, report, made, base=base, history=run, private=private
            )
            console().print(f"Uploaded to {escape(address)}", highlight=False, soft_wrap=True)
    except (MergeReadyError, OSError) as error:
        Console(stderr=True).print(
            f"[bold red]could not run:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(_COULD_NOT_RUN)
    except Exception:  # noqa: BLE001 - such as an evaluation's own code raises: no verdict on the expert
        traceback.print_exc()
        sys.exit(_COULD_NOT_RUN)
    sys.exit(report.exit_code(fail_on))


def _require_used(
    output: Path | None, history: Path | None, push: str | None, *, private: bool, is_page: bool
) -> None:
    """Refuse what would have no effect, before anything is checked."""
    if output is not None and output.suffix not in (".html", ".json"):
        raise OptionError(f"{output} must end with .html or .json.")
    if history is not None and not (is_page or push is not None):
        raise OptionError(
            "--history draws curves on a page: pass -o with a name that ends with .html, or --push."
        )
    if private and push is None:
        raise OptionError("--private is about the repository of --push, which is missing.")


def _say_written(path: Path) -> None:
    console().print(f"Wrote {escape(str(path))}", highlight=False, soft_wrap=True)


def _print_report(screen: Console, report: Report) -> None:
    from rich.table import Table

    table = Table(title=escape(report.expert), title_justify="left")
    for column in ("check", "level", "verdict", "what was found"):
        table.add_column(column, overflow="fold")
    for verdict in report.verdicts:
        severity = f" ({verdict.severity})" if verdict.status == "failed" else ""
        message = f"{escape(verdict.title)}: {escape(verdict.message)}"
        if verdict.fix:
            message += f"\n[bold]fix:[/] {escape(verdict.fix)}"
        colour = _COLOURS[verdict.severity if severity else verdict.status]
        status = f"[{colour}]{verdict.status}{severity}[/]"
        table.add_row(verdict.id, verdict.level, status, message)
    screen.print(table, highlight=False)
    screen.print(_summary(report), highlight=False)


def _summary(report: Report) -> str:
    """How many passed, failed, by severity, and were not checked."""
    counts = Counter(verdict.status for verdict in report.verdicts)
    failures = Counter(v.severity for v in report.verdicts if v.status == "failed")
    by_severity = ", ".join(
        f"{failures[s]} {s}{'s' if failures[s] > 1 and s != 'info' else ''}"
        for s in ("error", "warning", "info")
        if failures[s]
    )
    failed = f"{counts['failed']} failed" + (f" ({by_severity})" if by_severity else "")
    broken = [verdict.id for verdict in report.verdicts if verdict.could_not_run]
    unchecked = f"{counts['not checked']} not checked"
    unchecked += f" ({len(broken)} could not run: see {broken[0]})" if broken else ""
    return f"{counts['passed']} passed, {failed}, {unchecked}. {report.headline}"
