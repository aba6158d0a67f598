from __future__ import annotations

import dataclasses

import pytest

from mergeready.demo.settings import DemoSettings
from mergeready.errors import OptionError
from mergeready.training.policies import MergedPlateau
from mergeready.training.schedule import Schedule


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_steps(steps: int) -> None:
    with pytest.raises(OptionError, match=f"`steps` must be at least 2, not {steps}"):
        DemoSettings(steps=steps)
    assert DemoSettings(steps=2).steps == 2


@pytest.mark.parametrize("settings", [DemoSettings(), DemoSettings.quick()])
def test_settings_are_what_a_run_accepts(settings: DemoSettings) -> None:
    """And every expert is probed more than once, so that there is something to choose from."""
    schedule = Schedule(every=settings.probe_every, first=settings.probe_first)
    assert schedule.count_after(0, settings.steps) >= 3
    assert MergedPlateau(patience=settings.patience).patience < schedule.count_after(0, settings.steps)
    assert len(set(settings.methods)) >= 2


def test_quick_is_quick_and_keeps_what_was_asked_for() -> None:
    quick, full = DemoSettings.quick(joint=True, seed=3), DemoSettings()
    assert quick.steps < full.steps / 10
    assert quick.examples is not None
    assert quick.examples < 50
    assert (quick.joint, quick.seed) == (True, 3)
    assert (full.joint, full.seed, full.examples) == (False, 0, None)


def test_they_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DemoSettings().steps = 5  # type: ignore[misc]
