"""Fisher-weighted means, against float64 and against bloomberg/dataless-model-merging.

``GOLDEN`` and ``GOLDEN_NORMALISED`` are what ``FedAvgMerger.fisher_weighted_average`` of its commit 92247ae gives in
float64, with no smoothing, for the weights and Fisher values that ``grid`` makes here; the second with
``fisher_normalize="model"``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import MismatchError, NonFiniteError, OptionError
from mergeready.merging import make_method, merge, merge_folders
from mergeready.merging.double import in_arithmetic
from mergeready.merging.information import Collected
from mergeready.merging.parameter import merged_chunks
from tests.merging.formulas import NAME, merged, vectors
from tests.merging.methods import built
from tests.merging.worlds import equal, make_world, state, tensors_of

SHARES = [0.5, 0.3, 0.2]
GOLDEN = [
    [-0.5232919254658385, -0.1312351543942993, -0.6068239795918368],
    [-0.9301601423487543, -0.7857142857142857, -0.23479729729729729],
]
GOLDEN_NORMALISED = {
    "w": [
        [-0.527371505824756, -0.12477269121200521, -0.6020768686337118],
        [-0.9375020136944128, -0.785685604407826, -0.2442283170283224],
    ],
    "b": [-0.4375020136944127, -0.2856856044078259, -0.16582925854229078],
}


def grid(shape: tuple[int, ...], k: int) -> Tensor:
    numel = int(torch.tensor(shape).prod())
    return ((torch.arange(numel) * 37 + 11 * k) % 23 - 11).double().reshape(shape) / 8


def golden_inputs() -> tuple[list[Tensor], list[Tensor]]:
    return [grid((2, 3), 10 + k) for k in range(3)], [grid((2, 3), 20 + k).square() for k in range(3)]


def exact(deltas: list[Tensor], fishers: list[Tensor], factors: list[float], floor: float = 0.0) -> Tensor:
    """Matena and Raffel, equation 4, element by element in float64; a plain mean where nobody has a say."""
    result = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    for j in range(len(result)):
        says = [w * max(float(f.flatten()[j]), floor) for w, f in zip(factors, fishers, strict=True)]
        if sum(says) == 0:
            says = factors
        changes = [float(d.flatten()[j]) for d in deltas]
        result[j] = sum(s * c for s, c in zip(says, changes, strict=True)) / sum(says)
    return result.reshape(deltas[0].shape)


def sources(fishers: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{NAME: fisher.float()} for fisher in fishers]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[float]]:
    count = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 7)))
    deltas = [torch.randn(shape, generator=generator) for _ in range(count)]
    size = draw(st.sampled_from([1.0, 1e-12, 1e-30]))
    fishers = [size * (5 * torch.randn(shape, generator=generator)).exp() for _ in range(count)]
    fishers = [f * (torch.rand(shape, generator=generator) > 0.3) for f in fishers]
    factors = [draw(st.sampled_from([0.0, 0.25, 1.0, 3.0])) for _ in range(count)]
    factors[draw(st.integers(0, count - 1))] = 1.0
    return deltas, fishers, factors


@given(cases())
def test_the_formula(case: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    deltas, fishers, factors = case
    ours = merged(make_method("fisher", fisher=sources(fishers)), deltas, factors)
    torch.testing.assert_close(ours.double(), exact(deltas, fishers, factors), rtol=1e-5, atol=1e-6)


@given(cases())
def test_a_floor_counts_small_values_up(case: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    deltas, fishers, factors = case
    ours = merged(make_method("fisher", fisher=sources(fishers), floor=0.5), deltas, factors)
    torch.testing.assert_close(ours.double(), exact(deltas, fishers, factors, 0.5), rtol=1e-5, atol=1e-6)


def test_the_authors_of_regmean_get_the_same() -> None:
    weights, fishers = golden_inputs()
    ours = merged(make_method("fisher", fisher=sources(fishers)), [w.float() for w in weights], SHARES)
    torch.testing.assert_close(ours.double(), torch.tensor(GOLDEN, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_normalised_they_get_the_same_too() -> None:
    weights, fishers = golden_inputs()
    base = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
    experts = [{"w": w.float(), "b": w[0].float()} for w in weights]
    given_fishers = [{"w": f.float(), "b": 4 * f[1].float()} for f in fishers]
    ours = merge(base, experts, "fisher", fisher=given_fishers, normalise=True, weights=SHARES)
    for name, values in GOLDEN_NORMALISED.items():
        golden = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(ours[name].double(), golden, rtol=1e-6, atol=1e-7)


@given(cases())
def test_identity_one_hot_and_twins(case: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    deltas, fishers, _ = case
    first, fisher = deltas[0], fishers[0]
    assert torch.equal(merged(make_method("fisher", fisher=sources([fisher])), [first], [1.0]), first)
    pair = make_method("fisher", fisher=sources([fisher, fishers[-1]]))
    assert torch.equal(merged(pair, [first, deltas[-1]], [1.0, 0.0]), first)
    torch.testing.assert_close(merged(pair, [first, first], [0.5, 2.0]), first, rtol=1e-6, atol=0)


@given(cases())
def test_order_does_not_matter(case: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    deltas, fishers, factors = case
    ours = merged(make_method("fisher", fisher=sources(fishers)), deltas, factors)
    turned = merged(make_method("fisher", fisher=sources(fishers[::-1])), deltas[::-1], factors[::-1])
    torch.testing.assert_close(ours, turned, rtol=1e-5, atol=1e-6)


@given(cases(), st.floats(0.1, 10))
def test_only_proportions_of_weights_and_importances_count(
    case: tuple[list[Tensor], list[Tensor], list[float]], factor: float
) -> None:
    deltas, fishers, factors = case
    ours = merged(make_method("fisher", fisher=sources(fishers)), deltas, factors)
    scaled = make_method("fisher", fisher=sources([factor * f for f in fishers]))
    torch.testing.assert_close(
        merged(scaled, deltas, [factor * w for w in factors]), ours, rtol=1e-4, atol=1e-6
    )


def test_an_expert_that_has_nothing_to_say_about_what_it_did_not_change() -> None:
    deltas = [torch.ones(2, 3), None]
    method = make_method("fisher", fisher=[{NAME: torch.full((2, 3), 1e-9)}, {"other": torch.ones(1)}])
    assert torch.equal(merged(method, deltas, [1.0, 1.0]), torch.ones(2, 3))
    known = make_method("fisher", fisher=[{NAME: torch.ones(2, 3)}, {NAME: torch.full((2, 3), 3.0)}])
    assert torch.equal(merged(known, deltas, [1.0, 1.0]), torch.full((2, 3), 0.25))


def test_files_and_dicts_give_the_same_merge_and_the_merge_records_the_files(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    shapes = state(world.base)
    fishers = [{n: torch.rand(t.shape) for n, t in shapes.items()} for _ in world.experts]
    paths = [Collected(f, "fisher").save(tmp_path / f"{i}.safetensors") for i, f in enumerate(fishers)]
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", "fisher", fisher=paths)
    assert equal(tensors_of(out), merge(shapes, world.experts, "fisher", fisher=fishers))
    record = (out / "mergeready.json").read_text()
    assert all(path.name in record for path in paths)
    assert all(
        found["fingerprint"] in record for found in make_method("fisher", fisher=paths).describe()["fisher"]
    )
    text = ",".join(map(str, paths))  # as a command line gives them
    assert make_method("fisher", fisher=text) == make_method("fisher", fisher=paths)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    fisher = {n: torch.rand(t.shape) for n, t in state(world.base).items()}
    short = {n: t for n, t in fisher.items() if n not in ("classifier.weight", "classifier.bias")}
    bent = fisher | {"classifier.bias": torch.rand(7)}

    def refused(error: type[Exception], match: str, given_fisher: object, **options: object) -> None:
        with pytest.raises(error, match=match):
            merge_folders(
                world.base_folder, world.folders, tmp_path / "out", "fisher", fisher=given_fisher, **options
            )
        assert not (tmp_path / "out").exists()

    refused(
        MismatchError,
        r"state dict, for \S*expert-1, lacks classifier\.bias, .*lacks classifier\.weight",
        [fisher, short],
    )
    refused(MismatchError, r"classifier\.bias in state dict is \(7,\), it must be \(3,\)", [bent, fisher])
    refused(OptionError, "`fisher` has 1 sources for 2 experts", [fisher])
    refused(OptionError, "shares: none may be negative", [fisher, fisher], weights=[1.0, -1.0])
    refused(OptionError, "one must be positive", [fisher, fisher], weights=[0.0, 0.0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_values_that_are_no_fisher_information_are_refused(value: float) -> None:
    broken = torch.ones(2, 3)
    broken[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"values of layer\.weight that are no Fisher information"):
        merged(make_method("fisher", fisher=[{NAME: broken}]), [torch.ones(2, 3)], [1.0])


@pytest.mark.parametrize("floor", [-1e-9, float("nan"), float("inf"), "low"])
def test_floors_outside_the_range_are_refused(floor: object) -> None:
    with pytest.raises(OptionError, match="`floor` must be"):
        make_method("fisher", fisher=[{NAME: torch.ones(1)}], floor=floor)


def test_no_as_text_is_not_taken_for_yes() -> None:
    with pytest.raises(OptionError, match="`normalise` must be true or false, not 'no'"):
        make_method("fisher", fisher=[{NAME: torch.ones(1)}], normalise="no")


def test_it_needs_data() -> None:
    with pytest.raises(OptionError, match="fisher needs `fisher`"):
        make_method("fisher")
    with pytest.raises(OptionError, match="`fisher` is empty"):
        make_method("fisher", fisher=[])
    zero = make_method("fisher", fisher=[{NAME: torch.zeros(2, 3)}], normalise=True)
    with pytest.raises(NonFiniteError, match="cannot be normalised: its norm is 0"):
        merged(zero, [torch.ones(2, 3)], [1.0])


@given(cases())
def test_sums_in_float64(case: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    deltas, fishers, factors = case
    method = in_arithmetic("float64", make_method("fisher", fisher=sources(fishers)))
    made = vectors(deltas)
    pieces = [p for _, _, p in merged_chunks(method, NAME, made[0].infos[NAME], made, factors)]
    ours = torch.cat(pieces).reshape(deltas[0].shape)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact(deltas, fishers, factors), rtol=1e-12, atol=1e-14)


def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    method = built("fisher", state(world.base), 2)
    outs = [
        merge_folders(world.base_folder, world.folders, tmp_path / f"{n}", method, threads=n) for n in (1, 3)
    ]
    assert equal(*map(tensors_of, outs))
