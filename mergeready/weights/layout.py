from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergeready.errors import FormatError, OptionError, listing
from mergeready.weights.safetensors_file import DTYPE_NAMES
from mergeready.weights.safetensors_folder import INDEX_NAME, SINGLE_NAME
from mergeready.weights.source import TensorInfo

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file before its values are known.

    Attributes:
        name: The file's name in its folder.
        head: The bytes before the first value: length and header.
        offsets: Tensor name to the position of its first byte in the file, in stored order.
        size: Size of the whole file in bytes.
    """

    name: str
    head: bytes
    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True)
class FolderLayout:
    """Where every byte of a model folder goes, known from names, shapes and dtypes alone.

    So tensors can be written in any order, in pieces, by several threads or processes, and in several sittings.
    """

    infos: Mapping[str, TensorInfo]
    files: tuple[FileLayout, ...]

    @classmethod
    def plan(
        cls,
        infos: Mapping[str, TensorInfo],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> FolderLayout:
        """Lay out tensors in files of at most ``shard_bytes``; a larger tensor gets a file of its own.

        Args:
            infos: Shape and dtype of every tensor, in the order in which files shall hold them.
            shard_bytes: Upper size of one file's values in bytes.
            metadata: String metadata for every file's header.

        Raises:
            OptionError: If ``shard_bytes`` is not positive.
            FormatError: If safetensors has no such dtype; all are listed.

        Example:
            >>> import torch
            >>> layout = FolderLayout.plan({"x": TensorInfo((2,), torch.float32)})
            >>> layout.files[0].name, layout.files[0].size - len(layout.files[0].head)
            ('model.safetensors', 8)
        """
        if shard_bytes <= 0:
            raise OptionError(f"`shard_bytes` must be positive, not {shard_bytes}.")
        unknown = [f"{info.dtype} of {name}" for name, info in infos.items() if info.dtype not in DTYPE_NAMES]
        if unknown:
            raise FormatError(f"safetensors cannot hold {listing(unknown)}.")
        described = {"format": "pt", **(metadata or {})}
        shards = _split(infos, shard_bytes).items()
        return cls(dict(infos), tuple(_lay_out(file, names, infos, described) for file, names in shards))

    def create(self, folder: Path) -> None:
        """Make the files in a folder, with their headers and their full size; values are zero until written."""
        for file in self.files:
            with (folder / file.name).open("wb") as made:
                made.write(file.head)
                made.truncate(file.size)

    def write_index(self, folder: Path) -> None:
        """Write the index that tells loaders which file holds which tensor, where there is more than one."""
        if len(self.files) > 1:
            weight_map = {name: file.name for file in self.files for name in file.offsets}
            total = sum(info.nbytes for info in self.infos.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _lay_out(
    file_name: str, names: list[str], infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> FileLayout:
    header: dict[str, object] = {"__metadata__": metadata}
    starts, position = {}, 0
    for name in names:
        info = infos[name]
        starts[name] = position
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    head = struct.pack("<Q", len(text)) + text
    offsets = {name: len(head) + start for name, start in starts.items()}
    return FileLayout(file_name, head, offsets, len(head) + position)


def _split(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
