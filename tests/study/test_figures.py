from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from mergeready.study import figures


class Labels:
    """Results that have merge methods and nothing else."""

    def __init__(self, *methods: str) -> None:
        self.methods = methods

    def labels(self, kind: str) -> list[str]:
        assert kind == "method"
        return ["expert", *self.methods]


def colors(*methods: str) -> dict[str, str]:
    return figures._colors(Labels(*methods))  # type: ignore[arg-type]


def test_a_method_has_one_colour_in_every_study() -> None:
    few, many = colors("tsv_m", "ties"), colors("average", "mine", "ties", "task_arithmetic", "tsv_m")
    assert few["ties"] == many["ties"]
    assert few["tsv_m"] == many["tsv_m"]
    assert few["expert"] == many["expert"]


@pytest.mark.parametrize("own", [1, 4])
def test_colours_of_one_figure_differ(own: int) -> None:
    found = colors(
        "average", "ties", "task_arithmetic", "tsv_m", "dare_ties", *(f"own {i}" for i in range(own))
    )
    assert len(set(found.values())) == len(found) == own + 6


def test_intervals_of_few_seeds_do_not_reach_beyond_what_an_accuracy_can_be() -> None:
    axes = Figure().subplots()
    axes.plot([-0.7, 1.7], [1, 1])
    for metric, low, high in (("accuracy", -0.02, 1.02), ("loss", *axes.get_xlim())):
        axes.autoscale()
        figures._keep_possible(axes.set_xlim, axes.get_xlim(), metric)
        assert axes.get_xlim() == pytest.approx((low, high))
