"""RegMean, against least squares in float64 and against bloomberg/dataless-model-merging, the authors' code.

``GOLDEN`` is what ``FedAvgMerger.regmean_mean_params`` of its commit 92247ae gives in float64 for the inputs and
weights that ``grid`` makes here, by off-diagonal factor.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergeready.errors import MismatchError, NonFiniteError, OptionError
from mergeready.experts import BaseIdentity, DeltaTaskVector, LowRank
from mergeready.merging import make_method, merge, merge_folders
from mergeready.merging.parameter import merged_delta
from mergeready.weights.source import TensorInfo
from tests.merging.formulas import NAME, merged
from tests.merging.test_fisher import grid
from tests.merging.worlds import equal, make_world, state, tensors_of

SHARES = [0.5, 0.3, 0.2]
GOLDEN = {
    0.9: [
        [0.22655112277071573, 0.09354770032090537, -0.2803600207859154],
        [0.1511200915148745, -0.22569001717298032, 0.7230634664994411],
    ],
    1.0: [
        [0.19477060036632737, 0.07193237661314761, -0.2809725749448151],
        [0.21157055595067636, -0.16032956342924864, 0.7796109142671419],
    ],
    0.0: [
        [0.42583514887436463, 0.14879079826976008, -0.3851481338976529],
        [-0.07416485112563542, -0.35120920173023984, 0.5086571758368604],
    ],
}


def grams(inputs: list[Tensor], end: str = "") -> list[dict[str, Tensor]]:
    return [{NAME + end: (x.double().T @ x.double() / len(x)).float()} for x in inputs]


def least_squares(inputs: list[Tensor], weights: list[Tensor], factors: list[float]) -> Tensor:
    """argmin Σ wᵢ/nᵢ ‖Xᵢ W − Xᵢ Wᵢ‖², by stacking; weights are (out, in)."""
    scaled = [(w / len(x)) ** 0.5 * x.double() for x, w in zip(inputs, factors, strict=True)]
    wanted = [x @ w.double().T for x, w in zip(scaled, weights, strict=True)]
    return torch.linalg.lstsq(torch.cat(scaled), torch.cat(wanted)).solution.T


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Inputs, deltas (out, in) and weights; each expert has enough inputs for a unique solution."""
    count, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    inputs = [torch.randn(30 + 10 * i, columns, generator=generator) for i in range(count)]
    deltas = [torch.randn(rows, columns, generator=generator) for _ in range(count)]
    factors = [draw(st.sampled_from([0.25, 1.0, 3.0])) for _ in range(count)]
    return inputs, deltas, factors


@given(cases())
def test_outputs_are_as_close_as_least_squares_gets(
    case: tuple[list[Tensor], list[Tensor], list[float]],
) -> None:
    inputs, deltas, factors = case
    ours = merged(make_method("regmean", grams=grams(inputs), alpha=1.0), deltas, factors)
    torch.testing.assert_close(ours.double(), least_squares(inputs, deltas, factors), rtol=1e-5, atol=1e-5)


