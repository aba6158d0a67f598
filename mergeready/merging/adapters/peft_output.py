"""Merged changes as a PEFT adapter: α = r for every module, so that its scaling is 1."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeready.errors import UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.delta import LowRank
from mergeready.merging.adapters.changes import Changes, Factors
from mergeready.weights.writer import write_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def peft_tensors(changes: Changes, base: Base, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names.

    Modules trained whole are stored whole, in the base's dtype, with the base's running statistics: PEFT asks for all
    that belongs to them. A changed bias whose module is not stored whole is a trained bias of the base (`bias="all"`).
    """
    tensors: dict[str, Tensor] = {}
    for name, change in changes.factors.items():
        module = _PREFIX + changes.modules[name]
        A, B = stored_factors(change, base.source.infos[name].shape)
        A_key, B_key = (
            (".lora_embedding_A", ".lora_embedding_B")
            if change.kind == "embedding"
            else (".lora_A.weight", ".lora_B.weight")
        )
        tensors[module + A_key], tensors[module + B_key] = A.to(dtype), B.to(dtype)
    for name, (_, values) in changes.rows.items():
        tensors[f"{_PREFIX}{changes.modules[name]}.token_adapter.trainable_tokens_delta"] = values
    whole = _whole_modules(changes)
    for module, base_module in whole.items():
        for name, info in base.source.infos.items():
            leaf = name.removeprefix(base_module + ".")
            if name.startswith(base_module + ".") and "." not in leaf:
                value = changes.values.get(name)
                stored = base.source.read(name).cpu() if value is None else value.to(info.dtype)
                tensors[f"{_PREFIX}{module}.{leaf}"] = stored.clone()
    adapted = {changes.modules[name] for name in changes.factors}
    for name, value in changes.values.items():
        module = changes.modules[name]
        if module not in whole:
            tensors[f"{_PREFIX}{module}{'.base_layer' if module in adapted else ''}.bias"] = value.to(
                base.source.infos[name].dtype
            )
    return tensors


def stored_factors(change: Factors, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A (r, in, …) and B (out, r, …) as adapters store them, from factors of the parameter's own shape."""
    delta: LowRank = change.delta
    if change.kind != "linear":
        return delta.B.T.contiguous(), delta.A.T.contiguous()
    sides = shape[2:]
    rank = delta.A.shape[0]
    A = delta.A.reshape(rank, *shape[1:]).contiguous()
    return A, delta.B.reshape(shape[0], rank, *(1 for _ in sides)).contiguous()


def peft_config(changes: Changes, base: Base, inherited: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's configuration.

    Args:
        changes: What was merged.
        base: The base.
        inherited: Fields that all merged adapters agree on, such as ``task_type``.

    Raises:
        UnsupportedError: If a module would have factors and be stored whole.
    """
    ranks = {changes.modules[name]: c.delta.A.shape[0] for name, c in changes.factors.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # PEFT's patterns match ends of names; with ^ they match one module only.
    pattern = {f"^{module}": own for module, own in ranks.items() if own != rank}
    whole = sorted(_whole_modules(changes))
    both = sorted(set(whole) & set(ranks))
    if both:
        raise UnsupportedError(
            f"{listing(both)} would have factors and be stored whole, which PEFT cannot do: use output_format='full'."
        )
    loose = [name for name in changes.values if changes.modules[name] not in whole]
    return {
        "peft_type": "LORA",
        "task_type": inherited.get("task_type"),
        "base_model_name_or_path": _base_name(base, inherited),
        "revision": inherited.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": whole or None,
        "bias": "all" if loose else "none",
        "fan_in_fan_out": any(change.kind == "transposed" for change in changes.factors.values()),
        "trainable_token_indices": {
            changes.modules[name]: index.tolist() for name, (index, _) in changes.rows.items()
        }
        or None,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def write_peft(
    folder: Path, changes: Changes, base: Base, inherited: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write the adapter into a folder that is being made; returns its tensors."""
    config = peft_config(changes, base, inherited)
    tensors = peft_tensors(changes, base, dtype)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS_NAME, tensors)
    return tensors


def _whole_modules(changes: Changes) -> dict[str, str]:
    """Modules that are stored whole, own name to base name: those with a changed value that is no bias."""
    return {
        changes.modules[name]: name.rpartition(".")[0]
        for name in changes.values
        if not name.endswith(".bias")
    }


def _base_name(base: Base, inherited: Mapping[str, Any]) -> str | None:
    """A hub id if one is known: local paths say nothing to others."""
    for name in (inherited.get("base_model_name_or_path"), base.name):
        if name and not Path(str(name)).expanduser().exists():
            return str(name)
    return None
