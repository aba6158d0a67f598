from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError, UnsupportedError
from mergeready.experts.peft_values import malformed_values
from mergeready.weights.json_file import read_json_object

CONFIG_NAME = "adapter_config.json"

_CHANGES_BASE = re.compile(r"pissa|olora|corda|lora_ga|loftq")

_REFUSALS = {
    "layer_replication": "it duplicates layers of the base, so its parameters have no counterpart there",
    "use_qalora": "its factors act on pooled groups of inputs and cannot be folded into the weight",
    "arrow_config": "it routes between adapters for each token and is no single change of the weights",
    "alora_invocation_tokens": "it acts only after its invocation tokens, so it is no change of the weights",
    "use_bdlora": "its factors are block-diagonal, which is not supported",
    "kasa_config": "it changes the base weights at its start (KaSA truncates their singular values)",
    "monteclora_config": "it samples its weights at each forward pass",
}

_ADDITIVE = (
    "only LoRA adapters are read. Its effect is a sum: load it with PEFT, then call `merge_and_unload` and pass the "
    "full model, or convert it with `save_as_lora`, which keeps a part of it"
)
_MULTIPLIES = "it multiplies weights or activations: its effect is no sum that could be merged with others"
_PROMPTS = "it changes inputs or hidden states, not weights"
_UNKNOWN_KIND = "only LoRA adapters are read"
_REASONS = {
    **dict.fromkeys(("ADALORA", "LOHA", "LOKR", "VERA", "FOURIERFT", "RANDLORA", "DELORA"), _ADDITIVE),
    **dict.fromkeys(("IA3", "OFT", "BOFT", "HRA", "ROAD"), _MULTIPLIES),
    **dict.fromkeys(
        ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"),
        _PROMPTS,
    ),
    "LN_TUNING": "only LoRA adapters are read. Merge it into the base with `merge_and_unload` and pass the full model",
    "XLORA": "it routes between adapters for each token and is no single change of the weights",
    "POLY": "it routes between adapters for each task and is no single change of the weights",
}
_QUANTISED = re.compile(r"[-_.](?:bnb-)?(?:[48]-?bit|int[48]|nf4|awq|gptq)\b", re.IGNORECASE)

_WITHOUT_TOKEN_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

_NEUTRAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "velora_config",
}
"""Fields that say how the adapter was trained or where it goes; its tensors already tell what matters."""

_USED = {
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a PEFT LoRA configuration that decide what its tensors mean.

    Raises:
        UnsupportedError: If the configuration asks for something that cannot be folded into weights, or for
            something unknown.
        FormatError: If a value is not of its field's kind.
    """

    fields: Mapping[str, Any]
    label: str

    def __post_init__(self) -> None:
        problems = list(self._problems())
        malformed = list(malformed_values(self.fields))
        if malformed and not problems:
            raise FormatError(f"{self.label}: {'; '.join(malformed)}. Correct its {CONFIG_NAME}.")
        if problems:
            raise UnsupportedError(
                f"{self.label} cannot be folded into its base: " + "; ".join(problems) + "."
            )

    def _problems(self) -> list[str]:
        kind = getattr(self.fields.get("peft_type"), "value", self.fields.get("peft_type"))
        if not isinstance(kind, str | None):
            return [f"its type is {kind!r}"]
        if kind not in ("LORA", None):
            return [f"its type is {kind}, and {_REASONS.get(kind, _UNKNOWN_KIND)}"]
        found = [f"`{key}`: {reason}" for key, reason in _REFUSALS.items() if self.fields.get(key)]
        init = self.fields.get("init_lora_weights", True)
        if isinstance(init, str) and _CHANGES_BASE.match(init.lower()):
            found.append(
                f"`init_lora_weights={init!r}` changed the base at the start of training, so the factors are "
                "relative to another base (convert it: save_pretrained(path_initial_model_for_weight_conversion=...))"
            )
        known = _NEUTRAL | _USED | _REFUSALS.keys()
        found += [
            f"`{key}={value!r}` is not known to this version of mergeready"
            for key, value in self.fields.items()
            if key not in known and value not in (None, False, "", [], {})
        ]
        return found

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """Read ``adapter_config.json``.

        Raises:
            FormatError: If it is not JSON, or describes no PEFT adapter.
        """
        path = folder / CONFIG_NAME
        fields = read_json_object(path)
        if "peft_type" not in fields:
            raise FormatError(f"{path} has no `peft_type`: it is not a PEFT adapter.")
        return cls(fields, str(folder))

    @property
    def base_name(self) -> str | None:
        """What the adapter calls its base: an id or a path."""
        name = self.fields.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def notes(self) -> list[str]:
        """What else is to be known: whether it was trained on quantised weights, as far as its base's name says."""
        return quantised_note(self.base_name)

    @property
    def parameter_leaves(self) -> list[str]:
        """Last parts of the parameter names in `target_parameters`, each once."""
        named = self.fields.get("target_parameters") or []
        return list(dict.fromkeys(str(name).rpartition(".")[2] for name in named))

    def trains_whole(self, module: str) -> bool:
        """Whether a module is one of those that `modules_to_save` names, or lies inside of one."""
        named = self.fields.get("modules_to_save") or ()
        names = named if isinstance(named, list | tuple | set) else (named,)
        return any(f".{name}." in f".{module}." for name in names)

    @property
    def scores_tokens(self) -> bool:
        """Whether the adapted model may have a head over tokens, as far as its task says."""
        task = self.fields.get("task_type")
        return getattr(task, "value", task) not in _WITHOUT_TOKEN_HEAD

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether targets store their weight as (in, out)."""
        return bool(self.fields.get("fan_in_fan_out"))

    def scaling(self, module: str, rank: int) -> float:
        """LoRA's factor for one module: α/r, or α/√r with rsLoRA (arXiv 2312.03732).

        ``rank`` is read from the tensors, since patterns make it differ by module; α's pattern keys are regular
        expressions that match the end of the module's name, the first match counting.
        """
        alpha = self.fields.get("lora_alpha")
        for pattern, value in (self.fields.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        if not isinstance(alpha, int | float):
            raise FormatError(f"{self.label}: `lora_alpha` is {alpha!r}, not a number.")
        return float(alpha) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def token_rows(self, module: str) -> list[int]:
        """The trained token ids of one embedding module."""
        indices = self.fields.get("trainable_token_indices")
        if isinstance(indices, dict):
            for name, rows in indices.items():
                if module == name or module.endswith("." + name):
                    return [int(row) for row in rows]
        elif isinstance(indices, list):
            return [int(row) for row in indices]
        raise FormatError(f"{self.label}: `trainable_token_indices` says nothing about {module}.")


def quantised_note(base_name: str | None) -> list[str]:
    """A note if the name of an adapter's base says that the base was quantised.

    >>> quantised_note("org/model-bnb-4bit")[0]
    'trained on the quantised org/model-bnb-4bit: on other weights it acts a little differently; check its outputs'
    >>> quantised_note("org/model")
    []
    """
    if base_name is None or not _QUANTISED.search(base_name):
        return []
    return [
        f"trained on the quantised {base_name}: on other weights it acts a little differently; check its outputs"
    ]


def unquantised(name: str) -> str:
    """A base's name without what says that it was quantised.

    >>> unquantised("org/model-bnb-4bit")
    'org/model'
    """
    return _QUANTISED.sub("", name)
