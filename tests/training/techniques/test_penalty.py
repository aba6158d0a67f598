"""What all penalties share: when their gradient is due, and how strong it is then."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.training.kronecker import kronecker_factors
from mergeready.training.techniques.drift_penalty import DriftPenalty
from mergeready.training.techniques.jacobian_penalty import JacobianPenalty
from mergeready.training.techniques.kronecker_penalty import KroneckerPenalty
from mergeready.training.techniques.penalty import Penalty
from tests.models import perturb
from tests.training.small import Net, equal, examples, state_of
from tests.training.techniques.drive import adamw, net, started, train


def kronecker(every: int) -> Penalty:
    factors = kronecker_factors(Net(), [examples(2, 0, 24)[0]], base=Net())
    return KroneckerPenalty(factors=[factors], strength=3.0, every=every)


def jacobian(every: int) -> Penalty:
    return JacobianPenalty(inputs=[[examples(task, 0, 6)[0]] for task in (2, 3)], every=every)


def drift(every: int) -> Penalty:
    return DriftPenalty(strength=0.5, every=every)


@pytest.mark.parametrize("make", [drift, kronecker, jacobian])
def test_a_rare_gradient_is_as_many_times_stronger(make: Callable[[int], Penalty]) -> None:
    base = Net()
    model = perturb(copy.deepcopy(base), 1, 0.1)

    def gradients(every: int, steps: int) -> list[Tensor | None]:
        chosen, found = started([make(every)], model, base), []
        for step in range(1, steps + 1):
            for _ in chosen.passes():
                pass
            found.append(model.head.weight.grad)
            model.zero_grad()
            chosen.took_step(step)
        return found

    always, sometimes = gradients(1, 2), gradients(3, 6)
    assert [gradient is None for gradient in sometimes] == [True, True, False] * 2
    for one, other in zip(always, sometimes[2::3], strict=True):  # the same turns: of a peer, of its batches
        torch.testing.assert_close(other, 3 * one)


def test_a_resumed_run_keeps_the_rhythm() -> None:
    def run(stops: list[int]) -> dict[str, Tensor]:
        model = net()
        optimizer, first = adamw(model), 1
        for last in stops:
            chosen = started([drift(3)], model, Net(), optimizer=optimizer, step=first - 1)
            train(chosen, model, optimizer, first, last)
            first = last + 1
        return state_of(model)

    assert equal(run([8]), run([4, 8]))
    assert not equal(run([8]), run([2]))


def test_ranges() -> None:
    with pytest.raises(OptionError, match=r"`strength` must be .* not -1; `every` must be at least 1, not 0"):
        DriftPenalty(strength=-1, every=0)