@given(cases(), st.sampled_from([0.0, 0.1, 0.9, 1.0]))
def test_layers_that_store_their_weight_transposed(
    case: tuple[list[Tensor], list[Tensor], list[float]], alpha: float
) -> None:
    inputs, deltas, factors = case
    plain = merged(make_method("regmean", grams=grams(inputs), alpha=alpha), deltas, factors)
    turned = [delta.T.contiguous() for delta in deltas]
    ours = merged(make_method("regmean", grams=grams(inputs, "^T"), alpha=alpha), turned, factors)
    torch.testing.assert_close(ours, plain.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", GOLDEN)
def test_the_authors_code_gives_the_same(alpha: float) -> None:
    inputs = [grid((6, 3), k) for k in range(3)]
    weights = [grid((2, 3), 10 + k) for k in range(3)]
    base = torch.full((2, 3), 0.375)
    golden = torch.tensor(GOLDEN[alpha], dtype=torch.float64)
    method = make_method("regmean", grams=grams(inputs), alpha=alpha)
    # Their formula merges weights, ours what was added to the base: the base drops out.
    ours = base + merged(method, [w.float() - base for w in weights], SHARES)
    torch.testing.assert_close(ours.double(), golden, rtol=1e-5, atol=1e-6)


@given(cases())
def test_identity_one_hot_twins_and_order(case: tuple[list[Tensor], list[Tensor], list[float]]) -> None:
    inputs, deltas, factors = case
    made = grams(inputs)
    first = deltas[0]

    def regmean(sources: list[dict[str, Tensor]], changes: list[Tensor], shares: list[float]) -> Tensor:
        return merged(make_method("regmean", grams=sources), changes, shares)

    torch.testing.assert_close(regmean(made[:1], [first], [1.0]), first, rtol=1e-6, atol=1e-7)
    pair = [made[0], made[-1]]
    torch.testing.assert_close(regmean(pair, [first, deltas[-1]], [1.0, 0.0]), first, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(regmean(pair, [first, first], [0.5, 2.0]), first, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        regmean(made, deltas, factors), regmean(made[::-1], deltas[::-1], factors[::-1]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_what_no_input_shows_is_the_mean(alpha: float) -> None:
    """A feature that is always zero, and fewer inputs than features."""
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(4, 8, generator=generator) for _ in range(2)]
    inputs = [torch.randn(2, 8, generator=generator) for _ in range(2)]
    for x in inputs:
        x[:, 5] = 0
    ours = merged(make_method("regmean", grams=grams(inputs), alpha=alpha), deltas, [1.0, 3.0])
    mean = (deltas[0] + 3 * deltas[1]) / 4
    torch.testing.assert_close(ours[:, 5], mean[:, 5], rtol=1e-4, atol=1e-5)
    if alpha == 1:  # each expert's outputs on its own inputs can be met exactly
        for x, delta in zip(inputs, deltas, strict=True):
            torch.testing.assert_close(x @ ours.T, x @ delta.T, rtol=1e-3, atol=1e-3)
    nothing = merged(make_method("regmean", grams=grams([x * 0 for x in inputs])), deltas, [1.0, 3.0])
    torch.testing.assert_close(nothing, mean)


def test_low_rank_changes_need_not_be_made_dense() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [
        (torch.randn(5, 2, generator=generator), torch.randn(2, 7, generator=generator)) for _ in range(3)
    ]
    inputs = [torch.randn(40, 7, generator=generator) for _ in range(3)]
    rows = [torch.randn(40, 5, generator=generator) for _ in range(3)]
    info = TensorInfo((5, 7), torch.float32)
    vectors = [
        DeltaTaskVector({NAME: LowRank(B, A, (5, 7))}, {NAME: info}, BaseIdentity({}), "adapter")
        for B, A in factors
    ]
    for made in (grams(inputs), grams(rows, "^T")):
        method = make_method("regmean", grams=made)
        ours = merged_delta(method, NAME, info, vectors, [1.0, 1.0, 1.0])
        assert ours is not None
        torch.testing.assert_close(
            ours, merged(method, [B @ A for B, A in factors], [1.0] * 3), rtol=1e-5, atol=1e-5
        )


def test_an_expert_that_does_not_change_a_parameter_still_has_a_say() -> None:
    inputs = [grid((6, 3), k).float() for k in range(2)]
    delta = grid((2, 3), 10).float()
    method = make_method("regmean", grams=grams(inputs), alpha=1.0)
    ours = merged(method, [delta, None], [1.0, 1.0])
    exact = least_squares(inputs, [delta, torch.zeros(2, 3)], [1.0, 1.0])
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    silent = make_method("regmean", grams=[grams(inputs)[0], {"other": torch.ones(1, 1)}])
    torch.testing.assert_close(merged(silent, [delta, None], [1.0, 1.0]), delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rest", ["average", "task_arithmetic", "ties"])
def test_other_parameters_go_to_the_rest(tmp_path: Path, rest: str) -> None:
    world = make_world(tmp_path)
    linear = "bert.encoder.layer.0.output.dense.weight"
    made = [{linear: torch.eye(48) * (i + 1)} for i in range(2)]
    out = merge_folders(world.base_folder, world.folders, tmp_path / "out", "regmean", grams=made, rest=rest)
    other = merge(state(world.base), world.experts, rest)
    ours = tensors_of(out)
    assert equal({**ours, linear: other[linear]}, other)
    base, a, b = (model.state_dict()[linear] for model in (world.base, *world.experts))
    torch.testing.assert_close(ours[linear], base + ((a - base) + 2 * (b - base)) / 3, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    linear = "bert.encoder.layer.0.output.dense.weight"  # (32, 48)
    good = {linear: torch.eye(48)}

    def refused(error: type[Exception], match: str, made: object, **options: object) -> None:
        with pytest.raises(error, match=match):
            merge_folders(
                world.base_folder, world.folders, tmp_path / "out", "regmean", grams=made, **options
            )
        assert not (tmp_path / "out").exists()

    refused(
        MismatchError,
        r"state dict, for \S*expert-1, lacks bert\S+output\.dense\.weight",
        [good, {"x": torch.eye(2)}],
    )
    refused(MismatchError, r"is \(32, 32\), it must be \(48, 48\)", [good, {linear: torch.eye(32)}])
    refused(OptionError, "`input_grams` has 3 sources for 2 experts", [good] * 3)
    refused(OptionError, "none may be negative", [good, good], weights=[1.0, -0.1])


def test_options_outside_their_range_are_refused() -> None:
    made = [{NAME: torch.eye(3)}]
    with pytest.raises(OptionError, match=r"`alpha` must be in \[0, 1\]"):
        make_method("regmean", grams=made, alpha=1.1)
    with pytest.raises(OptionError, match="no merge method 'mean'"):
        make_method("regmean", grams=made, rest="mean")
    with pytest.raises(OptionError, match="`rest` must be an elementwise method, not 'tsv_m'"):
        make_method("regmean", grams=made, rest="tsv_m")
    with pytest.raises(OptionError, match="regmean needs `grams`"):
        make_method("regmean", alpha=0.5)


def test_broken_gram_matrices_are_named() -> None:
    broken = torch.eye(3)
    broken[1, 1] = float("nan")
    for gram in (broken, -torch.eye(3)):
        with pytest.raises(
            NonFiniteError, match=r"Gram matrices of layer\.weight are NaN, infinite or not positive"
        ):
            merged(make_method("regmean", grams=[{NAME: gram}]), [torch.ones(2, 3)], [1.0])
