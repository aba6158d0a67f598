from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TypeAlias
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from mergeready.errors import FormatError, OptionError
from mergeready.weights.module import ModuleSource
from mergeready.weights.safetensors_folder import INDEX_NAME, SINGLE_NAME, SafetensorsFolder
from mergeready.weights.source import WeightSource
from mergeready.weights.state_dict import StateDictSource

WeightsLike: TypeAlias = str | Path | Mapping[str, Tensor] | nn.Module | WeightSource
"""What stands for weights everywhere: a folder or hub id, a state dict, a live module, an open source."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.codes", "*.tokenizer", "*.jinja"]
_HUB_FILES += ["README.md", "LICENSE*", "NOTICE*"]
_PICKLE_NAME = "pytorch_model.bin"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def open_weights(
    weights: WeightsLike, *, revision: str | None = None, allow_pickle: bool = False
) -> WeightSource:
    """Open weights wherever they are, without reading values yet.

    Args:
        weights: A folder, a hub id, a state dict, a live module, or a source that is open already.
        revision: Commit, tag or branch; only for a hub id.
        allow_pickle: Also accept ``pytorch_model.bin`` or another pickle file (read with ``weights_only=True``, as
            memory maps where torch 1.6 or later wrote it). Off by default, since pickle files can run code.

    Raises:
        FormatError: If there is nothing that can be read there.
    """
    if isinstance(weights, WeightSource):
        return weights
    if isinstance(weights, nn.Module):
        return ModuleSource(weights)
    if isinstance(weights, Mapping):
        return StateDictSource(weights)
    folder = resolve_folder(weights, revision=revision)
    if folder.is_file() and folder.suffix in _PICKLES:
        return open_tensor_file(folder, str(weights), allow_pickle=allow_pickle)
    has_safetensors = folder.is_file() or (folder / INDEX_NAME).exists() or (folder / SINGLE_NAME).exists()
    if not has_safetensors and (folder / _PICKLE_NAME).is_file():
        return open_tensor_file(folder / _PICKLE_NAME, allow_pickle=allow_pickle)
    return SafetensorsFolder(folder, label=str(weights))


def resolve_folder(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a path or hub id; a hub id is downloaded when it is not in the cache.

    Raises:
        FormatError: If it is neither a local path nor a hub id that can be fetched.
        OptionError: If a revision is given for a local path.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        if revision is not None:
            raise OptionError(f"`revision` belongs to hub ids; {path_or_id} is a local path.")
        return path
    if not isinstance(path_or_id, str) or not _HUB_ID.fullmatch(path_or_id):
        raise FormatError(f"{path_or_id} does not exist.")
    # Here, since it takes half as long to import as all of ours, and most weights lie in folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FormatError(
            f"{path_or_id} is neither a folder here nor a model that the hub gave us ({error})."
        ) from error


def open_tensor_file(path: Path, label: str | None = None, *, allow_pickle: bool = False) -> WeightSource:
    """Open one file of tensors: safetensors, or a pickle file if that is allowed.

    Raises:
        FormatError: If it is a pickle file and not allowed, or cannot be read as tensors alone.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFolder(path, label)
    if not allow_pickle:
        raise FormatError(
            f"{path} is a pickle file, which can run code when it is read. Convert it to safetensors, "
            "or pass allow_pickle=True if you trust its author."
        )
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=is_zipfile(path)
        )  # not before torch 1.6
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FormatError(
            f"{path} cannot be read as tensors alone ({error}). Convert it to safetensors."
        ) from error
    if not isinstance(state, Mapping):
        raise FormatError(f"{path} holds a {type(state).__name__}, not a state dict.")
    return StateDictSource(state, label or str(path))
