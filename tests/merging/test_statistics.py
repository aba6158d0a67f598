from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergeready.errors import MismatchError, OptionError
from mergeready.experts import open_expert
from mergeready.experts.open import Expert
from mergeready.merging.statistics import check_statistics, merged_statistic
from mergeready.weights import StateDictSource

MEAN = "norm.running_mean"


def state(seed: int, **changes: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(4, 4)
    torch.manual_seed(seed)
    return {
        "norm.weight": weight + 0.01 * torch.randn(4, 4),
        MEAN: torch.randn(4),
        "norm.running_var": torch.rand(4),
        "norm.num_batches_tracked": torch.tensor(seed),
        "index": torch.arange(4) + seed,
    } | changes


def opened(*states: dict[str, Tensor]) -> list[Expert]:
    return [open_expert(s, state(0)) for s in states]


def merged(name: str, how: str, *states: dict[str, Tensor]) -> Tensor:
    return merged_statistic(name, StateDictSource(state(0)), opened(*states), how)


@pytest.mark.parametrize("name", [MEAN, "norm.running_var", "norm.num_batches_tracked", "index"])
def test_the_base_s_values_stay_unless_told(name: str) -> None:
    assert torch.equal(merged(name, "base", state(1), state(2)), state(0)[name])


@pytest.mark.parametrize("name", [MEAN, "norm.running_var"])
def test_the_average_is_over_the_experts(name: str) -> None:
    exact = torch.stack([state(seed)[name].double() for seed in (1, 2, 3)]).mean(0)
    ours = merged(name, "average", state(1), state(2), state(3))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["norm.num_batches_tracked", "index"])
def test_integers_are_never_averaged(name: str) -> None:
    assert torch.equal(merged(name, "average", state(1), state(2)), state(0)[name])


def test_the_base_s_dtype_stays() -> None:
    base = StateDictSource(state(0, **{MEAN: torch.zeros(4).bfloat16()}))
    ours = merged_statistic(MEAN, base, opened(state(1), state(2)), "average")
    assert ours.dtype == torch.bfloat16


def test_experts_without_the_statistic_do_not_count() -> None:
    without = state(1)
    del without[MEAN]
    torch.testing.assert_close(merged(MEAN, "average", without, state(2)), state(2)[MEAN])
    assert torch.equal(merged(MEAN, "average", without), state(0)[MEAN])


def test_adapters_and_task_vectors_have_none() -> None:
    (expert,) = opened(state(1))
    vector = open_expert(expert.vector, state(0))
    base = StateDictSource(state(0))
    assert torch.equal(merged_statistic(MEAN, base, [vector], "average"), state(0)[MEAN])
    assert torch.equal(merged_statistic(MEAN, base, [vector, expert], "average"), state(1)[MEAN])


def test_a_model_prefix_does_not_hide_an_expert_s_statistics() -> None:
    prefixed = {f"model.{name}": tensor for name, tensor in state(1).items()}
    torch.testing.assert_close(merged(MEAN, "average", prefixed), state(1)[MEAN])


def test_statistics_of_another_shape_are_refused() -> None:
    with pytest.raises(
        MismatchError, match=r"norm\.running_mean of state dict is \(5,\), in the base \(4,\)"
    ):
        merged(MEAN, "average", state(1, **{MEAN: torch.zeros(5)}))


def test_an_unknown_source_is_refused() -> None:
    assert check_statistics("base") == "base"
    assert check_statistics("average") == "average"
    with pytest.raises(OptionError, match="must be base or average, not 'mean'"):
        check_statistics("mean")
