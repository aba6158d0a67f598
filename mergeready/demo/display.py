from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mergeready.demo.results import DemoResults
from mergeready.demo.tasks import DemoTask
from mergeready.training.probe import OWN
from mergeready.training.records import Estimate, ProbeRecord

_WIDE = 115
"""Columns in which the final table fits as it is."""


class LiveDisplay:
    """The demo on a terminal: one bar an expert and its newest probe. Elsewhere, one line a probe.

    Args:
        console: Where to show it.
        method: The merge method whose figures are shown.
    """

    def __init__(self, console: Console, method: str) -> None:
        self._console, self._method = console, method
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._bars: dict[str, TaskID] = {}
        self._status = Text("")
        self._live = Live(self._render(), console=console, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._status = Text("")
            self._live.update(self._render(), refresh=True)
            self._live.stop()

    def _render(self) -> Group:
        return Group(self._progress, self._status)

    def _say(self, text: str) -> None:
        if self._console.is_terminal:
            self._status = Text(text, style="dim")
            self._live.update(self._render())
        else:
            self._console.print(text, highlight=False, markup=False)

    def expert_started(self, task: DemoTask, steps: int, peers: list[str]) -> None:
        self._bars[task.name] = self._progress.add_task(task.name, total=steps, note="")
        against = "peers: " + ", ".join(peers) if peers else "no peers yet: probes use surrogates"
        self._say(f"{task.name}: {task.title} ({against})")

    def stepped(self, task: DemoTask, step: int) -> None:
        self._progress.update(self._bars[task.name], completed=step)

    def probed(self, task: DemoTask, probe: ProbeRecord) -> None:
        merged = probe.merges[self._method].tasks[OWN].merged
        word = "surrogate" if probe.surrogate else "merged"
        note = f"expert {probe.expert.value:.3f}  {word} {merged.value:.3f}"
        self._progress.update(self._bars[task.name], note=note)
        if not self._console.is_terminal:
            self._say(f"  step {probe.step:>4}  {note}")

    def stopped(self, task: DemoTask, step: int, reason: str) -> None:
        self._say(
            f"{task.name}: stopped at step {step}, since {reason}. For comparison it trains on to the end."
        )

    def expert_finished(self, task: DemoTask) -> None:
        self._say("")

    def working_on(self, what: str) -> None:
        self._say(f"{what} …")


def results_table(results: DemoResults, width: int = _WIDE) -> Table:
    """The final table: one row a task, columns for base, experts, and each merge from ends and from picks.

    Args:
        results: What the demo found.
        width: Columns of the terminal; texts are broken into lines where there are few.
    """

    def narrowed(text: str) -> str:
        return text if width >= _WIDE else text.replace("_", "_\n").replace(" ", "\n")

    table = Table(title="Test accuracy", title_justify="left", caption_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("base", "expert\nat end"):
        table.add_column(column, justify="right")
    for method in results.ends:
        for when, style in (("from ends", None), ("from picks", "bold")):
            table.add_column(narrowed(f"{method}\n{when}"), justify="right", style=style)
    if results.joint is not None:
        table.add_column("joint", justify="right")
    for task in results.base:
        table.add_row(task, *(narrowed(_cell(e)) for e in _row(results, task)))
    table.add_section()
    table.add_row("mean", *(f"{value:.3f}" for value in _means(results)))
    first = next(iter(results.pick_steps.values()))
    table.caption = "; ".join(
        f"{task} {_stop(results.stopped_at[task], results.steps)}, pick {step}"
        for task, step in first.items()
    )
    return table


def verdict(results: DemoResults) -> list[str]:
    """What the numbers say, one sentence a method, whichever way they point."""
    lines = []
    for method, gain in results.gain.items():
        ends, picks = results.ends[method].mean.value, results.picks[method].mean.value
        if gain.low is None or gain.high is None or gain.low <= 0 <= gain.high:
            meaning = "no difference that these test sets can show"
        elif gain.value > 0:
            meaning = "merging the picks was better"
        else:
            meaning = "merging the fully trained ends was better: train longer"
        interval = "" if gain.low is None or gain.high is None else f" [{gain.low:+.3f}, {gain.high:+.3f}]"
        edge = (
            "" if results.ends[method].inside and results.picks[method].inside else "; a scale is at its edge"
        )
        lines.append(
            f"{method}: ends {ends:.3f}, picks {picks:.3f}, {gain.value:+.3f}{interval}: {meaning}{edge}."
        )
    return lines


def _row(results: DemoResults, task: str) -> list[Estimate]:
    cells = [results.base[task], results.experts[task]]
    for method in results.ends:
        cells += [results.ends[method].tasks[task], results.picks[method].tasks[task]]
    return cells + ([] if results.joint is None else [results.joint[task]])


def _means(results: DemoResults) -> list[float]:
    rows = [_row(results, task) for task in results.base]
    return [sum(cell.value for cell in column) / len(rows) for column in zip(*rows, strict=True)]


def _cell(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ±{(estimate.high - estimate.low) / 2:.3f}"


def _stop(step: int | None, steps: int) -> str:
    return f"not stopped in {steps} steps" if step is None else f"stopped at {step} of {steps}"
