"""How good each merge method is on the text suite, with its scale tuned on validation data.

    python -m benchmarks.method_order              # trains what is missing, fills benchmarks/results/method_order.json
    python -m benchmarks.method_order --table      # only rewrites the table from what is there

One expert a task; all are merged into one encoder. The scale of each method is searched on validation examples by
``mergeready.tune_scale``, and accuracy is reported on test examples that nothing was chosen on. Each cell (method,
step, seed) is computed once and kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.suites.backbones import minilm_l6
from benchmarks.suites.text import TEXT_SUITE, load_text_task
from benchmarks.text_experts import ExpertSpec, accuracy_on, encoder, train_expert
from benchmarks.text_methods import UNTUNED, text_merge
from mergeready import MergedInPlace, tune_scale
from mergeready.weights.atomic import new_file

RESULTS = Path(__file__).parent / "results" / "method_order.json"
TABLE = RESULTS.with_suffix(".md")
VALIDATION, TEST = 150, 400
SCALES = (0.3, 0.5, 0.8)
METHODS = (
    "average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
    "consensus", "pcb", "sce", "model_stock", "tsv_m", "iso_c", "iso_cts", "wudi", "knots", "svc",
    "fisher", "regmean", "regmean_pp", "adamerging",
)  # fmt: skip

PUBLISHED = (
    ("average", "task_arithmetic", "2212.04089"), ("task_arithmetic", "ties", "2306.01708"),
    ("ties", "dare_ties", "2311.03099"), ("dare_ties", "della", "2406.11617"),
    ("task_arithmetic", "breadcrumbs", "2312.06795"), ("task_arithmetic", "consensus", "2405.07813"),
    ("ties", "pcb", "2410.02396"), ("task_arithmetic", "svc", "2602.05536"),
    ("consensus", "tsv_m", "2412.00081"), ("tsv_m", "iso_c", "2502.04959"), ("iso_c", "iso_cts", "2502.04959"),
    ("task_arithmetic", "wudi", "2503.08099"), ("average", "fisher", "2111.09832"),
    ("average", "regmean", "2212.09849"), ("regmean", "regmean_pp", "2508.03121"),
    ("task_arithmetic", "adamerging", "2310.02575"),
)  # fmt: skip
"""Which method is better than which, and the paper that says so."""

NOTES = """
`core_space` is not among them: it merges LoRA experts, and on whole ones it is its inner method. `knots` was published
for LoRA experts, `model_stock` for experts of one task, `slerp` for two experts.
"""


class Suite:
    """The tasks, their evaluations and experts for one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tasks = {
            name: load_text_task(name, validation=VALIDATION, test=TEST, seed=seed) for name in TEXT_SUITE
        }
        self.validation = {name: accuracy_on(name, task.validation) for name, task in self.tasks.items()}
        self.test = {name: accuracy_on(name, task.test) for name, task in self.tasks.items()}
        self.specs = [ExpertSpec(task=name, seed=seed) for name in TEXT_SUITE]

    def experts(self, step: int) -> list[Path]:
        """Their weights after ``step`` steps, trained if need be."""
        for spec in self.specs:
            train_expert(spec)
        return [spec.checkpoint(step) for spec in self.specs]


def references(suite: Suite, step: int) -> dict[str, Any]:
    """Test accuracy of the base, and of each expert on its own task."""
    base, own = {}, {}
    model, experts = encoder(), suite.experts(step)
    with torch.no_grad():
        for name, path in zip(TEXT_SUITE, experts, strict=True):
            base[name] = _score(suite, name, model.eval())
            with MergedInPlace(model, minilm_l6(), [path], include_model=False):
                own[name] = _score(suite, name, model.eval())
    return {"base": base, "expert": own}


def merged(suite: Suite, method: str, step: int) -> dict[str, Any]:
    """Tune a method's scale on validation data, and test it there."""
    began = time.process_time()
    model, experts = encoder(), suite.experts(step)
    merge = text_merge(method, experts, list(suite.tasks.values()), suite.seed)
    scale, inside, tried = 1.0, True, {}
    if method not in UNTUNED:
        tuned = tune_scale(
            model, minilm_l6(), experts, suite.validation, merge.method,
            scales=SCALES, max_evaluations=10, **merge.options,
        )  # fmt: skip
        scale, inside, tried = tuned.scale, tuned.inside, dict(tuned.tried)
    with (
        torch.no_grad(),
        MergedInPlace(
            model, minilm_l6(), experts, merge.method,
            scale=scale, include_model=False, **merge.options,
        ),
    ):  # fmt: skip
        scores = {name: _score(suite, name, model.eval()) for name in TEXT_SUITE}
    return {
        "scale": scale,
        "inside": inside,
        "tried": {f"{key:.4g}": value for key, value in tried.items()},
        "accuracy": scores,
        "cpu_seconds": time.process_time() - began,
    }


