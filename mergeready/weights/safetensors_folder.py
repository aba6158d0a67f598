from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergeready.errors import FormatError, listing
from mergeready.weights.safetensors_file import SafetensorsFile
from mergeready.weights.source import TensorInfo, WeightSource

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsFolder(WeightSource):
    """The weights in a folder: ``model.safetensors``, or shards named by ``model.safetensors.index.json``.

    A path to one ``.safetensors`` file works as well.

    Raises:
        FormatError: If there are no safetensors, a shard is missing, broken or outside the folder, or
            the index and the shards disagree. All offenders are listed at once.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = Path(path)
        self.label = label or str(path)
        self._file_of = self._open_files()
        self._infos = {name: file.infos[name] for name, file in self._file_of.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def files(self) -> list[SafetensorsFile]:
        """The opened files, each once, in stored order."""
        return list(dict.fromkeys(self._file_of.values()))

    @property
    def metadata(self) -> dict[str, str]:
        """The string metadata of all files together."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self._file_of[name].read_flat(name, start, stop)

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a contiguous 1-D CPU tensor of the stored dtype with the elements from ``start`` on."""
        self._file_of[name].read_into(name, start, out)

    def _open_files(self) -> dict[str, SafetensorsFile]:
        if self.path.is_file():
            file = SafetensorsFile(self.path)
            return dict.fromkeys(file.infos, file)
        # As in transformers: saving whole over a sharded save leaves the old index behind.
        if (self.path / SINGLE_NAME).is_file():
            file = SafetensorsFile(self.path / SINGLE_NAME)
            return dict.fromkeys(file.infos, file)
        if (self.path / INDEX_NAME).is_file():
            return self._open_index(self.path / INDEX_NAME)
        if not self.path.exists():
            raise FormatError(f"{self.path} does not exist.")
        raise FormatError(
            f"{self.path} holds neither {SINGLE_NAME} nor {INDEX_NAME}. "
            "Save the model with save_pretrained, which writes safetensors."
        )

    def _open_index(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = _read_weight_map(index)
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise FormatError(f"{index} names files outside its folder: {listing(outside)}.")
        here = {path.name for path in self.path.iterdir() if path.is_file()}  # asked by name, odd ones raise
        absent = [shard for shard in shards if shard not in here]
        if absent:
            raise FormatError(f"{index} names shards that are not there: {listing(absent)}.")
        files = {shard: SafetensorsFile(self.path / shard) for shard in shards}
        lost = [name for name, shard in weight_map.items() if name not in files[shard].infos]
        if lost:
            raise FormatError(f"{index} places tensors in shards that do not hold them: {listing(lost)}.")
        # Shard by shard in stored order, so that reading everything reads every file once from front to back.
        return {
            name: files[shard]
            for shard in shards
            for name in files[shard].infos
            if weight_map.get(name) == shard
        }


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in weight_map.items()):
            raise TypeError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index} is not a safetensors index ({error}).") from error
    result: dict[str, str] = weight_map
    return result
