"""A PEFT adapter trained with several techniques at once saves, loads in PEFT and merges as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mergeready import MergeReadyLoop, kronecker_factors, merge, open_expert
from mergeready.errors import OptionError
from mergeready.training.techniques.registry import make_technique
from tests.models import perturb, tiny_bert, token_batch


def test_trained_saved_loaded_merged(tmp_path: Path) -> None:
    base = tiny_bert()
    file = kronecker_factors(base, [token_batch(9)], base=base).save(tmp_path / "law.factors.safetensors")
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    loop = MergeReadyLoop(
        tmp_path / "run",
        peers=[perturb(tiny_bert(), 5, 0.02)],
        techniques=[
            {"shared_lora_a": {"seed": 3}},
            {"kronecker_penalty": {"factors": [str(file)], "strength": 0.1, "every": 1}},
            {"peer_projection": {"rank": 2, "sides": "left"}},
        ],
    )
    loop.prepare(model, optimizer=optimizer)
    for step in range(4):
        for _ in loop.passes():
            model(**token_batch(step), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.step()
    loop.finish()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        own = model.eval()(**token_batch()).logits
        again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**token_batch()).logits, own)
        merged = merge(base, [open_expert(tmp_path / "adapter", base)], "task_arithmetic")
        torch.testing.assert_close(merged(**token_batch()).logits, own, rtol=1e-4, atol=1e-5)
        assert float((own - base(**token_batch()).logits).abs().max()) > 1e-3


def test_settings_files_name_them() -> None:
    made = make_technique({"train_only": {"keep": "last:1"}})
    assert made.describe()["keep"] == "last:1"
    with pytest.raises(OptionError, match="needs `factors`"):
        make_technique("kronecker_penalty")
