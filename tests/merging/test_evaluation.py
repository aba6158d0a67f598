from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mergeready.errors import EvaluationError
from mergeready.merging.evaluation import (
    Score,
    call_evaluation,
    choose_metric,
    is_greater_better,
    run_evaluation,
    take_score,
)


@pytest.mark.parametrize(
    "value",
    [
        0.75,
        np.float32(0.75),
        np.float64(0.75),
        np.array(0.75),
        torch.tensor(0.75),
        torch.tensor(0.75, dtype=torch.float64),
        torch.tensor(0.75, dtype=torch.bfloat16),
        torch.tensor(0.75, requires_grad=True),
    ],
    ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', '')}",
)
def test_one_number(value: Any) -> None:
    score = take_score({"accuracy": value}, "accuracy", "own")
    assert (score.value, score.examples, score.n) == (0.75, None, None)
    assert type(score.value) is float


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 0.0, 1.0, 1.0],
        (1, 0, 1, 1),
        [True, False, True, True],
        [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0)],
        np.array([1, 0, 1, 1]),
        np.array([True, False, True, True]),
        np.array([1, 0, 1, 1], dtype=np.float16),
        torch.tensor([1, 0, 1, 1]),
        torch.tensor([True, False, True, True]),
        torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    ],
    ids=lambda v: f"{type(v).__name__}-{getattr(v, 'dtype', '')}",
)
def test_one_number_an_example(values: Any) -> None:
    score = take_score({"accuracy": values}, "accuracy", "own")
    assert score.value == 0.75
    assert score.examples is not None
    assert score.examples.dtype == np.float64
    assert score.examples.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert score.n == 4


def test_double_precision_is_kept() -> None:
    value = 0.1 + 0.2
    for given in (value, np.array(value), torch.tensor(value, dtype=torch.float64)):
        assert take_score({"loss": given}, "loss", "own").value == value
    precise = torch.tensor([value, 1 / 3], dtype=torch.float64)
    examples = take_score({"loss": precise}, "loss", "own").examples
    assert examples is not None
    assert examples.tolist() == [value, 1 / 3]


def test_the_mean_does_not_lose_small_numbers() -> None:
    values = torch.full((10_000,), 0.1)
    assert take_score({"loss": values}, "loss", "own").value == pytest.approx(float(values[0]), rel=1e-12)


@pytest.mark.parametrize(
    "buffer",
    [torch.ones(3), torch.ones(3, dtype=torch.float64), np.ones(3), np.ones((3, 1))],
    ids=["fp32", "fp64", "array", "column"],
)
def test_an_evaluation_may_return_the_same_buffer_each_time(buffer: Any) -> None:
    score = take_score({"accuracy": buffer}, "accuracy", "own")
    buffer[:] = 0
    assert score.examples is not None
    assert score.examples.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "returned nan as accuracy"),
        (float("inf"), "returned inf as accuracy"),
        (torch.tensor([1.0, float("nan")]), "returned nan as accuracy"),
        ([1.0, float("-inf")], "returned -inf as accuracy"),
        (None, "returned nan as accuracy"),
        ([], "saw no examples: its data is empty"),
        (torch.zeros(0), "saw no examples: its data is empty"),
        (np.zeros((0, 3)), "saw no examples: its data is empty"),
        ("high", "returned 'high' as accuracy: no number"),
        ([1.0, "high"], "as accuracy: no number"),
        ([[1.0], [1.0, 2.0]], "as accuracy: no number"),
        (1 + 2j, "as accuracy: no number"),
        ({"mean": 0.5}, "as accuracy: no number"),
        (object(), "as accuracy: no number"),
    ],
)
def test_what_is_no_measurement(value: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=f"^the evaluation of law .*{message}"):
        take_score({"accuracy": value}, "accuracy", "law")


