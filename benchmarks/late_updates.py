"""How the experts of the overtraining study grow and interfere, step by step, and what their late updates are.

    python -m benchmarks.late_updates        # fills benchmarks/results/study/late_updates, one file a seed
    python -m benchmarks.study_report        # writes the page

Norms, cosines and signs are of all parameters that were trained; singular directions are of one matrix of each kind,
each in another layer, since a decomposition costs far more than a sum. Everything is measured with
``mergeready.metrics``; a step that was measured is kept.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.backbones import minilm_l6
from mergeready.experts import Base, DeltaTaskVector, open_expert
from mergeready.experts.arithmetic import Difference
from mergeready.experts.delta import dense
from mergeready.experts.svd import thin_svd
from mergeready.experts.task_vector import TaskVector
from mergeready.metrics.compare import compare_vectors
from mergeready.metrics.growth import growth_per_step
from mergeready.metrics.right_overlap import RANK
from mergeready.metrics.singular_interference import kept_directions
from mergeready.metrics.spectrum import spectrum_of
from mergeready.metrics.subspace_alignment import share_inside
from mergeready.metrics.subspaces import compare_subspaces
from mergeready.study.checkpoints import given_checkpoint
from mergeready.study.settings import StudySettings, load_study
from mergeready.weights.atomic import new_file
from mergeready.weights.source import WeightSource

STUDY = Path(__file__).parent / "studies/overtraining.yaml"
RESULTS = Path(__file__).parent / "results/study/late_updates"
PICK = 64
"""The step from which on updates are called late: where validation stops task arithmetic, TIES and DARE-TIES."""
KINDS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
MATRICES = tuple(f"encoder.layer.{layer}.{kind}.weight" for layer, kind in enumerate(KINDS))


class Experts:
    """The task vectors of a seed.

    Args:
        settings: The study that names tasks, steps and checkpoints.
        seed: Of data and training.
    """

    def __init__(self, settings: StudySettings, seed: int) -> None:
        self.seed, self.tasks = seed, list(settings.tasks or ())
        self.base = Base.open(minilm_l6())
        self._pattern = str(next(iter(settings.arms.values())).checkpoints)

    def at(self, step: int) -> list[TaskVector]:
        """One a task, in their order."""
        paths = [given_checkpoint(self._pattern, task, self.seed, step) for task in self.tasks]
        return [open_expert(path, self.base, strict=False).vector for path in paths]


def sampled(vector: TaskVector) -> TaskVector:
    """A task vector's sampled matrices, in memory."""
    return DeltaTaskVector({name: vector[name] for name in MATRICES}, vector.infos, vector.base, vector.label)


def measure_step(
    vectors: list[TaskVector], base: WeightSource, step: int, before: tuple[int, list[float]]
) -> dict[str, Any]:
    """What is told of all experts at one step: one number an expert, or one for all of them.

    Args:
        vectors: The experts.
        base: Their base's weights.
        step: Where they are.
        before: The step measured before, and norms then.
    """
    began = time.process_time()
    pairs, spaces = compare_vectors(vectors, base), compare_subspaces([sampled(v) for v in vectors])
    return {
        "norm": pairs.norms,
        "growth": [
            growth_per_step(step, now, before[0], then)
            for now, then in zip(pairs.norms, before[1], strict=True)
        ],
        "cosine": with_peers(pairs.cosine),
        "sign_conflict": with_peers(pairs.sign_conflict),
        "conflict_normalised": pairs.conflict_normalised,
        "norm_ratio": pairs.norm_ratio,
        "alignment": spaces.alignment,
        "overlap": with_peers(spaces.overlap),
        "interference": spaces.interference,
        "times_over": spaces.times_over,
        "stable_rank": spaces.stable_rank,
        "effective_rank": spaces.effective_rank,
        "cpu_seconds": time.process_time() - began,
    }


