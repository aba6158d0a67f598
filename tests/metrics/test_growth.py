from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.metrics import growth_per_step

norms = st.floats(0, 1e6)


@given(step=st.integers(1, 10**6), norm=norms)
def test_growth_since_the_base(step: int, norm: float) -> None:
    assert growth_per_step(step, norm) * step == pytest.approx(norm)


@given(earlier=st.integers(0, 1000), steps=st.integers(1, 1000), before=norms, after=norms)
def test_growth_since_a_measurement(earlier: int, steps: int, before: float, after: float) -> None:
    growth = growth_per_step(earlier + steps, after, earlier, before)
    assert before + steps * growth == pytest.approx(after, rel=1e-9, abs=1e-3)
    assert (growth > 0) == (after > before) or growth == 0


@pytest.mark.parametrize(("step", "earlier"), [(0, 0), (5, 5), (5, 6), (-1, 0)])
def test_an_earlier_step_must_be_earlier(step: int, earlier: int) -> None:
    with pytest.raises(OptionError, match="an earlier step"):
        growth_per_step(step, 1.0, earlier, 0.5)
