"""Models that are called otherwise in memory than in their files: transformers renames as it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from mergeready import merge
from mergeready.experts.live import LiveExpert
from mergeready.experts.open import open_expert
from mergeready.merging.in_place import MergedInPlace
from mergeready.weights.module import ModuleSource
from mergeready.weights.open import open_weights
from tests.models import perturb

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def saved(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "vit":
        ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(folder)
    else:
        config = SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
        SwinModel(config).save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Any:
    torch.manual_seed(1)
    return AutoModelForImageClassification.from_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_run_is_measured_in_all_that_it_trains(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path / "base", kind)
    model = perturb(classifier(base), 2)
    live = LiveExpert(model, base)
    assert {name.split(".")[0] for name in live.extra} == {"classifier"}
    assert all("pooler" in name for name in live.missing)
    model.save_pretrained(tmp_path / "expert")  # under the names of files
    stored = open_expert(tmp_path / "expert", base, strict=False).vector
    assert set(stored) == set(live.vector)
    for name in stored:
        size = live.vector.infos[name].numel
        torch.testing.assert_close(live.vector[name].flat(0, size), stored[name].flat(0, size), msg=name)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_merges_reach_every_layer_of_a_live_model(tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path / "base", kind)
    peer = perturb(classifier(base), 3)
    peer.save_pretrained(tmp_path / "peer")
    model = classifier(base)
    with MergedInPlace(model, base, [tmp_path / "peer"], "average", include_model=False):
        for name, parameter in model.named_parameters():
            if not name.startswith("classifier"):
                torch.testing.assert_close(parameter, peer.get_parameter(name), msg=name)
    merged: Any = merge(classifier(base), [tmp_path / "peer"], "average", strict=False)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, peer.get_parameter(name), msg=name)


def test_names_that_stay_have_no_others() -> None:
    model = BertForSequenceClassification(BertConfig(vocab_size=9, **SIZES))
    assert ModuleSource(model).stored_names == {}
    assert ModuleSource(torch.nn.Linear(2, 2)).stored_names == {}


def test_stored_names_are_those_of_the_file(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "vit")
    source = ModuleSource(ViTModel.from_pretrained(base))
    ours = {**{name: name for name in source.infos}, **source.stored_names}
    file = open_weights(base)
    assert set(file.infos) <= set(ours)
    for name, info in file.infos.items():
        assert source.infos[ours[name]] == info
        torch.testing.assert_close(source.read(ours[name]), file.read(name), msg=name)
