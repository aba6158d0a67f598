"""What merges of whole matrices must satisfy, for full checkpoints and for every LoRA variant.

==========================================  ======================================================================
invariant                                   who satisfies it, up to rounding
==========================================  ======================================================================
``merge([a], [1]) = a``                     tsv_m, wudi, svc (α ≤ 1), core_space around tsv_m, knots where its inner
                                            method does; not iso_c and iso_cts, which flatten the spectrum
``merge([a, b], [1, 0]) = merge([a], [1])``  all
``merge([a, a], [½, ½]) = merge([a], [1])``  iso_c; knots and core_space where the inner method does
``merge([a, a], [1, 1]) = merge([a], [1])``  wudi at ridge 0, svc, and tsv_m while ranks fit: what is shared counts once
order does not matter                       all (around methods for which it does not)
``merge([a, a], [1, −1]) = 0``              all
``merge([ca, cb]) = c · merge([a, b])``     all
==========================================  ======================================================================
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeready.merging import MergeMethod, make_method, merge
from tests.experts.test_peft_lora import logits
from tests.merging.matrices import adapters, error, matrices, matrix_of, merged, shapes
from tests.merging.test_invariants import Adapted, adapted, computes, each  # noqa: F401 - a fixture

UNTRIMMED = make_method("knots", inner={"method": "ties", "density": 1.0})
EXACT = make_method("wudi", ridge=0)
KEEPING = [
    make_method("tsv_m"),
    make_method("wudi"),
    EXACT,
    make_method("svc", rest="average"),
    make_method("core_space"),
    UNTRIMMED,
]
HALVES = [
    make_method("iso_c"),
    UNTRIMMED,
    make_method("knots"),
    make_method("core_space", inner="iso_c"),
    make_method("core_space", inner="average"),
]
ONCE = [EXACT, make_method("svc", rest="average")]
ALL = [*KEEPING, make_method("iso_c"), make_method("iso_cts"), make_method("core_space", inner="ties")]

seeds = st.integers(0, 999)


@each(KEEPING)
def test_identity(method: MergeMethod) -> None:
    @given(shape=shapes, seed=seeds)
    def check(shape: tuple[int, int], seed: int) -> None:
        (a,) = matrices(shape, 1, seed)
        assert error(merged(method, [a], [1.0]), matrix_of(a)) < 1e-5

    check()


@each(ALL)
def test_one_hot(method: MergeMethod) -> None:
    @given(shape=shapes, seed=seeds, low_rank=st.booleans())
    def check(shape: tuple[int, int], seed: int, low_rank: bool) -> None:
        a, b = adapters(shape, [2, 1], seed) if low_rank else matrices(shape, 2, seed)
        alone = merged(method, [a], [1.0])
        assert torch.equal(merged(method, [a, b], [1.0, 0.0]), alone)
        assert torch.equal(merged(method, [b, a], [0.0, 1.0]), alone)

    check()


@each(HALVES)
def test_half_and_half_of_one_expert_is_that_expert(method: MergeMethod) -> None:
    for a in (*matrices((12, 20), 1), *adapters((12, 20), [3])):
        assert error(merged(method, [a, a], [0.5, 0.5]), matrix_of(merged(method, [a], [1.0]))) < 1e-5


@each([*ONCE, make_method("tsv_m")])
def test_an_expert_given_twice_counts_once(method: MergeMethod) -> None:
    for a in (*(matrices((12, 20), 1) if method in ONCE else []), *adapters((12, 20), [3])):
        assert error(merged(method, [a, a], [1.0, 1.0]), matrix_of(a)) < 1e-5


@each(ALL)
def test_order(method: MergeMethod) -> None:
    factors = [0.5, 1.0, -0.25]
    for three in (matrices((12, 20), 3), adapters((20, 12), [2, 1, 2])):
        straight = matrix_of(merged(method, three, factors))
        assert error(merged(method, three[::-1], factors[::-1]), straight) < 1e-5


@each(ALL)
def test_negation(method: MergeMethod) -> None:
    for a in (*matrices((12, 20), 1), *adapters((12, 20), [3])):
        gone = merged(method, [a, a], [1.0, -1.0])
        assert float(gone.norm()) < 1e-6 * float(torch.from_numpy(matrix_of(a)).norm())


@each(ALL)
def test_a_common_factor(method: MergeMethod) -> None:
    pair = matrices((12, 20), 2)
    once = merged(method, pair, [1.0, 0.5])
    times = merged(method, [4 * delta for delta in pair], [1.0, 0.5])
    assert error(times, matrix_of(4 * once)) < 1e-5


# Every LoRA variant, by what the merged model computes. Low-rank deltas, dense ones, rows and vectors all occur.


@each(KEEPING)
def test_adapter_identity(adapted: Adapted, method: MergeMethod) -> None:  # noqa: F811
    computes(merge(adapted.base, adapted.folders[:1], method, weights=[1.0]), adapted.logits_a)
    computes(merge(adapted.base, adapted.folders, method, weights=[1.0, 0.0]), adapted.logits_a)


@pytest.mark.slow
@each(ALL)
def test_adapter_order_and_negation(adapted: Adapted, method: MergeMethod) -> None:  # noqa: F811
    straight = logits(merge(adapted.base, adapted.folders, method, weights=[0.5, 0.75]))
    torch.testing.assert_close(
        logits(merge(adapted.base, adapted.folders[::-1], method, weights=[0.75, 0.5])),
        straight,
        rtol=1e-3,
        atol=1e-4,
    )
    gone = merge(adapted.base, adapted.folders[:1] * 2, method, weights=[1.0, -1.0])
    computes(gone, logits(adapted.base))


@pytest.mark.slow
@each(ONCE)
def test_adapter_given_twice_counts_once(adapted: Adapted, method: MergeMethod) -> None:  # noqa: F811
    computes(merge(adapted.base, adapted.folders[:1] * 2, method, weights=[1.0, 1.0]), adapted.logits_a)
