"""Which formats are coarser than fp32, against the formats' own spacing at 1."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from mergeready.experts import open_expert
from mergeready.experts.stored import Rounded, coarsest, is_coarse
from tests.models import perturb, tiny_bert

FORMATS = (
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)


@pytest.mark.parametrize("dtype", FORMATS)
def test_coarse_is_what_cannot_hold_the_next_number_of_fp32(dtype: torch.dtype) -> None:
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert is_coarse(dtype) == (float(above.to(dtype)) == 1.0)


def test_integers_are_not_rounded() -> None:
    assert not any(is_coarse(dtype) for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool))


@pytest.mark.parametrize("given", permutations((torch.float16, torch.bfloat16, torch.float32)))
def test_the_coarsest_whatever_the_order(given: tuple[torch.dtype, ...]) -> None:
    assert coarsest(given) == torch.bfloat16


def test_where_nothing_is_coarse_there_is_no_coarsest() -> None:
    assert coarsest([]) is None
    assert coarsest([torch.float32, torch.int8, torch.float64]) is None


def test_a_full_expert_s_weights_are_rounded_one_by_one() -> None:
    expert = {name: value.clone() for name, value in perturb(tiny_bert(), 1, 0.02).state_dict().items()}
    assert not open_expert(expert, tiny_bert()).vector.rounded()
    name = "classifier.bias"
    expert[name] = expert[name].bfloat16()
    assert open_expert(expert, tiny_bert()).vector.rounded() == {name: Rounded(torch.bfloat16, "weights")}
