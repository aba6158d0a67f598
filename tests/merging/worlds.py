"""A base and its experts on disk, and what merging them must give."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.models import perturb, tiny_bert

Tensors = dict[str, Tensor]


@dataclass
class World:
    """A base, two full experts and an adapter of it, in memory and on disk."""

    root: Path
    base: nn.Module
    experts: list[nn.Module]
    adapter: PeftModel

    @property
    def base_folder(self) -> Path:
        return self.root / "base"

    @property
    def folders(self) -> list[Path]:
        return [self.root / f"expert-{i}" for i in range(len(self.experts))]

    @property
    def adapter_folder(self) -> Path:
        return self.root / "adapter"


def make_world(root: Path, dtype: torch.dtype = torch.float32) -> World:
    base = tiny_bert().to(dtype)
    experts = [perturb(copy.deepcopy(base), seed, 0.02) for seed in (1, 2)]
    adapter = adapted(base, seed=3)
    base.save_pretrained(root / "base")
    for i, expert in enumerate(experts):
        expert.save_pretrained(root / f"expert-{i}")
    adapter.save_pretrained(root / "adapter")
    return World(root, base, experts, adapter)


def adapted(base: nn.Module, seed: int, **options: Any) -> PeftModel:
    settings = {"r": 4, "target_modules": ["query", "value"]} | options
    torch.manual_seed(seed)
    return perturb(get_peft_model(copy.deepcopy(base), LoraConfig(**settings)), seed, 0.1).eval()


def tensors_of(folder: Path) -> Tensors:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def state(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def summed(base: nn.Module, experts: Sequence[nn.Module], weights: Sequence[float], scale: float) -> Tensors:
    """Task arithmetic in float64: θ₀ + λ Σ wᵢ (θᵢ − θ₀)."""
    start = base.state_dict()
    ends = [expert.state_dict() for expert in experts]
    return {
        name: tensor.double()
        + scale
        * sum(w * (end[name].double() - tensor.double()) for w, end in zip(weights, ends, strict=True))
        for name, tensor in start.items()
    }


def close(ours: Tensors, exact: Tensors, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    assert ours.keys() == exact.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), exact[name], rtol=rtol, atol=atol, msg=name)


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
