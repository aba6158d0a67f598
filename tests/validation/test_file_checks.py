"""What the first check says of folders as they come from the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergeready.validation import Verdict, validate
from tests.validation.experts import write_adapter, write_base, write_full


def readable(folder: Path) -> Verdict:
    return next(v for v in validate(folder, level="file").verdicts if v.id == "F001")


def test_adapters_in_subfolders_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "experts" / "law")
    found = readable(tmp_path / "experts")
    assert found.status == "failed"
    assert "holds adapters in subfolders (law): name one of them" in found.message


def test_factors_of_image_models_are_called_so(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0.lora_up.weight"
    save_file({name: torch.ones(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    found = readable(tmp_path)
    assert found.status == "failed"
    assert "is a LoRA in kohya's or diffusers' format" in found.message


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_pointer_is_told_from_a_damaged_file(tmp_path: Path, kind: str) -> None:
    """What is there after a clone without Git LFS."""
    write_base(tmp_path / "base")
    law = write_full(tmp_path / "law") if kind == "full" else write_adapter(tmp_path / "law")
    [weights] = law.glob("*.safetensors")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12\n")
    found = readable(law)
    assert found.status == "failed"
    assert "git lfs pull" in found.message
