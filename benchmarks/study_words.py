"""What the pages of studies have in common: a study with its results, and words for numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from mergeready.study.results import Results, Sample
from mergeready.study.run import Runner
from mergeready.study.settings import Arm, StudySettings, load_study

ROOT = Path(__file__).parent.parent
STUDIES, KEPT = ROOT / "benchmarks/studies", ROOT / "benchmarks/results/study"
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MODELS = {
    "minilm_l6": "MiniLM-L6",
    "minilm_l3": "MiniLM-L3",
    "squeezenet": "SqueezeNet",
    "efficientnet_lite0": "EfficientNet-Lite0",
}
MORE = "More seeds, more test examples, longer runs and larger models are what a larger machine would add."


@dataclass(frozen=True)
class Study:
    """A study's settings, and what it found."""

    settings: StudySettings
    results: Results

    @property
    def arm(self) -> Arm:
        """What its arms share."""
        return next(iter(self.settings.arms.values()))

    @property
    def suite(self) -> dict[str, Any]:
        """Its suite's arguments."""
        return self.settings.suite.arguments

    @property
    def tasks(self) -> int:
        """Number of its tasks."""
        return len(self.settings.tasks or ())


def load(name: str) -> Study:
    """A study and its kept cells."""
    settings = load_study(STUDIES / f"{name}.yaml")
    return Study(settings, Results(Runner(settings, KEPT / name).results()))


def over(results: Results) -> str:
    count = len(results.labels("seed"))
    if count > 1:
        return f"{count} seeds, so the intervals are t intervals over seeds"
    return "one seed, so the intervals are over test examples and say nothing of seeds: **a screening, not a result**"


def rate(value: float) -> str:
    """As one writes learning rates: 1e-4."""
    return f"{value:.0e}".replace("e-0", "e-")


def cost(studies: Iterable[Study]) -> str:
    """What studies took in CPU time."""
    parts, total = [], 0.0
    for study in studies:
        name, results = study.settings.name, study.results
        if not results.contents:
            continue
        kept = [json.loads(path.read_text()) for path in sorted((KEPT / name / "runs").glob("*.json"))]
        training = sum(record["cpu_seconds"] for record in kept) / 3600
        merging = results.merging_seconds() / 3600
        total += training + merging
        trained = f"{training:.2f} of training and " if kept else ""
        parts.append(f"{name}: {trained}{merging:.2f} of merging, tuning and testing")
    return f"## Cost\n\nIn CPU hours: {'; '.join(parts)}; {total:.2f} in all."


def verdict(sample: Sample, up: str = "rises", down: str = "falls") -> str:
    examples = sample.over_examples()
    if not excludes_zero(sample):
        on_examples = (
            examples.low is not None and examples.high is not None and (examples.low > 0 or examples.high < 0)
        )
        word = up if sample.value > 0 else down
        return (
            f"{word} on these seeds, which are too few to say more,"
            if on_examples
            else "does not change measurably"
        )
    return up if sample.value > 0 else down


def excludes_zero(sample: Sample) -> bool:
    """Both over seeds, where there are several, and over examples."""
    estimates: list[Any] = [sample.over_examples()]
    if sample.over_seeds().low is not None:
        estimates.append(sample.over_seeds())
    return all(e.low > 0 or e.high < 0 for e in estimates)


def share_kept(merged: Sample, experts: Sample, base: Sample) -> str:
    """Share of the experts' gain over the base that a merge keeps, with its 95 % t interval over seeds."""
    shares = (merged.by_seed - base.by_seed) / (experts.by_seed - base.by_seed)
    if len(shares) < 2:
        return f"{shares[0]:.0%}"
    middle = shares.mean()
    half = float(stdtrit(len(shares) - 1, 0.975)) * shares.std(ddof=1) / len(shares) ** 0.5
    return f"{middle:.0%} [{middle - half:.0%}, {middle + half:.0%}]"


def nothing() -> Sample:
    return Sample({"none": np.full((1, 1), -np.inf)})
