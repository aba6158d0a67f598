"""Inputs and what mergekit makes of them. Run with mergekit, in an empty folder: make.py merges.yaml."""

import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=12,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
    initializer_range=0.5,
)
base = LlamaForCausalLM(config)
base.save_pretrained("base")
for i in range(3):
    expert = LlamaForCausalLM(config)
    expert.load_state_dict(base.state_dict())
    own, common = torch.Generator().manual_seed(i + 1), torch.Generator().manual_seed(99)
    with torch.no_grad():
        for p in expert.parameters():
            p += 0.02 * torch.randn(p.shape, generator=common) + 0.02 * torch.randn(p.shape, generator=own)
    expert.save_pretrained(f"expert-{i}")

options = MergeOptions(copy_tokenizer=False, write_model_card=False)
merges = yaml.safe_load(Path(sys.argv[1]).read_text())
for name, merge in merges.items():
    run_merge(MergeConfiguration.model_validate(merge), name, options)
results = {
    f"{name}/{tensor}": value
    for name in ("base", "expert-0", "expert-1", "expert-2", *merges)
    for tensor, value in load_file(f"{name}/model.safetensors").items()
}
save_file(results, "results.safetensors")
