"""What every merge must satisfy, for full checkpoints and for every LoRA variant.

Which method satisfies what:

=================  ==================================================================================
invariant          who satisfies it
=================  ==================================================================================
identity, one-hot  average, task_arithmetic, consensus and model_stock; ties, dare, della and breadcrumbs
                   at density 1: below, ``merge([a, b], [1, 0])`` is still what ``merge([a], [1])`` is;
                   slerp one-hot, as it is for two
twins, negation    the same; ties and breadcrumbs at any density; dare and della at density 1 only, since
                   twins at two positions have two masks
order              the same: the mask of dare and della belongs to a position
linear in weights  task_arithmetic; breadcrumbs, dare_linear and della_linear at any density; average,
                   model_stock and slerp are means, the others elect signs or compare
=================  ==================================================================================

pcb clips and weighs what it keeps: up to rounding it satisfies one-hot, twins, order and negation
(``test_pcb.py``), but never identity. sce selects where experts differ, so twins merge to nothing (``test_sce.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn

from mergeready.merging import MergeMethod, make_method, merge, merge_folders
from tests.experts.test_peft_lora import VARIANTS, Variant, logits, trained
from tests.merging.worlds import Tensors, equal, tensors_of

DENSITIES = (0.25, 0.5)
SUMS = [
    make_method("task_arithmetic"),
    *(make_method("dare_linear", density=d, seed=3) for d in (*DENSITIES, 1.0)),
    *(make_method("breadcrumbs", density=d, gamma=0.1) for d in DENSITIES),
    make_method("della_linear", density=1.0),
]
TRIMS = [
    *(make_method("ties", density=d) for d in DENSITIES),
    *(make_method("breadcrumbs", density=d, gamma=0.1) for d in DENSITIES),
]
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
DROPS = [make_method(name, density=d, seed=3) for name in RANDOM for d in DENSITIES]
PAIRS = [make_method("slerp")]


def whole(name: str) -> MergeMethod:
    """A method that keeps every entry."""
    return make_method(name, **({"density": 1.0} if "density" in make_method(name).describe() else {}))


MEANS = ("average", "task_arithmetic", "consensus", "model_stock")
WHOLE = [whole(n) for n in (*MEANS, "ties", "breadcrumbs", *RANDOM)]


def each(methods: Sequence[MergeMethod]) -> Callable[..., object]:
    return pytest.mark.parametrize("method", methods, ids=lambda m: "-".join(map(str, m.describe().values())))


def each_on_adapters(methods: Sequence[MergeMethod]) -> Callable[..., object]:
    """All methods on all variants take long: those that differ in nothing that concerns adapters are slow tests."""
    quick = ("average", "task_arithmetic", "ties", "dare_linear", "dare_ties")
    marked = [pytest.param(m, marks=() if m.name in quick else pytest.mark.slow) for m in methods]
    return each(marked)


# Full checkpoints. All numbers lie on a grid on which fp32 makes no rounding errors: equality is exact.

SHAPES = {"a.weight": (6, 7), "b.weight": (5, 5), "b.bias": (9,), "s": ()}


def base() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(-(2**12), 2**12, s, generator=generator) / 2.0**12 for n, s in SHAPES.items()}


def expert(seed: int) -> Tensors:
    """The base and small changes, some of them zero and many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randint(-8, 9, tensor.shape, generator=generator) / 2.0**10
        for name, tensor in base().items()
    }


def delta(method: MergeMethod, experts: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    merged = merge(base(), experts, method, weights=weights)
    return {name: merged[name] - tensor for name, tensor in base().items()}


def minus_base(tensors: Tensors) -> Tensors:
    return {name: tensor - base()[name] for name, tensor in tensors.items()}


seeds = st.integers(1, 9999)
weights = st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0, 2.0])


@each(WHOLE)
def test_identity(method: MergeMethod) -> None:
    @given(a=seeds)
    def check(a: int) -> None:
        assert equal(merge(base(), [expert(a)], method, weights=[1.0]), expert(a))

    check()


