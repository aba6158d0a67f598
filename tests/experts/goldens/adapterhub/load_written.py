"""Loads what mergeready wrote into `<model>/written` with `adapters` and stores its logits; see README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

MODELS = {"bert": BertForSequenceClassification, "gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}


def main(target: Path) -> None:
    for name, kind in MODELS.items():
        ids = load_file(target / name / "logits.safetensors")["input_ids"]
        model = kind.from_pretrained(target / name / "base")
        adapters.init(model)
        loading: dict[str, list[str]] = {}
        model.load_adapter(
            str(target / name / "written"), set_active=True, use_safetensors=True, loading_info=loading
        )
        if loading["unexpected_keys"]:
            raise SystemExit(f"{name}: the library does not know {loading['unexpected_keys']}")
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.contiguous()
        save_file({"logits": logits}, target / name / "written" / "logits.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
