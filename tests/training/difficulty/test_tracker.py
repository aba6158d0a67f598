from __future__ import annotations

import json
import math
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeready.errors import HistoryError, OptionError
from mergeready.training.difficulty.measures import example_measures
from mergeready.training.difficulty.shares import share_of_hardest
from mergeready.training.difficulty.table import DifficultyTable
from mergeready.training.difficulty.tracker import Difficulty, DifficultyTracker
from mergeready.weights.ranks import Ranks
from tests.ranks import run_ranks

STEPS, BATCH, COUNT, CLASSES = 40, 8, 50, 4


def passes(
    seed: int = 0, first: int = 1, last: int = STEPS
) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Made-up forward passes: step, ids, logits, labels and the head's inputs. A step is a function of its number."""
    made = []
    for step in range(first, last + 1):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        ids = torch.randperm(COUNT, generator=generator)[:BATCH]
        logits = 2 * torch.randn(BATCH, CLASSES, generator=generator)
        inputs = torch.randn(BATCH, 6, generator=generator)
        made.append((step, ids, logits, ids % CLASSES, inputs))
    return made


def feed(tracker: DifficultyTracker, seen: list[tuple[int, Tensor, Tensor, Tensor, Tensor]]) -> None:
    for step, ids, logits, labels, inputs in seen:
        tracker.observe(ids, logits, labels, inputs=inputs, step=step)


def same(a: DifficultyTable, b: DifficultyTable) -> None:
    for field in fields(DifficultyTable):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_every_column_equals_a_direct_recomputation() -> None:
    tracker = DifficultyTracker(Difficulty(early=15))
    feed(tracker, passes())
    table = tracker.table()
    history: dict[int, list[tuple[int, float, float, float, bool]]] = {}
    for step, ids, logits, labels, _ in passes():
        p = logits.double().softmax(1)
        for i, example in enumerate(ids.tolist()):
            y = int(labels[i])
            el2n = math.sqrt(sum((float(p[i, k]) - (k == y)) ** 2 for k in range(CLASSES)))
            right = int(logits[i].argmax()) == y
            history.setdefault(example, []).append((step, -math.log(p[i, y]), el2n, float(p[i, y]), right))
    assert table.id.tolist() == sorted(history)
    for row, example in enumerate(table.id.tolist()):
        steps, losses, el2n, confidence, right = (
            list(column) for column in zip(*history[example], strict=True)
        )
        assert (table.seen[row], table.first_step[row], table.last_step[row]) == (
            len(steps),
            steps[0],
            steps[-1],
        )
        assert table.loss[row] == pytest.approx(np.mean(losses), abs=1e-6)
        assert table.loss_last[row] == pytest.approx(losses[-1], abs=1e-6)
        assert table.el2n[row] == pytest.approx(np.mean(el2n), abs=1e-6)
        early = [value for step, value in zip(steps, el2n, strict=True) if step <= 15]
        assert table.el2n_early[row] == pytest.approx(early[-1] if early else math.nan, abs=1e-6, nan_ok=True)
        assert table.confidence[row] == pytest.approx(np.mean(confidence), abs=1e-6)
        assert table.correct[row] == pytest.approx(np.mean(right))
        assert table.forgotten[row] == sum(a and not b for a, b in pairwise(right))
        assert table.learned[row] == (steps[right.index(True)] if True in right else -1)
    assert table.forgotten.sum() > 5


def test_the_shares_of_a_step_equal_a_direct_recomputation() -> None:
    tracker = DifficultyTracker(Difficulty(hardest=0.25))
    feed(tracker, passes())
    found = tracker.steps()
    assert found["step"].tolist() == list(range(1, STEPS + 1))
    for row, (_, _, logits, labels, inputs) in enumerate(passes()):
        measured = example_measures(logits.double(), labels)
        norms = measured.el2n * (inputs.double().square().sum(1) + 1).sqrt()
        assert found["examples"][row] == BATCH
        assert found["loss"][row] == pytest.approx(float(measured.loss.mean()), abs=1e-6)
        assert found["loss_share"][row] == pytest.approx(share_of_hardest(measured.loss, 0.25), abs=1e-6)
        assert found["gradient_share"][row] == pytest.approx(share_of_hardest(norms, 0.25), abs=1e-6)