def measure_late(end: list[TaskVector], pick: list[TaskVector], base: WeightSource) -> dict[str, Any]:
    """What the steps after the pick added: alone, beside what was there, and beside what peers added."""
    began = time.process_time()
    late = [Difference(one, two) for one, two in zip(end, pick, strict=True)]
    count = len(late)
    together, spaces = compare_vectors([*late, *pick], base), compare_subspaces([sampled(v) for v in late])

    def parts(rows: list[list[float]]) -> dict[str, list[float]]:
        return {
            "late": with_peers([row[:count] for row in rows[:count]]),
            "early": with_peers([row[count:] for row in rows[count:]]),
            "late_with_early_of_peers": with_peers([row[count:] for row in rows[:count]]),
        }

    return {
        "norm_to_early": [together.norms[i] / together.norms[count + i] for i in range(count)],
        "cosine_with_early": [together.cosine[i][count + i] for i in range(count)],
        "cosine": parts(together.cosine),
        "sign_conflict": parts(together.sign_conflict),
        "overlap": with_peers(spaces.overlap),
        "alignment": spaces.alignment,
        "interference": spaces.interference,
        "times_over": spaces.times_over,
        "spectrum": [spectra(*each, count) for each in zip(end, pick, late, strict=True)],
        "cpu_seconds": time.process_time() - began,
    }


def spectra(end: TaskVector, pick: TaskVector, late: TaskVector, experts: int) -> dict[str, float]:
    """Spectra of one expert's parts, and how much of the late one is inside the early one: means over matrices.

    Shares are of energy. ``…_kept`` is the share inside those left directions of the end's task vector that TSV-M
    takes where so many experts are merged.
    """
    rows = []
    for name in MATRICES:
        whole, early, last = (dense(part[name]).double() for part in (end, pick, late))
        found = {"end": thin_svd(whole), "early": thin_svd(early), "late": thin_svd(last)}
        left, _, right = found["early"]
        kept = found["end"][0][:, : kept_directions((whole.shape[0], whole.shape[1]), experts)]
        row = {
            "late_inside_left": share_inside(last, left[:, :RANK]) ** 2,
            "late_inside_right": share_inside(last.T, right[:RANK].T) ** 2,
            "chance_left": RANK / whole.shape[0],
            "chance_right": RANK / whole.shape[1],
            "end_kept": share_inside(whole, kept) ** 2,
            "early_kept": share_inside(early, kept) ** 2,
            "late_kept": share_inside(last, kept) ** 2,
        }
        for part, (_, values, _) in found.items():
            told = spectrum_of(values)
            row |= {f"{part}_stable_rank": told.stable_rank, f"{part}_effective_rank": told.effective_rank}
            row |= {f"{part}_top_{top}": share for top, share in told.top_energy.items()}
        rows.append(row)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def with_peers(rows: list[list[float]]) -> list[float]:
    """The mean of each row without its own column.

    >>> with_peers([[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]])
    [0.25, 0.5, 0.25]
    """
    return [
        sum(value for column, value in enumerate(row) if column != index) / (len(row) - 1)
        for index, row in enumerate(rows)
    ]


def load(seed: int) -> dict[str, Any]:
    """What was measured of a seed so far."""
    path = RESULTS / f"{seed}.json"
    kept: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"steps": {}}
    return kept


def measure(settings: StudySettings, seed: int) -> None:
    """Measure what is missing of a seed."""
    experts, kept = Experts(settings, seed), load(seed)
    kept |= {"seed": seed, "tasks": experts.tasks, "matrices": list(MATRICES)}
    before = (0, [0.0] * len(experts.tasks))
    for step in sorted(settings.steps):
        if str(step) not in kept["steps"]:
            kept["steps"][str(step)] = measure_step(experts.at(step), experts.base.source, step, before)
            _save(seed, kept)
        before = (step, kept["steps"][str(step)]["norm"])
    if "late" not in kept:
        end, pick = experts.at(max(settings.steps)), experts.at(PICK)
        kept |= {"pick": PICK, "late": measure_late(end, pick, experts.base.source)}
        _save(seed, kept)


def _save(seed: int, content: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    with new_file(RESULTS / f"{seed}.json") as temporary:
        temporary.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    print(seed, list(content["steps"]), "late" in content, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    settings = load_study(STUDY)
    for seed in settings.seeds:
        measure(settings, seed)


if __name__ == "__main__":
    main()
