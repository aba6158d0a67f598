"""What adapters of all formats share: parts under the base's names, and how they were rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mergeready.errors import FormatError, UnsupportedError
from mergeready.experts import Base, open_expert
from mergeready.experts.adapter import AdapterBuilder, Slot, require_pairs
from mergeready.experts.parts import BiasPart
from mergeready.experts.stored import Rounded
from mergeready.weights import StateDictSource
from mergeready.weights.source import TensorInfo
from tests.experts.test_case_table import QV, saved
from tests.models import tiny_bert


def rounded(folder: Path, *names: str) -> None:
    """Store some of an adapter's tensors in bf16."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    chosen = [key for key in tensors if any(name in key for name in names)]
    assert chosen
    save_file(tensors | {key: tensors[key].bfloat16() for key in chosen}, path)


def test_rounding_goes_by_what_is_stored(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=QV,
        modules_to_save=["classifier"],
        trainable_token_indices={"word_embeddings": [3, 5]},
    )
    base, _ = saved(tiny_bert, tmp_path, config)
    assert not open_expert(tmp_path, base).vector.rounded()
    rounded(tmp_path, "lora_", "classifier", "token_adapter")
    kinds = {name: one.of for name, one in open_expert(tmp_path, base).vector.rounded().items()}
    assert {kind for name, kind in kinds.items() if "query" in name or "value" in name} == {"factors"}
    assert {kind for name, kind in kinds.items() if "classifier" in name} == {"weights"}
    assert kinds["bert.embeddings.word_embeddings.weight"] == "rows"
    assert len(kinds) == 4 + 2 + 1


def test_one_coarse_factor_makes_the_product_coarse(tmp_path: Path) -> None:
    base, _ = saved(tiny_bert, tmp_path, LoraConfig(r=2, target_modules=QV))
    rounded(tmp_path, "lora_A")
    found = open_expert(tmp_path, base).vector.rounded()
    assert len(found) == 4
    assert set(found.values()) == {Rounded(torch.bfloat16, "factors")}


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}


def test_factors_come_in_pairs_of_matrices() -> None:
    shapes = infos(a=(2, 3), b=(4, 2), flat=(4,))
    require_pairs({"q": {"A": "a", "B": "b"}}, [("A", "B")], "law", shapes)
    with pytest.raises(FormatError, match=r"law holds only one of two LoRA factors: q\.A, v\.B\."):
        require_pairs({"q": {"A": "a"}, "v": {"B": "b"}}, [("A", "B")], "law", shapes)
    with pytest.raises(FormatError, match=r"no matrices: flat \(4,\)"):
        require_pairs({"q": {"A": "a", "B": "flat"}}, [("A", "B")], "law", shapes)


def test_two_modules_cannot_change_one_parameter() -> None:
    base = Base.open({"embed.weight": torch.zeros(3, 2)})
    builder = AdapterBuilder(StateDictSource({}), base, "law")
    part = BiasPart(lambda: torch.zeros(6), 1.0)
    builder.add("embed.weight", Slot("embed", "bias"), part)
    builder.add("embed.weight", Slot("embed", "bias"), part)
    assert len(builder.parts["embed.weight"]) == 2
    with pytest.raises(UnsupportedError, match=r"law changes embed\.weight through lm_head"):
        builder.add("embed.weight", Slot("lm_head", "bias"), part)