def alone(method: MergeMethod, a: int) -> Tensors:
    return expert(a) if method in PAIRS else merge(base(), [expert(a)], method, weights=[1.0])


@each([*WHOLE, *TRIMS, *DROPS, *PAIRS])
def test_one_hot(method: MergeMethod) -> None:
    @given(a=seeds, b=seeds)
    def check(a: int, b: int) -> None:
        one = alone(method, a)
        assert equal(merge(base(), [expert(a), expert(b)], method, weights=[1.0, 0.0]), one)
        if method in (*WHOLE, *PAIRS):
            assert equal(merge(base(), [expert(b), expert(a)], method, weights=[0.0, 1.0]), expert(a))

    check()


@each([*WHOLE, *TRIMS, *PAIRS])
def test_twins(method: MergeMethod) -> None:
    @given(a=seeds)
    def check(a: int) -> None:
        twins = merge(base(), [expert(a), expert(a)], method, weights=[0.5, 0.5])
        assert equal(twins, alone(method, a))

    check()


@each([*WHOLE, *TRIMS, *PAIRS])
def test_order(method: MergeMethod) -> None:
    @given(
        data=st.data(),
        chosen=st.lists(seeds, min_size=2, max_size=4),
        factors=st.lists(weights, min_size=4, max_size=4),
    )
    def check(data: st.DataObject, chosen: list[int], factors: list[float]) -> None:
        chosen = chosen[:2] if method in PAIRS else chosen
        order = data.draw(st.permutations(range(len(chosen))))
        straight = merge(base(), [expert(s) for s in chosen], method, weights=factors[: len(chosen)])
        shuffled = merge(
            base(), [expert(chosen[i]) for i in order], method, weights=[factors[i] for i in order]
        )
        for name, tensor in straight.items():
            torch.testing.assert_close(shuffled[name], tensor, rtol=1e-6, atol=1e-6)

    check()


@each(SUMS)
def test_linear_in_the_weights(method: MergeMethod) -> None:
    @given(a=seeds, b=seeds, first=st.tuples(weights, weights), second=st.tuples(weights, weights))
    def check(a: int, b: int, first: tuple[float, float], second: tuple[float, float]) -> None:
        pair = [expert(a), expert(b)]
        together = delta(method, pair, [x + y for x, y in zip(first, second, strict=True)])
        one, two = delta(method, pair, first), delta(method, pair, second)
        assert equal(together, {name: one[name] + two[name] for name in one})

    check()


@each([*WHOLE, *TRIMS, *PAIRS])
def test_negation(method: MergeMethod) -> None:
    @given(a=seeds)
    def check(a: int) -> None:
        assert equal(merge(base(), [expert(a), expert(a)], method, weights=[1.0, -1.0]), base())

    check()


@each([*WHOLE, *TRIMS, *DROPS, *PAIRS])
def test_scale(method: MergeMethod) -> None:
    @given(a=seeds, b=seeds, scale=weights)
    def check(a: int, b: int, scale: float) -> None:
        pair = [expert(a), expert(b)]
        once, scaled = merge(base(), pair, method), merge(base(), pair, method, scale=scale)
        for name, tensor in minus_base(once).items():
            torch.testing.assert_close(minus_base(scaled)[name], scale * tensor, rtol=1e-5, atol=1e-6)

    check()


@each(DROPS)
def test_random_methods_are_repeatable_and_have_their_mean(method: MergeMethod) -> None:
    pair = [expert(1), expert(2)]
    assert equal(merge(base(), pair, method), merge(base(), pair, method))
    assert not equal(merge(base(), pair, method), merge(base(), pair[::-1], method))
    name = method.describe()["method"]
    other = make_method(name, density=method.describe()["density"], seed=4)
    assert not equal(merge(base(), pair, method), merge(base(), pair, other))


# Every LoRA variant, by what the merged model computes.