def test_micro_batches_of_one_step_are_one_step() -> None:
    whole, halves = DifficultyTracker(), DifficultyTracker()
    feed(whole, passes())
    for step, ids, logits, labels, inputs in passes():
        for part in (slice(0, 3), slice(3, None)):
            halves.observe(ids[part], logits[part], labels[part], inputs=inputs[part], step=step)
    same(whole.table(), halves.table())
    for name, values in whole.steps().items():
        np.testing.assert_allclose(halves.steps()[name], values)


def test_a_second_pass_within_a_step_does_not_count() -> None:
    once, twice = DifficultyTracker(), DifficultyTracker()
    feed(once, passes())
    for one in passes():
        feed(twice, [one])
        twice.observe(
            one[1], one[2] + 5 * torch.randn(BATCH, CLASSES), one[3], step=one[0]
        )  # at perturbed weights
    same(once.table(), twice.table())


@pytest.mark.parametrize("cut", [1, 17, 39])
def test_a_resumed_run_knows_what_an_uninterrupted_one_does(cut: int) -> None:
    whole, first, second = DifficultyTracker(), DifficultyTracker(), DifficultyTracker()
    feed(whole, passes())
    feed(first, passes(last=cut))
    state = json.loads(json.dumps(first.state_dict()))
    feed(first, passes(seed=5, first=cut + 1))  # steps that the checkpoint does not know
    second.load_state_dict(state)
    feed(second, passes(first=cut + 1))
    same(whole.table(), second.table())
    assert second.state_dict() == whole.state_dict()


def test_when_it_settles_makes_no_difference() -> None:
    often, late = DifficultyTracker(), DifficultyTracker()
    for one in passes():
        feed(often, [one])
        often.settle()
    feed(late, passes())
    assert often.state_dict() == late.state_dict()


def test_memory_is_bounded_by_examples() -> None:
    tracker = DifficultyTracker()
    sizes = []
    for epoch in range(6):
        tracker.observe(
            torch.arange(1000), torch.zeros(1000, 2), torch.zeros(1000, dtype=torch.long), step=epoch + 1
        )
        tracker.settle()
        sizes.append(tracker._examples.nbytes)
        assert not tracker._waiting
    assert len(set(sizes)) == 1


def test_files_beside_the_history(tmp_path: Path) -> None:
    tracker = DifficultyTracker()
    step, ids, logits, labels, _ = passes()[0]
    tracker.observe(ids, logits, labels, step=step)
    tracker.write(tmp_path)
    same(DifficultyTable.read(tmp_path / "difficulty.parquet"), tracker.table())
    steps = json.loads((tmp_path / "difficulty_steps.json").read_text())
    assert steps["gradient_share"] == [None]  # there was no head to look at
    assert steps["loss_share"] == pytest.approx([share_of_hardest(example_measures(logits, labels).loss)])


def test_examples_of_which_nothing_counts_are_not_seen() -> None:
    tracker = DifficultyTracker()
    labels = torch.tensor([[1, 1], [-100, -100]])
    tracker.observe(torch.tensor([1, 2]), torch.randn(2, 2, 3), labels, step=1)
    assert tracker.table().id.tolist() == [1]


def test_what_does_not_fit_is_refused() -> None:
    tracker = DifficultyTracker()
    with pytest.raises(OptionError, match="3 ids do not belong to 2 rows of logits"):
        tracker.observe(torch.arange(3), torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(OptionError, match="`settle_every` at least 1"):
        Difficulty(settle_every=0)
    with pytest.raises(HistoryError, match="the saved difficulties are damaged"):
        tracker.load_state_dict({"examples": "no", "steps": ""})


def on_a_rank(folder: Path) -> Any:
    ranks = Ranks.world()
    tracker = DifficultyTracker(ranks=ranks)
    for step, ids, logits, labels, inputs in passes():
        mine = slice(ranks.rank, None, ranks.size)
        tracker.observe(ids[mine], logits[mine], labels[mine], inputs=inputs[mine], step=step)
        if step % 7 == 0:
            tracker.settle()
    tracker.write(folder)
    return tracker.table(), tracker.steps()


@pytest.mark.slow
def test_two_ranks_know_what_one_process_does(tmp_path: Path) -> None:
    alone = DifficultyTracker()
    feed(alone, passes())
    for table, steps in run_ranks(on_a_rank, 2, tmp_path):
        same(table, alone.table())
        for name, values in alone.steps().items():
            np.testing.assert_allclose(steps[name], values, rtol=1e-12, equal_nan=True)
    same(DifficultyTable.read(tmp_path / "difficulty.parquet"), alone.table())
