from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergeready.errors import BaseMismatchError
from mergeready.experts import BaseIdentity, Delta, DeltaTaskVector, Dense, LowRank, TaskVector, dense
from mergeready.experts.arithmetic import Difference, Without
from mergeready.weights import StateDictSource
from tests.merging.matrices import adapters

BASE = StateDictSource({name: torch.ones(12, 20) for name in ("both", "first", "second", "untouched")})


def vector(**deltas: Delta | Tensor) -> DeltaTaskVector:
    made = {name: Dense(d) if isinstance(d, Tensor) else d for name, d in deltas.items()}
    return DeltaTaskVector(made, BASE.infos, BaseIdentity.of(BASE), "+".join(deltas))


def both_ways(found: TaskVector, name: str) -> Tensor:
    """The delta, which must be what its pieces are."""
    whole = dense(found[name])
    pieces = [found.flat(name, start, min(start + 33, 240)) for start in range(0, 240, 33)]
    torch.testing.assert_close(torch.cat(pieces).reshape(12, 20), whole, rtol=1e-5, atol=1e-6)
    return whole


def test_difference_of_any_forms() -> None:
    low, other = adapters((12, 20), [2, 3])
    full = torch.randn(12, 20)
    for a, b in ((low, other), (low, full), (full, low), (full, 2 * full)):
        first, second = vector(both=a, first=a), vector(both=b, second=b)
        found = Difference(first, second)
        assert set(found) == {"both", "first", "second"}
        A, B = dense(first["first"]), dense(second["second"])
        torch.testing.assert_close(both_ways(found, "both"), A - B)
        torch.testing.assert_close(both_ways(found, "first"), A)
        torch.testing.assert_close(both_ways(found, "second"), -B)
    assert isinstance(Difference(vector(both=low), vector(both=other))["both"], LowRank)


def test_reading_changes_neither_expert() -> None:
    a, b = torch.randn(2, 12, 20)
    kept = a.clone(), b.clone()
    first, second = vector(both=a), vector(both=b, second=b)
    for made in (Difference(first, second), Without(first, second), Without(second, first)):
        for name in made:
            both_ways(made, name)
    assert torch.equal(a, kept[0])
    assert torch.equal(b, kept[1])


def test_a_model_on_an_accelerator_and_a_file() -> None:
    """Results are where the first is; the meta device stands for an accelerator."""
    low, other = adapters((12, 20), [2, 3])
    there = LowRank(low.B.to("meta"), low.A.to("meta"), low.shape)
    for first, second in ((there, other), (torch.randn(12, 20, device="meta"), torch.randn(12, 20))):
        found = Difference(vector(both=first), vector(both=second))
        assert found.flat("both", 0, 30).device.type == "meta"
        delta = found["both"]
        assert (delta.B if isinstance(delta, LowRank) else delta.value).device.type == "meta"


def test_what_is_left_has_nothing_of_the_direction() -> None:
    a, b = torch.randn(2, 12, 20)
    found = Without(vector(both=a, first=a), vector(both=b, second=b))
    assert set(found) == {"both", "first"}
    left = both_ways(found, "both").double()
    assert float((left * b).sum()) == pytest.approx(0, abs=1e-4)
    part = a.double() - left
    torch.testing.assert_close(
        part / part.norm(), (b / b.norm()).double() * torch.sign((a * b).sum()), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(both_ways(found, "first"), a)


def test_a_direction_of_zeros_takes_nothing() -> None:
    a = torch.randn(12, 20)
    assert torch.equal(both_ways(Without(vector(both=a), vector(both=torch.zeros(12, 20))), "both"), a)


def test_both_must_be_of_one_base() -> None:
    other = StateDictSource({"both": torch.zeros(12, 20)})
    stranger = DeltaTaskVector(
        {"both": Dense(torch.ones(12, 20))}, other.infos, BaseIdentity.of(other), "stranger"
    )
    for make in (Difference, Without):
        with pytest.raises(BaseMismatchError, match="stranger was made for another base"):
            make(vector(both=torch.ones(12, 20)), stranger)
