"""The scale that an evaluation likes best, for models that are one number: the optimum is known in advance."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from mergeready.errors import EvaluationError, MismatchError, OptionError, OutputExistsError
from mergeready.merging import merge
from mergeready.merging.tune import tune_scale
from tests.merging.test_in_place import bits
from tests.merging.worlds import equal, make_world, tensors_of
from tests.models import token_batch
from tests.training.small import OneNumber, near

BASE = {"weight": torch.tensor([[1.0]])}
EXPERT = {"weight": torch.tensor([[2.0]])}


@pytest.mark.parametrize("best", [1.05, 1.5, 4.0, 40.0])
def test_the_grid_widens_until_the_optimum_is_inside(best: float) -> None:
    tuned = tune_scale(OneNumber(), BASE, [EXPERT], near(best), max_evaluations=30)
    assert tuned.inside
    exact = best - 1  # merged = 1 + scale
    ratio = max(exact, tuned.scale) / min(exact, tuned.scale)
    assert ratio < 0.8 / 0.5 + 0.1
    assert tuned.value == pytest.approx(-abs(1 + tuned.scale - best), abs=1e-6)
    assert tuned.tried[tuned.scale] == tuned.value == max(tuned.tried.values())
    assert tuned.metric == "closeness"


def test_tasks_count_alike() -> None:
    tasks = {"low": near(1.2), "mid": near(1.5), "high": near(9.0)}
    tuned = tune_scale(OneNumber(), BASE, [EXPERT], tasks, scales=(0.25, 0.5, 1.0), max_evaluations=9)
    assert tuned.scale == 0.5  # the median minimises the sum of distances
    assert tuned.tasks == pytest.approx({"low": -0.3, "mid": 0.0, "high": -7.5})


def test_no_merge_better_than_the_base_is_scale_zero() -> None:
    tuned = tune_scale(OneNumber(), BASE, [EXPERT], near(-3.0), max_evaluations=20)
    assert (tuned.scale, tuned.value) == (0.0, -4.0)


def test_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(7.0)
    before = bits(model)
    base = {"0.weight": torch.tensor([[6.9]])}
    tune_scale(model, base, [{"0.weight": torch.tensor([[8.0]])}], lambda m: {"x": float(m[0].weight)})
    assert bits(model) == before


def test_merge_tunes_as_the_function_does(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    target = copy.deepcopy(world.base)
    target.load_state_dict(merge(dict(world.base.state_dict()), world.experts, "ties", scale=0.6))

    def close(model: nn.Module) -> dict[str, float]:
        batch = token_batch()
        return {"closeness": -float((model(**batch).logits - target(**batch).logits).norm())}

    tuned = tune_scale(
        copy.deepcopy(world.base), world.base_folder, world.folders, close, "ties", density=0.3
    )
    expected = tensors_of(
        merge(world.base_folder, world.folders, "ties", density=0.3, scale=tuned.scale, output=tmp_path / "a")
    )
    options = {"method": "ties", "density": 0.3, "scale": "tune", "evaluate": close}
    model = copy.deepcopy(world.base)
    out = merge(world.base_folder, world.folders, model=model, output=tmp_path / "b", **options)
    assert equal(tensors_of(out), expected)
    from_module = merge(world.base, world.experts, **options)
    assert all(torch.equal(t, expected[n]) for n, t in from_module.named_parameters())
    from_state = merge(tensors_of(world.base_folder), world.folders, model=world.base, **options)
    assert equal(from_state, expected)


def test_what_would_stop_the_merge_stops_it_before_the_search(tmp_path: Path) -> None:
    world = make_world(tmp_path)

    def never(model: nn.Module) -> dict[str, float]:
        raise AssertionError("something was evaluated")

    options = {"scale": "tune", "evaluate": never, "model": copy.deepcopy(world.base)}
    with pytest.raises(OutputExistsError):
        merge(world.base_folder, world.folders, output=world.adapter_folder, **options)
    for changes, named in (({"statistics": "mean"}, "statistics"), ({"threads": 0}, "threads")):
        with pytest.raises(OptionError, match=named):
            merge(world.base_folder, world.folders, output=tmp_path / "out", **options, **changes)
    headed = tensors_of(world.folders[0]) | {"own.head": torch.ones(3)}
    with pytest.raises(MismatchError, match=r"own\.head"):
        merge(world.base_folder, [headed], output=tmp_path / "out", **options)
    for base in (world.base, tensors_of(world.base_folder)):
        with pytest.raises(MismatchError, match=r"own\.head"):
            merge(base, [headed], **options)
        with pytest.raises(OptionError, match="statistics"):
            merge(base, world.folders, statistics="mean", **options)


def test_an_optimum_out_of_reach_is_flagged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mergeready"):
        merge(OneNumber(), [EXPERT], scale="tune", evaluate=near(1e6))
    assert "may lie beyond" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mergeready"):
        merge(OneNumber(), [EXPERT], scale="tune", evaluate=near(1.4))
    assert not caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_scale_at_which_a_model_overflows_is_worse_than_any(value: float) -> None:
    def overflows(model: nn.Module) -> dict[str, float]:
        weight = float(model.weight)
        return {"closeness": value if weight > 2 else -abs(weight - 1.9)}

    tuned = tune_scale(OneNumber(), BASE, [EXPERT], overflows)
    assert (tuned.scale, tuned.inside) == (0.8, True)  # 1.28, which follows, is not finite
    assert list(tuned.tried) == [0.0, 0.3, 0.5, 0.8]
    with pytest.raises(EvaluationError, match="returned nan as closeness"):
        tune_scale(OneNumber(), BASE, [EXPERT], lambda model: {"closeness": math.nan})


def test_a_result_that_is_the_base_is_flagged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mergeready"):
        merged = merge(OneNumber(), [EXPERT], scale="tune", evaluate=near(-3.0))
    assert torch.equal(merged.weight, OneNumber().weight)
    (record,) = caplog.records
    assert (
        "is better than the base with its closeness of -4: the result is the base itself"
        in record.getMessage()
    )


def test_what_is_missing_is_named() -> None:
    with pytest.raises(OptionError, match="evaluate"):
        merge(OneNumber(), [EXPERT], scale="tune")
    with pytest.raises(OptionError, match="model"):
        merge(BASE, [EXPERT], scale="tune", evaluate=near(1.0))
    with pytest.raises(OptionError, match="tune"):
        merge(BASE, [EXPERT], evaluate=near(1.0))
    with pytest.raises(OptionError, match="no task"):
        tune_scale(OneNumber(), BASE, [EXPERT], {})
    with pytest.raises(EvaluationError, match="accuracy"):
        tune_scale(OneNumber(), BASE, [EXPERT], near(1.0), metric="accuracy")
