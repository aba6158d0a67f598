"""Values that rank, scaling and rows are computed from, and patterns that would take for ever."""

from __future__ import annotations

import math

import pytest
from peft import LoraConfig

from mergeready.experts.peft_values import malformed_values


def test_what_peft_writes_is_well_formed() -> None:
    made = LoraConfig(
        r=4,
        target_modules=["q"],
        rank_pattern={"layers.*.q_proj": 8},
        alpha_pattern={r"^model\.(layers|blocks)\.0\.q": 2.5},
        trainable_token_indices={"embed": [0, 7]},
    )
    for fields in (made.to_dict(), LoraConfig(trainable_token_indices=[1, 2]).to_dict(), {}):
        assert list(malformed_values(fields)) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", True),
        ("lora_alpha", math.nan),
        ("lora_alpha", -math.inf),
        ("lora_alpha", None),
        ("r", True),
        ("r", 0),
        ("r", 8.0),
        ("alpha_pattern", ["q"]),
        ("alpha_pattern", {"q": 0}),
        ("rank_pattern", {"q": -1}),
        ("base_model_name_or_path", 3),
        ("target_parameters", "experts.w1"),
        ("trainable_token_indices", {"embed": 3}),
        ("trainable_token_indices", [1.5]),
        ("trainable_token_indices", [[-1]]),
        ("trainable_token_indices", [[2**62]]),
    ],
)
def test_one_wrong_value_is_one_problem_that_names_its_field(field: str, value: object) -> None:
    [problem] = malformed_values({field: value})
    assert f"`{field}`" in problem


def test_all_problems_are_told_and_long_values_cut_short() -> None:
    found = list(malformed_values({"lora_alpha": "a" * 500, "r": None, "rank_pattern": {"q": None}}))
    assert len(found) == 3
    assert len(found[0]) < 150


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*){9}", "a*a*a*a*b", "(", "a{1,9}.*.*.+"])
def test_patterns_that_could_take_for_ever_are_never_matched(pattern: str) -> None:
    [problem] = malformed_values({"alpha_pattern": {pattern: 8}})
    assert "no regular expression that is quick to match" in problem


@pytest.mark.parametrize("pattern", [r"layers\..*\.q_proj", r"h\.\d+\.c_attn", r"\(x\)\+", ".*"])
def test_patterns_as_people_write_them_are_let_through(pattern: str) -> None:
    assert not list(malformed_values({"alpha_pattern": {pattern: 8}}))
