from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergeready.errors import FormatError
from mergeready.weights.atomic import new_file, new_folder
from mergeready.weights.layout import DEFAULT_SHARD_BYTES, FolderLayout
from mergeready.weights.safetensors_folder import SINGLE_NAME
from mergeready.weights.source import TensorInfo

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*vocab*.json",
    "vocab*",
    "merges.txt",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "word_*.json",
    "tekken.json",
    "*.model",
    "*.spm",
    "*.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "*sentence_*.json",
    "LICENSE*",
    "NOTICE*",
    "*/config.json",
)
_NO_COMPANIONS = {".py", ".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}


class PieceWriter(AbstractContextManager["PieceWriter"]):
    """Write values to their places in files that a layout made, in any order and from any thread.

    Args:
        folder: Where ``layout.create`` made the files.
        layout: Where everything goes.
    """

    def __init__(self, folder: Path, layout: FolderLayout) -> None:
        self._infos = layout.infos
        self._written = dict.fromkeys(layout.infos, 0)
        self._lock = threading.Lock()
        self._place: dict[str, tuple[int, int]] = {}
        self._open: list[int] = []
        self._dirty: set[int] = set()
        try:
            for file in layout.files:
                fd = os.open(folder / file.name, os.O_WRONLY)
                self._open.append(fd)
                self._place |= {name: (fd, offset) for name, offset in file.offsets.items()}
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Write ``value``, flattened and cast to the file's dtype, at element ``start`` of tensor ``name``.

        Every element must be written exactly once; different threads may write different pieces.
        """
        info = self._infos[name]
        flat = value.detach().reshape(-1).to(device="cpu", dtype=info.dtype).contiguous()
        fd, offset = self._place[name]
        view = memoryview(flat.view(torch.uint8).numpy().data)
        position = offset + start * info.dtype.itemsize
        while view:
            count = os.pwrite(fd, view, position)
            view, position = view[count:], position + count
        with self._lock:
            self._written[name] += flat.numel()
            self._dirty.add(fd)

    def require_whole(self, names: Iterable[str]) -> None:
        """Raise unless every element of these tensors was written by this writer.

        Raises:
            FormatError: If some were not.
        """
        short = [name for name in names if self._written[name] != self._infos[name].numel]
        if short:
            raise FormatError(f"{len(short)} tensors were left incomplete, first {short[0]}.")

    def sync(self) -> None:
        """Flush what was written so far to the disk."""
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for fd in dirty:
            os.fsync(fd)

    def close(self) -> None:
        """Release the file descriptors."""
        while self._open:
            os.close(self._open.pop())


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
        self.output = Path(output)
        self.infos = dict(infos)
        self._layout = FolderLayout.plan(self.infos, shard_bytes=shard_bytes, metadata=metadata)
        self._companions = companions
        self._context = new_folder(self.output, overwrite=overwrite)

    def __enter__(self) -> FolderWriter:
        self.folder = self._context.__enter__()
        try:
            if self._companions is not None:  # first, so that the block can still edit them
                copy_companions(self._companions, self.folder)
            self._layout.create(self.folder)
            self._pieces = PieceWriter(self.folder, self._layout)
        except BaseException as error:
            self._context.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pieces.close()
        try:
            if error is None:
                self._finish()
        except BaseException as failure:
            self._context.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._context.__exit__(kind, error, traceback)

    def write(self, name: str, value: Tensor, start: int = 0) -> None:
        """Write a piece of a tensor; see :meth:`PieceWriter.write`."""
        self._pieces.write(name, value, start)

    def _finish(self) -> None:
        try:
            self._pieces.require_whole(self.infos)
        except FormatError as error:
            raise FormatError(f"{self.output} cannot be finished: {error}") from error
        self._layout.write_index(self.folder)


@contextmanager
def write_file(
    path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Iterator[PieceWriter]:
    """Write one safetensors file piece by piece; it takes the place of ``path`` when the block ends and all is written.

    Args:
        path: The file.
        infos: Shape and dtype of every tensor, in the order in which the file shall hold them.
        metadata: String metadata for its header.

    Raises:
        FormatError: If safetensors has no such dtype; at the end of the block, if some tensors were not written whole.
    """
    size = sum(info.nbytes for info in infos.values()) + 1
    planned = FolderLayout.plan(infos, shard_bytes=size, metadata=metadata)
    with new_file(path) as temporary:
        layout = FolderLayout(planned.infos, (replace(planned.files[0], name=temporary.name),))
        layout.create(temporary.parent)
        with PieceWriter(temporary.parent, layout) as writer:
            yield writer
            writer.require_whole(infos)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are in memory to one safetensors file, complete or not at all.

    Raises:
        OSError: If the disk is full, where the safetensors library has an error of its own.
    """
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with write_file(path, infos, metadata or {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer and licence files of a model folder: everything needed to load, but for its weights."""
    modules = module_weights(source)
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and len(relative.parts) <= 2 and (_is_companion(relative) or relative in modules):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def module_weights(folder: Path) -> list[Path]:
    """The weights of a sentence encoder's further modules, such as a dense layer, as paths in its folder."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    entries = modules if isinstance(modules, list) else []
    names = [str(entry.get("path") or "") for entry in entries if isinstance(entry, Mapping)]
    files = [Path(name) / SINGLE_NAME for name in names if name and Path(name).name == name]
    return [file for file in files if (folder / file).is_file()]


def _is_companion(relative: Path) -> bool:
    name = relative.as_posix()
    return any(fnmatch(name, pattern) for pattern in _COMPANIONS) and relative.suffix not in _NO_COMPANIONS
