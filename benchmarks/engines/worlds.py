"""Synthetic models for the merge benchmarks: shapes and bit patterns of real ones, values from a noise pool."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, LAYERS, VOCABULARY, HEADS = 1280, 3456, 21, 32000, 10
SHARDS, DISTINCT = 3, 8
_POOL = 2**25 + 9


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a Llama of 498 million parameters."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{at}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def llama_config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


class Noise:
    """Standard normal values at the price of a copy: slices of one pool at pseudo-random places."""

    def __init__(self) -> None:
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))

    def at(self, seed: int, numel: int) -> Tensor:
        start = int(np.random.default_rng(seed).integers(_POOL))
        repeats = (start + numel) // _POOL + 1
        return (
            torch.cat([self._pool] * repeats)[start : start + numel]
            if repeats > 1
            else self._pool[start : start + numel]
        )


def make_llamas(folder: Path, experts: int) -> None:
    """``base`` and ``expert-0`` … in bf16, in three shards; experts beyond eight are hard links to earlier ones.

    Deltas have deviation 1e-3 where weights have 2e-2, and cosine 0.3 between experts.
    """
    noise = Noise()
    names = [None, *range(min(experts, DISTINCT))]
    for expert in names:
        target = folder / ("base" if expert is None else f"expert-{expert}")
        if not target.exists():
            _write_llama(target, noise, expert)
    for expert in range(DISTINCT, experts):
        target, source = folder / f"expert-{expert}", folder / f"expert-{expert % DISTINCT}"
        if not target.exists():
            target.mkdir()
            for path in source.iterdir():
                os.link(path, target / path.name)


def _write_llama(folder: Path, noise: Noise, expert: int | None) -> None:
    partial = folder.with_suffix(".partial")
    partial.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    shapes = llama_shapes()
    for index, (name, shape) in enumerate(shapes.items()):
        numel = int(np.prod(shape))
        value = (noise.at(index, numel) * 0.02).bfloat16()
        if expert is not None:
            own, common = noise.at(1000 * (expert + 1) + index, numel), noise.at(500_000 + index, numel)
            value = (value.float() + 1e-3 * (0.3**0.5 * common + 0.7**0.5 * own)).bfloat16()
        shards[index * SHARDS // len(shapes)][name] = value.reshape(shape)
    save_sharded(partial, shards)
    (partial / "config.json").write_text(json.dumps(llama_config()))
    partial.rename(folder)


def save_sharded(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_many_tensors(folder: Path, count: int, experts: int) -> None:
    """A mixture-of-experts model's names on tiny tensors: what opening and planning cost, and nothing else."""
    shapes = [f"model.layers.{i // 400}.mlp.experts.{i % 400 // 3}.{i % 3}.weight" for i in range(count)]
    for expert in (None, *range(experts)):
        target = folder / ("base" if expert is None else f"expert-{expert}")
        if target.exists():
            continue
        target.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(count, 8, 8, generator=generator)
        if expert is not None:
            base += 1e-2 * torch.randn(base.shape, generator=torch.Generator().manual_seed(expert + 1))
        values = [base[i].clone() for i in range(count)]
        save_sharded(target, [dict(zip(shapes, values, strict=True))])


def make_adapters(folder: Path, count: int, rank: int = 16) -> None:
    """Rank-16 PEFT adapters of all linear layers of the Llama."""
    targets = {n: s for n, s in llama_shapes().items() if "proj" in n}
    for adapter in range(count):
        target = folder / f"adapter-{adapter}"
        if target.exists():
            continue
        generator = torch.Generator().manual_seed(adapter)
        tensors: Mapping[str, Tensor] = {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": 0.02
            * torch.randn(shape, generator=generator)
            for name, (rows, columns) in targets.items()
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank)))
        }
        partial = target.with_suffix(".partial")
        partial.mkdir(parents=True)
        save_file({n: t.bfloat16() for n, t in tensors.items()}, partial / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({n.split(".")[-2] for n in targets}),
            "base_model_name_or_path": None,
        }
        (partial / "adapter_config.json").write_text(json.dumps(config))
        partial.rename(target)
