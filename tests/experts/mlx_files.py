"""Adapters as MLX-LM writes them, and its forward pass in float64, from its documented formulas."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 20.0


def random_adapter(
    model: nn.Module, modules: Sequence[str], *, dora: bool = False, seed: int = 1
) -> dict[str, Tensor]:
    """Tensors of an adapter of the modules whose names end so: lora_a (in, 3), lora_b (3, out), m."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and name.endswith(tuple(modules)):
            rows, columns = module.weight.shape
            first, last = (rows, columns) if isinstance(module, nn.Embedding) else (columns, rows)
            tensors[f"{name}.lora_a"] = 0.1 * torch.randn(first, 3, generator=generator)
            tensors[f"{name}.lora_b"] = 0.05 * torch.randn(3, last, generator=generator)
            if dora:
                norms = module.weight.detach().norm(dim=1)
                tensors[f"{name}.m"] = norms * (1 + 0.1 * torch.randn(rows, generator=generator))
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Tensor], kind: str = "lora", **fields: Any) -> Path:
    folder.mkdir(parents=True)
    parameters = {"rank": 3, "scale": SCALE, "dropout": 0.0}
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def adapted(model: nn.Module, tensors: dict[str, Tensor], scale: float = SCALE) -> nn.Module:
    """The model in float64 with MLX's forward pass in the place of its adapted modules."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if f"{name}.lora_a" in tensors:
            a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
            m = tensors.get(f"{name}.m")
            make = _embedding if isinstance(module, nn.Embedding) else _linear
            module.forward = make(module, a, b, None if m is None else m.double(), scale)
    return model


def _linear(module: Any, a: Tensor, b: Tensor, m: Tensor | None, scale: float) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, module.weight) + scale * ((x @ a) @ b)
        if m is not None:
            y = m / torch.linalg.norm(module.weight + scale * b.T @ a.T, dim=1) * y
        return y if module.bias is None else y + module.bias

    return forward


def _embedding(
    module: Any, a: Tensor, b: Tensor, m: Tensor | None, scale: float
) -> Callable[[Tensor], Tensor]:
    def forward(ids: Tensor) -> Tensor:
        y = module.weight[ids] + scale * a[ids] @ b
        if m is None:
            return y
        return (m[ids] / torch.linalg.norm(y, dim=-1))[..., None] * y

    return forward
