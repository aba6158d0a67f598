from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from mergeready.errors import FormatError, UnsupportedError
from mergeready.experts.peft_config import CONFIG_NAME, PeftConfig

MODULES = ["a.q", "layers.0.q", "layers.1.q", "layers.1.attn.q", "layers.11.mlp.down", "xq", "q"]
PATTERNS = ["q", r"layers\.1\..*", r"1\.attn\.q", "attn.q", "layers.0.q", ".*down", "^layers.0.q", "mlp"]


def config(**fields: object) -> PeftConfig:
    return PeftConfig({"peft_type": "LORA", "lora_alpha": 8, **fields}, "the adapter")


@given(
    patterns=st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64), max_size=4),
    module=st.sampled_from(MODULES),
    rank=st.integers(1, 64),
    root=st.booleans(),
)
def test_scaling_is_peft_s(patterns: dict[str, int], module: str, rank: int, root: bool) -> None:
    alpha = patterns.get(get_pattern_key(patterns, module), 8)
    expected = alpha / math.sqrt(rank) if root else alpha / rank
    ours = config(alpha_pattern=patterns, use_rslora=root).scaling(module, rank)
    assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [None, "8", [8]])
def test_alpha_must_be_a_number(alpha: object) -> None:
    with pytest.raises(FormatError, match="`lora_alpha` is"):
        config(lora_alpha=alpha).scaling("q", 4)


def test_every_field_of_a_plain_configuration_is_known() -> None:
    """A PEFT release with a new field that is on by default would fail here first."""
    fields = LoraConfig(r=4, target_modules=["q"], modules_to_save=["head"]).to_dict()
    assert PeftConfig(fields | {"peft_type": "LORA"}, "x").scaling("q", 4) == 2.0
    known_or_off = PeftConfig(fields | {"peft_type": "LORA", "new_field": None, "other_new": {}}, "x")
    assert known_or_off.base_name is None


def test_all_reasons_are_given_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        config(use_qalora=True, init_lora_weights="pissa_niter_4", brand_new=3)
    message = str(caught.value)
    assert message.startswith("the adapter cannot be folded into its base: ")
    assert all(part in message for part in ("`use_qalora`", "'pissa_niter_4'", "`brand_new=3`"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_starts_that_leave_the_base_alone_are_accepted(init: object) -> None:
    assert config(init_lora_weights=init).scaling("q", 8) == 1.0


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_starts_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedError, match="changed the base"):
        config(init_lora_weights=init)


@pytest.mark.parametrize(
    ("indices", "module", "rows"),
    [
        ([3, 7], "anything.embed", [3, 7]),
        ({"embed": [1]}, "model.embed", [1]),
        ({"model.embed": [1]}, "model.embed", [1]),
        ({"other": [1], "embed": [2]}, "embed", [2]),
    ],
)
def test_token_rows(indices: object, module: str, rows: list[int]) -> None:
    assert config(trainable_token_indices=indices).token_rows(module) == rows


@pytest.mark.parametrize("indices", [None, {}, {"bed": [1]}, {"embed.x": [1]}])
def test_token_rows_of_another_module(indices: object) -> None:
    with pytest.raises(FormatError, match=r"says nothing about model\.embed"):
        config(trainable_token_indices=indices).token_rows("model.embed")


def test_a_configuration_is_read_as_peft_wrote_it(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=12, base_model_name_or_path="org/model", use_rslora=True).save_pretrained(
        tmp_path
    )
    read = PeftConfig.read(tmp_path)
    assert read.base_name == "org/model"
    assert read.scaling("q", 4) == 6.0


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\xff"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(text)
    with pytest.raises(FormatError, match=r"adapter_config\.json cannot be read"):
        PeftConfig.read(tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        PeftConfig.read(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [[], {}, {"config": {"architecture": "lora"}, "version": "1"}, None])
def test_what_is_no_peft_adapter_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"has no `peft_type`|not an object"):
        PeftConfig.read(tmp_path)
