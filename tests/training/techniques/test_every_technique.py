"""What holds for every technique there is: it acts, off is off, a run can be resumed; and neither accumulation nor a
gradient scaler changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready.training.techniques.registry import technique_class, technique_names
from mergeready.training.techniques.technique_set import TechniqueSet
from tests.training.small import equal
from tests.training.techniques.every import CASES, OFF
from tests.training.techniques.runs import run, saved


def test_no_technique_is_left_out() -> None:
    assert {case.technique.name for case in CASES.values()} == set(technique_names())
    always_on = {name for name in technique_names() if "is_off" not in vars_of(name)}
    assert {technique.name for technique in OFF} == set(technique_names()) - always_on


def vars_of(name: str) -> set[str]:
    """What a technique's class and its bases define, but the interface."""
    return {key for kind in technique_class(name).__mro__[:-3] for key in vars(kind)}


def test_switched_off_is_bit_identical(tmp_path: Path) -> None:
    assert equal(run(tmp_path / "a", OFF), run(tmp_path / "b", []))
    assert not TechniqueSet(OFF)


@pytest.mark.parametrize("name", CASES)
def test_it_acts_and_neither_micro_batches_nor_a_scaler_change_how(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain, one, four, scaled = (
        run(tmp_path / f"{n}", techniques, micro=micro, scale=scale, model=case.model(), **case.arguments)
        for n, (techniques, micro, scale) in enumerate(
            [
                ([], 1, 1.0),
                ([case.technique], 1, 1.0),
                ([case.technique], 4, 1.0),
                ([case.technique], 4, 1024.0),
            ]
        )
    )
    assert not equal(one, plain)
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(scaled[key], four[key], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    case, states = CASES[name], {}
    whole = run(
        tmp_path / "a",
        [case.technique],
        model=case.model(),
        after=lambda step, *parts: states.update({step: saved(*parts)}),
        **case.arguments,
    )
    state: Any = states[3]
    resumed = run(tmp_path / "b", [case.technique], model=case.model(), state=state, **case.arguments)
    assert equal(resumed, whole)
