"""What benchmarks/walkthrough.py measured, as curves and as sections of the pages in recipes/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mergeready.training.figures import EXPERT_COLOR, draw_curve
from mergeready.training.history import History, read_history

START, END = "<!-- measured: python -m benchmarks.walkthrough -->", "<!-- end of what was measured -->"
_HEIGHT, _WIDTH, _MOST = 2.6, 4.4, 4


def draw(figure: Figure, output: Path) -> None:
    """Draw a finished run: a curve a merge method, of a team one a member, and the loss where nothing was merged.

    Args:
        figure: An empty figure.
        output: The run's folder.
    """
    metric = json.loads((output / "result.json").read_text(encoding="utf-8"))["metric"]
    panels = _panels(output)
    columns = min(len(panels), 2) or 1
    rows = -(-len(panels) // columns) or 1
    figure.set_size_inches(_WIDTH * columns, _HEIGHT * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    if not panels:
        _draw_loss(grid[0][0], output)
    for axes, (title, history, method) in zip(grid.flat, panels, strict=False):
        draw_curve(axes, history, method)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("training step")
    if panels:
        for row in grid:
            row[0].set_ylabel(metric)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=9)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / (_HEIGHT * rows)))


def _panels(output: Path) -> list[tuple[str, History, str]]:
    own = output / "mergeready" / "history.jsonl"
    if own.is_file():
        history = read_history(own)
        methods = list(history.probes[0].merges) if history.probes else []
        return [(method, history, method) for method in methods][:_MOST]
    members = sorted(output.glob("*/mergeready/history.jsonl"))
    histories = [(path.parents[1].name, read_history(path)) for path in members]
    return [
        (f"{name}: {method}", history, method)
        for name, history in histories
        for method in list(history.probes[0].merges)[:2]
    ]


def _draw_loss(axes: Any, output: Path) -> None:
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    log = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    steps, losses = zip(*((entry["step"], entry["loss"]) for entry in log if "loss" in entry), strict=True)
    axes.plot(steps, losses, "-o", color=EXPERT_COLOR, markersize=3.5, linewidth=1.6)
    axes.set(xlabel="training step", ylabel="training loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_pages(root: Path, content: dict[str, Any]) -> None:
    """Write the measured part of every page in recipes/."""
    for page in sorted((root / "recipes").glob("*/README.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(with_measured(text, page.parent.name, content), encoding="utf-8")


def with_measured(text: str, folder: str, content: dict[str, Any]) -> str:
    """A page with its measured part as the results say.

    Raises:
        ValueError: If the page has no place for it.
    """
    part = f"{START}\n{_section(folder, content)}{END}"
    changed, count = re.subn(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: part, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"recipes/{folder}/README.md needs {START} and {END}, once each")
    return changed


def _section(folder: str, content: dict[str, Any]) -> str:
    runs = content["runs"]
    quick = {name: cell for name, cell in runs.items() if name.endswith(".yaml --quick")}
    lines = [f"CPU seconds on one thread ({content['machine']}).\n"]
    for name, cell in quick.items():
        path = name.removesuffix(" --quick")
        if Path(path).parent.name != folder:
            continue
        lines.append(f"### `{Path(path).name}`\n")
        longer = runs.get(path)
        if longer is not None and not _as_it_is(path, longer):
            lines.append(
                "Shown is a tiny random model of the same architecture on data that come with mergeready: what is"
                " recorded and drawn, not how the real model merges.\n"
            )
            lines.append(f"```console\n{_folded(longer['command'])}\n```\n")
        lines.append("| run | steps | CPU seconds | result |\n|---|---|---|---|")
        if longer is not None:
            kind, result = "as it is" if _as_it_is(path, longer) else "shown here", longer["result"]
            lines.append(f"| {kind} | {result['steps']} | {longer['cpu_seconds']:.0f} | {_outcome(result)} |")
        lines.append(f"| `--quick` | 4 | {cell['cpu_seconds']:.0f} | |\n")
        if longer is not None:
            lines.append(f"![What {Path(path).name} records]({Path(path).stem}.svg)\n")
    return "\n".join(lines)


def _as_it_is(path: str, cell: dict[str, Any]) -> bool:
    return bool(cell["command"] == f"mergeready train {path}")


def _folded(command: str) -> str:
    """A command over several lines, an option each."""
    return command.replace(" --set ", " \\\n  --set ")


def _outcome(result: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.3f}" for name, value in result["scores"].items())
    merged = "".join(
        f"; {method} at scale {result['scales'][method]:.2f}: mean {values['mean']:.3f}"
        for method, values in result["merged"].items()
    )
    stopped = f"; stopped: {result['stopped']}" if result["stopped"] else ""
    return f"{result['metric']}: {scores}{merged}{stopped}"
