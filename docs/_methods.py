"""Writes the page of merge methods from their docstrings and the measured results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mkdocs_gen_files

from benchmarks.method_order import RESULTS, mean_and_interval
from mergeready.merging import method_class, method_names
from mergeready.merging.method import ElementwiseMethod

INTRODUCTION = """# Merge methods

A merge is `base + scale · method(τ₁, …, τ_K)`, parameter by parameter. `weights`, `scale` and overrides by group of
parameters work the same for all methods; a method's own parameters are given by name, as in
`merge(..., "ties", density=0.2)` or `-m ties -p density=0.2`.

Measured: mean test accuracy of eight text tasks after merging eight experts of MiniLM-L6, with the scale tuned for
each method on validation data. 95 % bootstrap intervals over examples, {seeds}. The experts alone reach {expert},
the base {base}.

| method | works on | accuracy, merged | best scale |
|---|---|---|---|
"""

OPTIONS = """    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: false
"""


def rows(cells: dict[str, Any]) -> tuple[dict[str, str], str, str, str]:
    step = max(int(key.split("/")[1]) for key in cells)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        name, at, _ = key.split("/")
        if int(at) == step:
            by_method.setdefault(name, []).append(cell)
    references = by_method.pop("references")
    shown = {}
    for name, found in by_method.items():
        scales = sorted({f"{cell['scale']:.3g}" for cell in found})
        shown[name] = f"{interval([list(c['accuracy'].values()) for c in found])} | {', '.join(scales)}"
    count = len(references)
    seeds = "one seed" if count == 1 else f"{count} seeds"
    expert, base = (interval([list(c[kind].values()) for c in references]) for kind in ("expert", "base"))
    return shown, seeds, expert, base


def interval(columns: list[list[list[int]]]) -> str:
    mean, low, high = mean_and_interval(columns)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


measured, seeds, expert, base = rows(json.loads(Path(RESULTS).read_text(encoding="utf-8")))
methods = {name: method_class(name) for name in method_names()}
with mkdocs_gen_files.open("methods.md", "w") as page:
    page.write(INTRODUCTION.format(seeds=seeds, expert=expert, base=base))
    unmeasured = sorted(set(methods) - set(measured))
    order = [
        *sorted(set(methods) & set(measured), key=lambda name: measured[name], reverse=True),
        *unmeasured,
    ]
    for name in order:
        kind = "elements" if issubclass(methods[name], ElementwiseMethod) else "whole parameters"
        page.write(f"| [`{name}`](#{name}) | {kind} | {measured.get(name, 'not measured here |')} |\n")
    for name in sorted(methods):
        cls = methods[name]
        page.write(f"\n## `{name}` {{ #{name} }}\n\n::: {cls.__module__}.{cls.__qualname__}\n")
        page.write(
            "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n      members: false\n"
        )
