"""What merging inside a live model costs: `MergedInPlace` against one evaluation pass, in CPU seconds.

    python -m benchmarks.in_place            # writes benchmarks/results/in_place.json and .md

The model is the demo's, MiniLM-L6 with a zero-shot head, and four peers are full checkpoints on disk. Experts
differ from the base where the demo trains (embeddings and pooler frozen), or everywhere. An evaluation pass is 500
examples of 64 tokens in batches of 50. A merge is making a `MergedInPlace`, entering the block and leaving it, with
base and peers opened before, as the probe does. The first merge of a run also finds what does not change later, such
as the peers' thresholds; later ones are what each evaluation pays. One thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.merge_engine import describe
from mergeready.demo.encoder import encoder_folder, load_classifier
from mergeready.experts.base import Base
from mergeready.experts.live import LiveExpert
from mergeready.merging import MergedInPlace
from mergeready.merging.method import ElementwiseMethod, MergeMethod
from mergeready.merging.registry import method_class, method_names
from mergeready.training.peers import open_peers

RESULT = Path(__file__).parent / "results" / "in_place.json"
PEERS, EXAMPLES, TOKENS, BATCH, CLASSES = 4, 500, 64, 50, 20
GOAL = 0.05


def move(model: nn.Module, seed: int, everything: bool) -> None:
    """Add noise in place of training, where the demo trains or everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if everything:
                parameter.requires_grad_(True)  # what is frozen must equal the base
            if parameter.requires_grad:
                parameter += 1e-3 * torch.randn(parameter.shape, generator=generator)


def elementwise() -> list[str]:
    """All elementwise methods that merge five experts and need no data."""
    kinds = {name: method_class(name) for name in method_names() if name != "slerp"}
    return [name for name, kind in kinds.items() if issubclass(kind, ElementwiseMethod) and not needs(kind)]


def spectral() -> list[str]:
    """Methods on whole matrices that decompose them; of these the goal says nothing."""
    return ["tsv_m", "iso_c", "wudi"]


def needs(kind: type[MergeMethod]) -> bool:
    """Whether a method has parameters without a default."""
    return any(f.default is MISSING and f.default_factory is MISSING for f in fields(kind))


def seconds(work: Callable[[], object]) -> dict[str, float]:
    """CPU and wall seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(median(run[key] for run in runs), 4) for key in runs[0]}


def measure(root: Path, everything: bool, repeats: int) -> dict[str, Any]:
    """Seconds of evaluation passes, before and after the merges, and of each method's merges."""
    for index in range(PEERS):
        peer = load_classifier(encoder_folder())
        move(peer.bert, index + 1, everything)
        peer.bert.save_pretrained(root / f"peer-{index}")
    model = load_classifier(encoder_folder()).eval()
    move(model.bert, 0, everything)
    heads = torch.randn(CLASSES, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    model.set_head(torch.nn.functional.normalize(heads, dim=-1))
    ids = torch.randint(1000, 20000, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def evaluate() -> None:
        for batch in ids.split(BATCH):
            model(batch, torch.ones_like(batch))

    live = LiveExpert(model, Base.open(encoder_folder()))
    peers = open_peers([root / f"peer-{index}" for index in range(PEERS)], live.base)
    model(ids[:BATCH], torch.ones_like(ids[:BATCH]))
    passes, methods = [seconds(evaluate)], {}
    for name in [*elementwise(), *spectral()]:

        def merge(method: str = name) -> None:
            with MergedInPlace(live, None, peers, method, scale=0.5):
                pass

        first, later = seconds(merge), middle([seconds(merge) for _ in range(repeats)])
        methods[name] = {"first": middle([first]), "later": later}
        print(name, methods[name], flush=True)
    passes.append(seconds(evaluate))
    one_pass = middle(passes)
    for cell in methods.values():
        cell["share"] = {when: round(cell[when]["cpu"] / one_pass["cpu"], 4) for when in ("first", "later")}
    return {"evaluation": one_pass, "methods": methods}


def table(content: dict[str, Any]) -> str:
    """The results as markdown."""
    lines = [
        "# What merging in place costs",
        "",
        f"Generated by `python -m benchmarks.in_place`. {content['machine']}.",
        "",
        f"CPU seconds of one `MergedInPlace` of MiniLM-L6 with {PEERS} peers, and their share of one evaluation pass "
        f"over {EXAMPLES} examples of {TOKENS} tokens. First includes what is remembered. Goal: ≤ {GOAL:.0%}, "
        "of the first as of later ones, of methods that work element by element.",
    ]
    for world, cells in content["worlds"].items():
        lines += [
            "",
            f"Experts differ from the base in {world}; a pass takes {cells['evaluation']['cpu']:.2f} CPU s.",
            "",
            "| method | first, s | later, s | first / pass | later / pass | goal met |",
            "|---|---|---|---|---|---|",
        ]
        for name, cell in cells["methods"].items():
            share = cell["share"]
            met = "" if name in spectral() else "yes" if max(share.values()) <= GOAL else "no"
            lines.append(
                f"| {name} | {cell['first']['cpu']:.2f} | {cell['later']['cpu']:.2f} | {share['first']:.1%} "
                f"| {share['later']:.1%} | {met} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    worlds = {}
    for world, everything in (("what the demo trains", False), ("all parameters", True)):
        with tempfile.TemporaryDirectory() as folder:
            worlds[world] = measure(Path(folder), everything, options.repeats)
        content = {"machine": describe(), "goal": GOAL, "worlds": worlds}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        RESULT.with_suffix(".md").write_text(table(content), encoding="utf-8")
    print(table(content))


if __name__ == "__main__":
    main()
