"""Writes the files beside it; see README.md. Runs in an environment with `adapters`, not in this project's."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import IA3Config, LoRAConfig, PrefixTuningConfig, SeqBnConfig, VeraConfig
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
ROUND = {"initializer_range": 0.3}


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    gpt2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return {
        "bert": BertForSequenceClassification(
            BertConfig(**SIZES, **ROUND, max_position_embeddings=16, num_labels=3)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(**gpt2, **ROUND, bos_token_id=0, eos_token_id=0)),
        "llama": LlamaForCausalLM(
            LlamaConfig(**SIZES, **ROUND, num_key_value_heads=1, max_position_embeddings=16)
        ),
    }


EVERYWHERE = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
VARIANTS = {
    "bert": {
        "plain": LoRAConfig(r=4, alpha=12),
        "everywhere": LoRAConfig(r=2, alpha=8, leave_out=[0], **EVERYWHERE),
        "dora": LoRAConfig(r=4, alpha=12, use_dora=True),
        "dora-unscaled": LoRAConfig(r=4, alpha=4, use_dora=True),
        "legacy": LoRAConfig(r=4, alpha=12),
    },
    "gpt2": {
        "fused-qv": LoRAConfig(r=4, alpha=12),
        "fused-k": LoRAConfig(r=4, alpha=4, attn_matrices=["k"]),
        "everywhere": LoRAConfig(r=2, alpha=8, **EVERYWHERE),
    },
    "llama": {
        "plain": LoRAConfig(r=4, alpha=12),
        "everywhere": LoRAConfig(r=2, alpha=8, **EVERYWHERE),
        "dora": LoRAConfig(r=4, alpha=12, use_dora=True),
    },
}
REFUSED = {
    "ia3": IA3Config(),
    "vera": VeraConfig(),
    "gating": LoRAConfig(use_gating=True),
    "bottleneck": SeqBnConfig(),
    "prefix": PrefixTuningConfig(),
    "union": adapters.ConfigUnion(LoRAConfig(), SeqBnConfig()),
}


def main(target: Path) -> None:
    ids = torch.randint(1, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    for model_name, base in models().items():
        base.eval().save_pretrained(target / model_name / "base")
        logits = {"input_ids": ids, "base": compute(base, ids)}
        for variant, config in VARIANTS[model_name].items():
            logits[variant] = make(base, config, target / model_name / variant, ids)
        save_file(logits, target / model_name / "logits.safetensors")
    for name, config in REFUSED.items():
        (target / "refused").mkdir(exist_ok=True)
        model = copy.deepcopy(models()["bert"])
        adapters.init(model)
        model.add_adapter("task", config=config)
        model.save_adapter(str(target / "refused" / name), "task")
        for path in (target / "refused" / name).iterdir():
            if path.name != "adapter_config.json":
                path.unlink()


def make(base: torch.nn.Module, config: LoRAConfig, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = copy.deepcopy(base)
    adapters.init(model)
    model.add_adapter("task", config=config, set_active=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".loras." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_adapter(str(folder), "task", use_safetensors=True)
    (folder / "model_head.safetensors").unlink(missing_ok=True)
    (folder / "head_config.json").unlink(missing_ok=True)
    if folder.name == "legacy":
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "adapters.1.0.0"}, indent=2))
        model = copy.deepcopy(base)
        adapters.init(model)
        model.load_adapter(str(folder), set_active=True, use_safetensors=True)
    return compute(model.eval(), ids)


def compute(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
