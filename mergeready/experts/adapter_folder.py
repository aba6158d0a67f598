"""Which library wrote an adapter: told by what its files say, since three of them call their configuration alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mergeready.errors import FormatError, UnsupportedError, listing
from mergeready.experts.adapter import AdapterTaskVector
from mergeready.experts.adapterhub import (
    HEAD_NAMES,
    WEIGHTS_NAMES,
    AdapterHubConfig,
    AdapterHubTaskVector,
)
from mergeready.experts.base import Base
from mergeready.experts.mlx import WEIGHTS_NAME as MLX_WEIGHTS_NAME
from mergeready.experts.mlx import MlxConfig, MlxTaskVector
from mergeready.experts.peft_config import CONFIG_NAME, PeftConfig
from mergeready.experts.peft_lora import WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from mergeready.experts.peft_lora import PeftTaskVector, plain_name
from mergeready.experts.tokens import TokenRows, token_rows
from mergeready.weights.json_file import read_json_object
from mergeready.weights.open import open_tensor_file
from mergeready.weights.safetensors_file import SafetensorsFile
from mergeready.weights.source import WeightSource

AdapterFormat: TypeAlias = Literal["peft", "adapterhub", "mlx"]
AdapterConfig: TypeAlias = PeftConfig | AdapterHubConfig | MlxConfig

_FILES: Mapping[AdapterFormat, tuple[str, ...]] = {
    "peft": (PEFT_WEIGHTS_NAME, "adapter_model.bin"),
    "adapterhub": WEIGHTS_NAMES,
    "mlx": (MLX_WEIGHTS_NAME,),
}
_KOHYA = (".lora_up.", ".lora_down.", "lora_unet_", "lora_te_", "lora_te1_")


def adapter_format(fields: Mapping[str, Any]) -> AdapterFormat | None:
    """Which library an ``adapter_config.json`` is of; None if of none that is known.

    >>> adapter_format({"peft_type": "LORA"}), adapter_format({"fine_tune_type": "dora"})
    ('peft', 'mlx')
    >>> adapter_format({"config": {"architecture": "lora"}, "version": "adapters.1.2.0"})
    'adapterhub'
    """
    if "peft_type" in fields:
        return "peft"
    if "config" in fields and ("version" in fields or "model_class" in fields or "model_type" in fields):
        return "adapterhub"
    if "fine_tune_type" in fields or "lora_parameters" in fields:
        return "mlx"
    return None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``, whichever library wrote it.

    Raises:
        FormatError: If it is not JSON, or of no known library.
        UnsupportedError: If it describes what cannot be folded into weights.
    """
    path = folder / CONFIG_NAME
    fields = read_json_object(path)
    kind = adapter_format(fields)
    if kind == "peft":
        return PeftConfig(fields, str(folder))
    if kind == "adapterhub":
        return AdapterHubConfig(fields, str(folder))
    if kind == "mlx":
        return MlxConfig(fields, str(folder))
    raise FormatError(
        f"{path} is of no known kind: it has neither `peft_type` (PEFT), nor `config` and `version` (AdapterHub), nor "
        "`fine_tune_type` (MLX)."
    )


def open_adapter_weights(folder: Path, kind: AdapterFormat, label: str, allow_pickle: bool) -> WeightSource:
    """The tensors of an adapter's folder.

    Raises:
        FormatError: If there are none, or only a pickle file without leave to read it.
    """
    for name in _FILES[kind]:
        if (folder / name).is_file():
            return open_tensor_file(folder / name, label, allow_pickle=allow_pickle)
    raise FormatError(f"{folder} has {CONFIG_NAME} but no {_FILES[kind][0]}. Save the adapter again.")


def open_adapter(
    folder: Path, base: Base, label: str, *, allow_pickle: bool = False
) -> tuple[AdapterFormat, AdapterTaskVector, TokenRows]:
    """Open the adapter in a folder: its format, its task vector and what is known of its tokens.

    Raises:
        MergeReadyError: As ``open_expert`` does for adapters.
    """
    config = read_adapter_config(folder)
    base.require_name(config.base_name, label)
    kind: AdapterFormat = (
        "peft" if isinstance(config, PeftConfig) else "mlx" if isinstance(config, MlxConfig) else "adapterhub"
    )
    tokens = token_rows(open_adapter_weights(folder, kind, label, allow_pickle), base, folder, plain_name)
    vector: AdapterTaskVector
    if isinstance(config, PeftConfig):
        vector = PeftTaskVector(tokens.source, config, base, label)
    elif isinstance(config, MlxConfig):
        vector = MlxTaskVector(tokens.source, config, base, label)
    else:
        vector = AdapterHubTaskVector(tokens.source, config, base, label)
        vector.extra += _head_parameters(folder, label)
    return kind, vector, tokens


def _head_parameters(folder: Path, label: str) -> tuple[str, ...]:
    """What an AdapterHub folder holds beside the adapter: the prediction head of its own task."""
    for name in HEAD_NAMES:
        path = folder / name
        if path.is_file():
            return tuple(SafetensorsFile(path).infos) if path.suffix == ".safetensors" else (name,)
    return ()


def refuse_foreign_lora(names: Iterable[str], label: str) -> None:
    """Raise if tensor names are those of LoRA files for image models.

    Raises:
        UnsupportedError: If so.
    """
    foreign = [name for name in names if any(mark in name for mark in _KOHYA)]
    if foreign:
        raise UnsupportedError(
            f"{label} is a LoRA in kohya's or diffusers' format ({listing(foreign, 2)}), which is not read. "
            "PEFT, AdapterHub and MLX adapters are."
        )


def explain_missing_weights(folder: Path, label: str) -> None:
    """Raise with the reason if a folder without model weights holds something else that is recognised.

    Raises:
        FormatError: If its adapters lie in subfolders.
        UnsupportedError: If it holds a LoRA in a format that is not read, or shards of a distributed checkpoint.
    """
    shards = sorted({str(path.parent.relative_to(folder)) for path in folder.rglob("*.distcp")})
    if shards:
        raise UnsupportedError(
            f"{label} holds the shards of a distributed checkpoint ({listing(shards)}), as FSDP saves them with "
            "SHARDED_STATE_DICT. Join them with `accelerate merge-weights SHARDS OUTPUT`, or take a pick of that run: "
            "picks are whole."
        )
    nested = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    if nested:
        raise FormatError(f"{label} holds adapters in subfolders ({listing(nested)}): name one of them.")
    for path in sorted(folder.glob("*.safetensors")):
        refuse_foreign_lora(SafetensorsFile(path).infos, label)
