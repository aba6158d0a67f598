from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import BaseMismatchError
from mergeready.experts.kinship import require_frozen_equal, require_kinship
from mergeready.weights import ModuleSource, StateDictSource
from tests.models import perturb, tiny_bert


def same_names(tensors: dict[str, Tensor] | nn.Module) -> dict[str, str]:
    names = tensors if isinstance(tensors, dict) else dict(tensors.named_parameters())
    return {name: name for name in names}


def check_kinship(expert: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    require_kinship(StateDictSource(expert, "expert"), StateDictSource(base, "base"), same_names(base))


def check_frozen(model: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    require_frozen_equal(StateDictSource(model, "model"), StateDictSource(base, "base"), same_names(base))


@pytest.mark.parametrize("scale", [0.0, 0.001, 0.1])
def test_a_fine_tuned_model_passes(scale: float) -> None:
    base, expert = tiny_bert(), perturb(tiny_bert(), seed=1, scale=scale)
    require_kinship(ModuleSource(expert), ModuleSource(base), same_names(base))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_another_initialisation_is_refused(seed: int) -> None:
    base, other = tiny_bert(), tiny_bert(seed)
    with pytest.raises(BaseMismatchError, match=r"does not descend from .*cosine -?0\.[01]"):
        require_kinship(ModuleSource(other, "x"), ModuleSource(base), same_names(base))


@pytest.mark.parametrize(("cosine", "passes"), [(0.55, True), (0.45, False), (-0.9, False)])
def test_the_border_is_a_cosine_of_one_half(cosine: float, passes: bool) -> None:
    # Small enough that every entry is sampled, so that the cosine is known exactly.
    base = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    noise -= (noise * base).sum() / base.square().sum() * base
    noise *= base.norm() / noise.norm()
    expert = cosine * base + (1 - cosine**2) ** 0.5 * noise
    assert float((expert * base).sum() / expert.norm() / base.norm()) == pytest.approx(cosine, abs=1e-5)
    if passes:
        check_kinship({"x": expert}, {"x": base})
    else:
        with pytest.raises(BaseMismatchError, match=f"cosine {cosine:.2f}"):
            check_kinship({"x": expert}, {"x": base})


def test_vectors_tell_nothing() -> None:
    check_kinship(
        {"bias": -torch.ones(9), "scalar": torch.tensor(-1.0)},
        {"bias": torch.ones(9), "scalar": torch.tensor(1.0)},
    )


def test_names_may_differ() -> None:
    base, other = torch.randn(4, 4), torch.randn(4, 4)
    require_kinship(StateDictSource({"m.x": base}), StateDictSource({"x": base, "y": other}), {"x": "m.x"})


def test_a_zero_base_proves_nothing() -> None:
    check_kinship({"x": torch.randn(4, 4)}, {"x": torch.zeros(4, 4)})


def test_frozen_weights_may_differ_by_rounding() -> None:
    base = tiny_bert().state_dict()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_frozen({name: t.to(dtype) for name, t in base.items()}, base)
        check_frozen(base, {name: t.to(dtype) for name, t in base.items()})


def test_a_frozen_weight_that_differs_is_named() -> None:
    base = tiny_bert().state_dict()
    changed = base | {"classifier.weight": base["classifier.weight"] * 1.02}
    with pytest.raises(
        BaseMismatchError, match=r"classifier\.weight is frozen in model, yet differs from base"
    ):
        check_frozen(changed, base)


def test_frozen_zeros_must_be_zeros() -> None:
    check_frozen({"bias": torch.zeros(9)}, {"bias": torch.zeros(9)})
    with pytest.raises(BaseMismatchError, match="bias is frozen"):
        check_frozen({"bias": torch.full((9,), 1e-3)}, {"bias": torch.zeros(9)})


def test_a_frozen_weight_that_is_no_number_is_named() -> None:
    with pytest.raises(BaseMismatchError, match="x is frozen"):
        check_frozen({"x": torch.full((9,), float("nan"))}, {"x": torch.ones(9)})
