from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.merging import (
    ElementwiseMethod,
    MergeMethod,
    Place,
    make_method,
    method_class,
    method_names,
    register,
)
from mergeready.merging.registry import _METHODS, require_fraction
from tests.merging.methods import built

OWN = ["average", "dare_linear", "dare_ties", "task_arithmetic", "ties"]
OWN += ["breadcrumbs", "consensus", "della", "della_linear", "model_stock", "pcb", "sce", "slerp"]

DENSE = ["ties", "dare_linear", "dare_ties", "breadcrumbs", "pcb"]


@pytest.fixture
def registry() -> Iterator[None]:
    """Whatever a test registers is forgotten again."""
    known = _METHODS._classes
    before = dict(known)
    yield
    known.clear()
    known.update(before)


@dataclass(frozen=True, kw_only=True)
class First(ElementwiseMethod):
    """The first expert, scaled."""

    name: ClassVar[str] = "first"
    factor: float = 2.0

    def combine(
        self, deltas: Sequence[Tensor], weights: Sequence[float], prepared: Sequence[Any], place: Place
    ) -> Tensor:
        return deltas[0].mul_(self.factor)


def test_every_method_is_registered_under_its_name() -> None:
    assert set(OWN) <= set(method_names())
    assert method_names() == sorted(method_names())
    assert all(method_class(name).name == name for name in method_names())
    state = {"layer.weight": torch.zeros(3, 2)}
    assert all(built(name, state, 2).describe()["method"] == name for name in method_names())


def test_parameters_reach_the_method() -> None:
    assert make_method("dare_ties", density=0.25, seed=7).describe() == {
        "method": "dare_ties",
        "density": 0.25,
        "seed": 7,
    }
    assert make_method("ties").describe() == {"method": "ties", "density": 0.2}


def test_a_method_of_the_user_s_own(registry: None) -> None:
    assert register(First) is First
    assert "first" in method_names()
    assert make_method("first", factor=3.0) == First(factor=3.0)
    with pytest.raises(OptionError, match="named 'first' exists already"):
        register(First)


def test_an_instance_passes_through() -> None:
    method = First(factor=3.0)
    assert make_method(method) is method
    with pytest.raises(OptionError, match="parameters factor belong into the first object itself"):
        make_method(method, factor=4.0)


def test_an_unknown_name_lists_those_that_there_are() -> None:
    with pytest.raises(OptionError, match=r"no merge method 'tis'; known are average, .*ties"):
        make_method("tis")
    with pytest.raises(OptionError, match="known are"):
        method_class("")


def test_unknown_parameters_are_listed() -> None:
    with pytest.raises(OptionError, match="ties has no parameter rho, k; it has density"):
        make_method("ties", rho=0.2, density=0.1, k=3)
    with pytest.raises(OptionError, match="average has no parameter density; it has none"):
        make_method("average", density=0.1)


@pytest.mark.parametrize("name", [*DENSE, "della", "della_linear"])
@pytest.mark.parametrize("density", [0, -0.1, 1.0001, float("nan"), float("inf"), "0.5", None])
def test_densities_outside_the_range_are_refused(name: str, density: object) -> None:
    with pytest.raises(OptionError, match=r"`density` must be in \(0, 1\]"):
        make_method(name, density=density)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("density", [1e-9, 0.2, 1, 1.0])
def test_densities_inside_the_range_are_accepted(name: str, density: float) -> None:
    assert make_method(name, density=density).describe()["density"] == density


def test_a_share_may_be_zero_where_that_means_something() -> None:
    require_fraction("x", 0, zero=True)
    with pytest.raises(OptionError, match=r"`x` must be in \[0, 1\], not -1"):
        require_fraction("x", -1, zero=True)


def test_methods_cannot_be_changed_and_compare_by_value() -> None:
    method: MergeMethod = make_method("ties", density=0.3)
    with pytest.raises(FrozenInstanceError):
        method.density = 0.4
    assert method == make_method("ties", density=0.3) != make_method("ties", density=0.4)
    assert len({method, make_method("ties", density=0.3), make_method("dare_ties", density=0.3)}) == 2
