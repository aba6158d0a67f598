"""Folders of adapters: who wrote them, what is missing in them, and what they are mistaken for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mergeready.errors import FormatError, UnsupportedError
from mergeready.experts import dense, open_expert
from mergeready.experts.adapter_folder import adapter_format, open_adapter_weights
from tests.experts import test_adapterhub as adapterhub
from tests.experts.mlx_files import random_adapter, write_adapter
from tests.experts.test_case_table import QV, saved
from tests.models import perturb, tiny_bert, tiny_llama


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"peft_type": "LORA", "lora_parameters": {}, "config": {}, "version": "1"}, "peft"),
        ({"config": {"architecture": "lora"}, "model_class": "BertModel"}, "adapterhub"),
        ({"config": {"architecture": "lora"}}, None),
        ({"lora_parameters": {"rank": 8}}, "mlx"),
        ({"version": "1", "r": 8, "lora_alpha": 8}, None),
    ],
)
def test_fields_that_tell_a_library(fields: dict[str, object], expected: str | None) -> None:
    assert adapter_format(fields) == expected


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("peft", "adapter_model.safetensors"),
        ("mlx", "adapters.safetensors"),
        ("adapterhub", "adapter.safetensors"),
    ],
)
def test_weights_that_are_not_there_are_named(tmp_path: Path, kind: str, name: str) -> None:
    with pytest.raises(FormatError, match=rf"has adapter_config\.json but no {name}\. Save"):
        open_adapter_weights(tmp_path, kind, "law", allow_pickle=False)  # type: ignore[arg-type]


def test_formats_are_told_apart_by_content(tmp_path: Path) -> None:
    llama = tiny_llama()
    saved(tiny_llama, tmp_path / "peft", LoraConfig(r=2, target_modules=["q_proj"]))
    write_adapter(tmp_path / "mlx", random_adapter(llama, ["q_proj"]))
    assert open_expert(tmp_path / "peft", llama).format == "peft"
    assert open_expert(tmp_path / "mlx", llama).format == "mlx"
    hub = adapterhub.GOLDENS / "llama"
    assert open_expert(hub / "plain", hub / "base").format == "adapterhub"
    (tmp_path / "mlx" / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="of no known kind"):
        open_expert(tmp_path / "mlx", llama)


def test_kohya_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_down_blocks_0.lora_up.weight": torch.ones(4, 2),
        "lora_unet_down_blocks_0.lora_down.weight": torch.ones(2, 4),
        "lora_unet_down_blocks_0.alpha": torch.ones(()),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    for form in (tmp_path, tmp_path / "style.safetensors", tensors):
        with pytest.raises(UnsupportedError, match="kohya"):
            open_expert(form, tiny_bert())


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    base = tiny_bert()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=QV), adapter_name="law")
    perturb(model, 1, 0.1).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"adapters in subfolders \(law\): name one"):
        open_expert(tmp_path, base)
    assert len(open_expert(tmp_path / "law", base).vector) == 4


def test_pickled_peft_adapters_need_a_flag(tmp_path: Path) -> None:
    base, _ = saved(tiny_bert, tmp_path, LoraConfig(r=4, target_modules=QV))
    straight = open_expert(tmp_path, base).vector
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    with pytest.raises(FormatError, match="can run code"):
        open_expert(tmp_path, base)
    opened = open_expert(tmp_path, base, allow_pickle=True).vector
    assert all(torch.equal(dense(opened[n]), dense(straight[n])) for n in straight)