class TestChoice:
    def test_the_only_one(self) -> None:
        assert choose_metric({"accuracy": 1.0}, None, "own") == "accuracy"

    def test_the_named_one(self) -> None:
        assert choose_metric({"accuracy": 1.0, "f1": 1.0}, "f1", "own") == "f1"

    def test_several_and_none_named(self) -> None:
        with pytest.raises(EvaluationError, match="of own returns accuracy, f1: say which one with `metric`"):
            choose_metric({"accuracy": 1.0, "f1": 1.0}, None, "own")

    @pytest.mark.parametrize("result", [{"accuracy": 1.0}, {"accuracy": 1.0, "f1": 1.0}])
    def test_one_that_is_not_there(self, result: dict[str, float]) -> None:
        with pytest.raises(EvaluationError, match="of own returned no 'recall', only accuracy"):
            choose_metric(result, "recall", "own")


class TestCall:
    def test_in_evaluation_mode_without_gradients(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
        seen = []

        def evaluate(model: nn.Module) -> dict[str, float]:
            seen.append((torch.is_grad_enabled(), [module.training for module in model.modules()]))
            return {"accuracy": 1.0}

        run_evaluation(evaluate, model, "accuracy", "own")
        assert seen == [(False, [False, False, False])]
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType])
    def test_any_mapping(self, kind: type) -> None:
        result = kind({"accuracy": 0.5})
        assert call_evaluation(lambda model: result, nn.Identity(), "own") is result

    @pytest.mark.parametrize(
        ("result", "name"), [(0.5, "float"), (None, "NoneType"), ({}, "dict"), ([("a", 1)], "list")]
    )
    def test_anything_else(self, result: Any, name: str) -> None:
        with pytest.raises(EvaluationError, match=f"of own must return metrics by name, not {name}"):
            call_evaluation(lambda model: result, nn.Identity(), "own")

    def test_an_error_inside_is_named_and_chained(self) -> None:
        def evaluate(model: nn.Module) -> Mapping[str, float]:
            raise KeyError("labels")

        with pytest.raises(EvaluationError, match="of law raised KeyError: 'labels'") as raised:
            call_evaluation(evaluate, nn.Identity(), "law")
        assert isinstance(raised.value.__cause__, KeyError)

    def test_an_interrupt_passes(self) -> None:
        def evaluate(model: nn.Module) -> Mapping[str, float]:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            call_evaluation(evaluate, nn.Identity(), "own")

    def test_the_whole_way(self) -> None:
        def evaluate(model: nn.Module) -> dict[str, Any]:
            return {"loss": [1.0, 2.0], "accuracy": 0.5}

        score = run_evaluation(evaluate, nn.Identity(), "loss", "own")
        assert (score.value, score.n) == (1.5, 2)
        with pytest.raises(EvaluationError, match="no 'f1'"):
            run_evaluation(evaluate, nn.Identity(), "f1", "own")


def test_a_score_counts_its_examples() -> None:
    assert Score(0.5).n is None
    assert Score(0.5, np.zeros(3)).n == 3


GREATER = [
    "accuracy",
    "eval_f1",
    "rouge/L",
    "meteor",
    "chrf",
    "recall@10",
    "tokens_per_second",
    "score",
    "sacrebleu",
]
GREATER += [
    "log_likelihood",
    "neg_mean_squared_error",
    "eval_neg_log_loss",
    "neg_brier_score",
    "answer",
    "maestro",
]
LESS = [
    "loss",
    "eval_loss",
    "word_perplexity",
    "error_rate",
    "wer",
    "eval_cer",
    "test/WER",
    "mse",
    "eval_rmse",
    "MAE",
]
LESS += [
    "nll",
    "ppl",
    "bits_per_byte",
    "bpb",
    "brier",
    "ece",
    "fid",
    "cross_entropy",
    "negative_log_likelihood",
]
LESS += ["neg_log_likelihood", "ter", "eer", "mape"]


@pytest.mark.parametrize(
    ("metric", "greater"), [*((name, True) for name in GREATER), *((name, False) for name in LESS)]
)
def test_the_direction_goes_by_the_name_unless_given(metric: str, greater: bool) -> None:
    """A wrong one makes the worst scale the best, without a word."""
    assert is_greater_better(metric) is greater
    assert is_greater_better(metric, not greater) is not greater
