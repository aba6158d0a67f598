"""Adapters written for AdapterHub, against what its library computed after loading them; see the goldens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergeready.errors import UnsupportedError
from mergeready.merging import merge
from mergeready.merging.adapters import merge_adapters
from mergeready.merging.adapters.adapterhub_output import adapterhub_place
from tests.experts.test_adapterhub import GOLDENS, base_of, logits
from tests.merging.worlds import adapted
from tests.models import tiny_bert

MERGES = {
    "bert": (["plain", "everywhere", "legacy"], [0.7, -0.4, 0.5]),
    "gpt2": (["fused-qv", "fused-k", "everywhere"], [0.7, -0.4, 0.5]),
    "llama": (["plain", "everywhere"], [0.7, -0.4]),
}


@pytest.mark.parametrize("model", MERGES)
def test_the_library_computes_what_was_merged(model: str, tmp_path: Path) -> None:
    """The library loaded `written`; what is written now has the same tensors; folding it computes the same."""
    variants, weights = MERGES[model]
    base, golden = base_of(GOLDENS / model / "x"), GOLDENS / model / "written"
    folders = [GOLDENS / model / variant for variant in variants]
    made = merge_adapters(
        GOLDENS / model / "base", folders, tmp_path / "out", weights=weights, output_format="adapterhub"
    )
    ids = load_file(GOLDENS / model / "logits.safetensors")["input_ids"]
    by_library = load_file(golden / "logits.safetensors")["logits"]
    for form in (merge(base, folders, weights=weights), merge(base, [made.folder]), merge(base, [golden])):
        torch.testing.assert_close(logits(form, ids), by_library, rtol=1e-5, atol=1e-5)
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in (made.folder, golden))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-6)
    config = "adapter_config.json"
    assert (made.folder / config).read_text() == (golden / config).read_text()


def test_peft_adapters_become_adapterhub_s(tmp_path: Path) -> None:
    base = tiny_bert()
    adapted(base, 1).save_pretrained(tmp_path / "a")
    made = merge_adapters(base, [tmp_path / "a"], tmp_path / "out", output_format="adapterhub")
    ids = torch.arange(8)[None]
    torch.testing.assert_close(
        logits(merge(base, [made.folder]), ids),
        logits(merge(base, [tmp_path / "a"]), ids),
        rtol=1e-5,
        atol=1e-5,
    )


def test_what_the_library_cannot_adapt_is_listed(tmp_path: Path) -> None:
    base = tiny_bert()
    targets = ["query", "word_embeddings", "attention.output.dense"]
    adapted(base, 1, target_modules=targets, modules_to_save=["classifier"]).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError) as caught:
        merge_adapters(base, [tmp_path / "a"], tmp_path / "out", output_format="adapterhub")
    for name in ("word_embeddings", "attention.output.dense", "classifier.weight"):
        assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("roberta.encoder.layer.3.attention.self.key", "k"),
        ("model.layers.0.self_attn.v_proj", "v"),
        ("transformer.h.0.attn.c_attn", "qkv"),
        ("transformer.h.0.attn.c_proj", None),
        ("transformer.h.0.mlp.c_proj", "mlp"),
        ("bert.encoder.layer.0.output.dense", "mlp"),
        ("bert.encoder.layer.0.attention.output.dense", None),
        ("model.layers.0.mlp.gate_proj", None),
        ("model.layers.0.self_attn.o_proj", None),
        ("distilbert.transformer.layer.0.attention.q_lin", "q"),
    ],
)
def test_where_the_library_has_lora(module: str, place: str | None) -> None:
    assert adapterhub_place(module) == place