@dataclass
class Adapted:
    """Two trained adapters of one base, and what PEFT computes with each."""

    base: nn.Module
    a: PeftModel
    folders: list[Path]
    logits_a: Tensor
    logits_b: Tensor


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    variant: Variant = request.param
    root = tmp_path_factory.mktemp("adapters")
    base, a = trained(variant, seed=1)
    _, b = trained(variant, seed=2)
    a.save_pretrained(root / "a")
    b.save_pretrained(root / "b")
    found = Adapted(base, a, [root / "a", root / "b"], logits(a), logits(b))
    assert not torch.allclose(found.logits_a, found.logits_b, atol=1e-3)
    assert not torch.allclose(found.logits_a, logits(base), atol=1e-3)
    return found


def computes(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@each_on_adapters(WHOLE)
def test_adapter_identity(adapted: Adapted, method: MergeMethod) -> None:
    computes(merge(adapted.base, adapted.folders[:1], method, weights=[1.0]), adapted.logits_a)


@each_on_adapters(WHOLE)
def test_adapter_one_hot(adapted: Adapted, method: MergeMethod) -> None:
    computes(merge(adapted.base, adapted.folders, method, weights=[1.0, 0.0]), adapted.logits_a)
    computes(merge(adapted.base, adapted.folders, method, weights=[0.0, 1.0]), adapted.logits_b)


@each_on_adapters([*WHOLE, *TRIMS])
def test_adapter_twins(adapted: Adapted, method: MergeMethod) -> None:
    twins = merge(adapted.base, adapted.folders[:1] * 2, method, weights=[0.5, 0.5])
    alone = merge(adapted.base, adapted.folders[:1], method, weights=[1.0])
    computes(twins, logits(alone))
    if method in WHOLE:
        computes(twins, adapted.logits_a)


@each_on_adapters([*WHOLE, *TRIMS])
def test_adapter_order(adapted: Adapted, method: MergeMethod) -> None:
    straight = merge(adapted.base, adapted.folders, method, weights=[0.5, 0.75])
    computes(merge(adapted.base, adapted.folders[::-1], method, weights=[0.75, 0.5]), logits(straight))


@each_on_adapters(SUMS)
def test_adapter_linear_in_the_weights(adapted: Adapted, method: MergeMethod) -> None:
    first, second, together = (
        dict(merge(adapted.base, adapted.folders, method, weights=w).named_parameters())
        for w in ([1.0, 0.5], [-0.5, 0.25], [0.5, 0.75])
    )
    for name, start in adapted.base.named_parameters():
        both = first[name].double() + second[name].double() - start.double()
        torch.testing.assert_close(together[name].double(), both, rtol=1e-5, atol=1e-5)


@each_on_adapters([*WHOLE, *TRIMS])
def test_adapter_negation(adapted: Adapted, method: MergeMethod) -> None:
    gone = merge(adapted.base, adapted.folders[:1] * 2, method, weights=[1.0, -1.0])
    assert torch.equal(logits(gone), logits(adapted.base))


@each_on_adapters(WHOLE)
def test_adapter_written_and_read(adapted: Adapted, method: MergeMethod, tmp_path: Path) -> None:
    out = merge_folders(adapted.base, adapted.folders[:1], tmp_path / "out", method)
    model = copy.deepcopy(adapted.base)
    loaded = model.load_state_dict(tensors_of(out), strict=False)
    assert not loaded.unexpected_keys
    computes(model, adapted.logits_a)


def test_adapter_agrees_with_merge_and_unload(adapted: Adapted) -> None:
    theirs = copy.deepcopy(adapted.a).merge_and_unload(safe_merge=True)
    computes(merge(adapted.base, adapted.folders[:1]), logits(theirs))


def test_adapter_and_full_model_of_the_same_function_are_twins(adapted: Adapted) -> None:
    full = copy.deepcopy(adapted.a).merge_and_unload(safe_merge=True)
    computes(merge(adapted.base, [adapted.folders[0], full], "average"), adapted.logits_a)
