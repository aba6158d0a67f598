from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from mergeready.errors import FormatError, OptionError, listing
from mergeready.weights.atomic import new_folder
from mergeready.weights.safetensors_file import DTYPE_NAMES
from mergeready.weights.safetensors_folder import INDEX_NAME, SINGLE_NAME
from mergeready.weights.source import TensorInfo

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "*sentence_*.json",
    "LICENSE*",
    "NOTICE*",
    "*/config.json",
)
_NO_COMPANIONS = {".py", ".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
DEFAULT_SHARD_BYTES = 5 * 10**9


class FolderWriter(AbstractContextManager["FolderWriter"]):
    """Write a model folder of safetensors piece by piece, holding no tensor longer than its piece.

    All names, shapes and dtypes are known beforehand, so every file's layout is fixed first and values go
    straight to their place. The folder appears under its name when the ``with`` block ends without an
    exception and every element was written; until then it is a hidden folder beside it.

    Args:
        output: The folder to make.
        infos: Shape and dtype of every tensor, in the order in which files shall hold them.
        shard_bytes: Upper size of one file in bytes (a larger tensor gets a file of its own).
        metadata: String metadata for every file's header.
        companions: Folder whose config, tokenizer and licence files come along; weights, model cards and
            code do not.
        overwrite: Replace ``output`` if it exists.

    Raises:
        OutputExistsError: If ``output`` exists and ``overwrite`` is not set.
        FormatError: If safetensors has no such dtype; at the end of the block, if some tensors were not
            written whole.
    """

    def __init__(
        self,
        output: str | Path,
        infos: Mapping[str, TensorInfo],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        companions: Path | None = None,
        overwrite: bool = False,
    ) -> None:
        if shard_bytes <= 0:
            raise OptionError(f"`shard_bytes` must be positive, not {shard_bytes}.")
        unknown = [f"{info.dtype} of {name}" for name, info in infos.items() if info.dtype not in DTYPE_NAMES]
        if unknown:
            raise FormatError(f"safetensors cannot hold {listing(unknown)}.")
        self.output = Path(output)
        self.infos = dict(infos)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._shards = _plan_shards(self.infos, shard_bytes)
        self._companions = companions
        self._context = new_folder(self.output, overwrite=overwrite)
        self._files: list[BinaryIO] = []
        self._place: dict[str, tuple[BinaryIO, int]] = {}
        self._written = dict.fromkeys(self.infos, 0)
        self._count_lock = threading.Lock()

    def __enter__(self) -> FolderWriter:
        self.folder = self._context.__enter__()
        try:
            if self._companions is not None:  # first, so that the block can still edit them
                copy_companions(self._companions, self.folder)
            for file_name, names in self._shards.items():
                self._create(self.folder / file_name, names)
        except BaseException as error:
            self._close()
            self._context.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as failure:
            self._close()
            self._context.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._close()
        self._context.__exit__(kind, error, traceback)

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Write ``value``, flattened and cast to the file's dtype, at element ``start`` of tensor ``name``.

        Every element must be written exactly once; different threads may write different pieces.
        """
        info = self.infos[name]
        flat = value.detach().reshape(-1).to(device="cpu", dtype=info.dtype).contiguous()
        file, offset = self._place[name]
        view = memoryview(flat.view(torch.uint8).numpy().data)
        position = offset + start * info.dtype.itemsize
        while view:
            count = os.pwrite(file.fileno(), view, position)
            view, position = view[count:], position + count
        with self._count_lock:
            self._written[name] += flat.numel()

    def _create(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": self._metadata}
        position = 0
        for name in names:
            info = self.infos[name]
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
        file = path.open("wb")
        self._files.append(file)
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        start = 8 + len(text)
        file.truncate(start + position)
        for name in names:
            self._place[name] = (file, start)
            start += self.infos[name].nbytes

    def _finish(self) -> None:
        short = [name for name, info in self.infos.items() if self._written[name] != info.numel]
        if short:
            raise FormatError(f"{self.output} was left incomplete: {len(short)} tensors, first {short[0]}.")
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            total = sum(info.nbytes for info in self.infos.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close(self) -> None:
        for file in self._files:
            file.close()


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer and licence files of a model folder: everything needed to load, no weights."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and len(relative.parts) <= 2 and _is_companion(relative):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def _is_companion(relative: Path) -> bool:
    name = relative.as_posix()
    return any(fnmatch(name, pattern) for pattern in _COMPANIONS) and relative.suffix not in _NO_COMPANIONS


def _plan_shards(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, list[str]]:
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
