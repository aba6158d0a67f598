"""Writes the page on what happens when things go wrong, from measured results and the tests that show it."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import mkdocs_gen_files
import yaml
from jinja2 import Template
from matplotlib.figure import Figure

from benchmarks.lowest_versions import bounds

DOCS, RESULTS = Path("docs"), Path("benchmarks/results")


def require_test(identifier: str) -> None:
    """A row without its test would be a claim; the build fails then."""
    path, _, name = identifier.partition("::")
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if name and name not in names:
        raise ValueError(f"{identifier} does not exist")


def draw_memory(soak: dict[str, Any]) -> bytes:
    figure = Figure((7, 2.6))
    axes = figure.add_axes((0.1, 0.2, 0.87, 0.72))
    steps, values = zip(*soak["resident_bytes"], strict=True)
    axes.plot(steps, [value / 1e6 for value in values], color="#3949ab", marker="o", ms=3)
    axes.set(ylim=(0, max(values) / 1e6 * 1.15), xlabel="training step", ylabel="resident memory (MB)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceff1")
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()


faults = yaml.safe_load((DOCS / "_faults.yaml").read_text(encoding="utf-8"))
for row in faults:
    require_test(row["test"])
fuzz, soak, lowest = (
    json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("fuzz", "soak", "lowest_versions")
)
template = Template((DOCS / "_robustness.md.jinja").read_text(encoding="utf-8"))
with mkdocs_gen_files.open("robustness.md", "w") as page:
    page.write(
        template.render(
            faults=faults,
            fuzz=fuzz,
            soak=soak,
            lowest=lowest,
            raised={
                name: bound.removeprefix(">=")
                for name, bound in bounds().items()
                if bound != lowest["versions"].get(name, {}).get("bound")
            },
            passed=sum(room["passed"] for room in lowest["rooms"].values()),
            failed=sum(len(room["failed"]) for room in lowest["rooms"].values()),
            skipped=sum(room["skipped"] for room in lowest["rooms"].values()),
            inputs=sum(cell["inputs"] for cell in fuzz.values()),
            findings=sum(len(cell["findings"]) for cell in fuzz.values()),
        )
    )
with mkdocs_gen_files.open("pictures/soak.svg", "wb") as file:
    file.write(draw_memory(soak))