def _score(suite: Suite, name: str, model: Any) -> list[int]:
    return [int(right) for right in suite.test[name](model)["accuracy"]]


def load() -> dict[str, Any]:
    """The cells that were computed so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def save(cells: dict[str, Any]) -> None:
    """Keep the cells; the file is replaced in one step."""
    RESULTS.parent.mkdir(exist_ok=True)
    with new_file(RESULTS) as temporary:
        temporary.write_text(
            json.dumps(cells, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8"
        )


def mean_and_interval(columns: list[list[list[int]]], seed: int = 0) -> tuple[float, float, float]:
    """Mean over tasks (and seeds) and its 95 % interval, resampling the examples of each task."""
    rng = np.random.default_rng(seed)
    arrays = [np.array(column, dtype=np.float64) for cell in columns for column in cell]
    draws = np.mean([a[rng.integers(0, len(a), (2000, len(a)))].mean(axis=1) for a in arrays], axis=0)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.mean([a.mean() for a in arrays])), float(low), float(high)


def table(cells: dict[str, Any]) -> str:
    """Markdown: one row a method, one pair of columns a step."""
    steps = sorted({int(key.split("/")[1]) for key in cells})
    seeds = sorted({int(key.split("/")[2]) for key in cells})
    lines = [
        f"Mean test accuracy of {len(TEXT_SUITE)} text tasks, {TEST} examples each at most, with 95 % bootstrap "
        f"intervals over examples; seeds {', '.join(map(str, seeds))}. Scales tuned on {VALIDATION} validation "
        "examples a task; `>` marks an optimum at the edge of what was tried.",
        "",
        "| merged with | " + " | ".join(f"step {step} | scale" for step in steps) + " |",
        "|---|" + "---|---|" * len(steps),
    ]
    for kind in ("base", "expert"):
        cellsof = [
            [
                list(cells[f"references/{s}/{x}"][kind].values())
                for x in seeds
                if f"references/{s}/{x}" in cells
            ]
            for s in steps
        ]
        lines.append(f"| *{kind}* | " + " | ".join(f"{_shown(c)} | " for c in cellsof) + " |")
    last = steps[-1]

    def rank(method: str) -> tuple[float, str]:
        found = [cells[f"{method}/{last}/{x}"] for x in seeds if f"{method}/{last}/{x}" in cells]
        value = mean_and_interval([list(c["accuracy"].values()) for c in found])[0] if found else 0.0
        return value, method

    methods = sorted({key.split("/")[0] for key in cells} - {"references"}, key=rank)
    for method in methods:
        row = []
        for step in steps:
            found = [cells[f"{method}/{step}/{x}"] for x in seeds if f"{method}/{step}/{x}" in cells]
            scales = ", ".join(f"{c['scale']:.3g}{'' if c['inside'] else ' >'}" for c in found)
            row.append(f"{_shown([list(c['accuracy'].values()) for c in found])} | {scales}")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" + orderings(cells) + NOTES


def orderings(cells: dict[str, Any]) -> str:
    """Markdown: which published orderings hold at the last step, by paired intervals of the difference."""
    last = max(int(key.split("/")[1]) for key in cells)
    lines = [
        "",
        f"Published orderings at step {last}: the second's accuracy less the first's, on the same examples. It holds "
        "where the whole 95 % interval is above 0, does not where it is below, and is open where 0 lies inside.",
        "",
        "| better than the first, by its paper | arXiv | difference | holds |",
        "|---|---|---|---|",
    ]
    for worse, better, paper in PUBLISHED:
        pairs = [
            (cells[key]["accuracy"], cells[f"{better}/{last}/{key.split('/')[2]}"]["accuracy"])
            for key in sorted(cells)
            if key.startswith(f"{worse}/{last}/") and f"{better}/{last}/{key.split('/')[2]}" in cells
        ]
        if not pairs:
            lines.append(f"| {worse} < {better} | {paper} | not measured | |")
            continue
        mean, low, high = mean_and_interval(
            [
                [[b - a for a, b in zip(first[task], second[task], strict=True)] for task in first]
                for first, second in pairs
            ]
        )
        holds = "yes" if low > 0 else "no" if high < 0 else "open"
        lines.append(f"| {worse} < {better} | {paper} | {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {holds} |")
    return "\n".join(lines) + "\n"


def _shown(columns: list[list[list[int]]]) -> str:
    if not columns:
        return ""
    mean, low, high = mean_and_interval(columns)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    cells = load()
    if not options.table:
        for seed in options.seeds:
            suite = Suite(seed)
            for step in options.steps:
                for method in ["references", *options.methods]:
                    key = f"{method}/{step}/{seed}"
                    if key in cells:
                        continue
                    cells[key] = (
                        references(suite, step) if method == "references" else merged(suite, method, step)
                    )
                    save(cells)
                    print(key, cells[key].get("scale"), flush=True)
    TABLE.write_text(table(cells), encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
