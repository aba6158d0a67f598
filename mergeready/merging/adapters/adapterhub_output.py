"""Merged changes as an adapter of the `adapters` library: one rank for all, α = r, so that its scaling is 1."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeready.errors import UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.merging.adapters.changes import Changes
from mergeready.merging.adapters.peft_output import stored_factors
from mergeready.weights.json_file import read_json_object
from mergeready.weights.writer import write_tensors

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter.safetensors"
ADAPTER_NAME = "merged"
_VERSION = "adapters.1.3.0"
"""The version whose files these are like."""

# Where the library puts LoRA, by the end of a module's name. It calls the two layers of an MLP intermediate and
# output, for some models the other way round; both are switched on together, and layers without factors stay as is.
_PLACES = {
    "q": r"(attention\.self\.query|attention\.attention\.query|query_proj|q_proj|q_lin|SelfAttention\.q)",
    "k": r"(attention\.self\.key|attention\.attention\.key|key_proj|k_proj|k_lin|SelfAttention\.k)",
    "v": r"(attention\.self\.value|attention\.attention\.value|value_proj|v_proj|v_lin|SelfAttention\.v)",
    "qkv": r"(attn\.c_attn|attention\.self\.in_proj)",
    "mlp": r"(intermediate\.dense|(?<!attention\.)output\.dense"
    r"|mlp\.(up_proj|down_proj|fc1|fc2|c_fc|c_proj|fc_in|fc_out)|layers\.\d+\.(fc1|fc2)|ffn\.(lin1|lin2)|DenseReluDense\.(wi|wi_1|wo))",
}


def adapterhub_place(module: str) -> str | None:
    """Where the library has LoRA in a module: q, k, v, qkv (a fused weight), mlp, or nowhere.

    >>> adapterhub_place("bert.encoder.layer.0.attention.self.query"), adapterhub_place("classifier")
    ('q', None)
    """
    return next((place for place, end in _PLACES.items() if re.search(rf"(^|\.){end}$", module)), None)


def adapterhub_tensors(changes: Changes, base: Base, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapter's tensors under the library's names, padded with zeros to the largest rank.

    Raises:
        UnsupportedError: If something changes that the library cannot adapt; all are listed.
    """
    modules = changes.modules
    homeless = [modules[name] for name in changes.factors if adapterhub_place(modules[name]) is None]
    homeless += [*changes.values, *changes.rows]
    homeless += [modules[name] for name, change in changes.factors.items() if change.kind == "embedding"]
    if homeless:
        raise UnsupportedError(
            f"`adapters` has no LoRA for {listing(dict.fromkeys(homeless))}: use output_format='peft' or 'full'."
        )
    rank = max((change.delta.A.shape[0] for change in changes.factors.values()), default=1)
    tensors = {}
    for name, change in changes.factors.items():
        A, B = stored_factors(change, base.source.infos[name].shape)
        A = torch.cat([A, A.new_zeros(rank - A.shape[0], A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], rank - B.shape[1])], dim=1)
        if adapterhub_place(modules[name]) == "qkv":
            A = A.repeat(3, 1)  # each of the three blocks has its own A
        key = f"{modules[name]}.loras.{ADAPTER_NAME}.lora_"
        tensors[key + "A"], tensors[key + "B"] = A.to(dtype).contiguous(), B.to(dtype).contiguous()
    return tensors


def adapterhub_config(
    changes: Changes, tensors: Mapping[str, Tensor], base: Base, inherited: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's configuration, with facts about the model from the base's or the merged adapters' own."""
    model = _model_config(base)
    places = {adapterhub_place(changes.modules[name]) or "" for name in changes.factors}
    attention = [block for block in "qkv" if block in places or "qkv" in places]
    rank = min((tensor.shape[1] for key, tensor in tensors.items() if key.endswith("lora_B")), default=1)
    inner = {
        "architecture": "lora",
        "r": rank,
        "alpha": rank,
        "attn_matrices": attention,
        "selfattn_lora": bool(attention),
        "intermediate_lora": "mlp" in places,
        "output_lora": "mlp" in places,
        "leave_out": [],
        "composition_mode": "add",
        "dropout": 0.0,
        "dtype": None,
        "init_weights": "lora",
        "init_weights_seed": None,
        "use_dora": False,
        "use_gating": False,
        "vera_b": None,
        "vera_d": None,
    }
    return {
        "config": inner,
        "hidden_size": inherited.get("hidden_size", model.get("hidden_size", model.get("n_embd"))),
        "model_class": inherited.get("model_class", (model.get("architectures") or [None])[0]),
        "model_name": inherited.get("model_name", base.name),
        "model_type": inherited.get("model_type", model.get("model_type")),
        "name": ADAPTER_NAME,
        "version": _VERSION,
    }


def write_adapterhub(
    folder: Path, changes: Changes, base: Base, inherited: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write the adapter into a folder that is being made; returns its tensors."""
    tensors = adapterhub_tensors(changes, base, dtype)
    config = adapterhub_config(changes, tensors, base, inherited)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS_NAME, tensors)
    return tensors


def _model_config(base: Base) -> dict[str, Any]:
    if base.folder is None or not (base.folder / "config.json").is_file():
        return {}
    return read_json_object(base.folder / "config.json")
