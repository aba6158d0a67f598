from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergeready.errors import FormatError
from mergeready.weights.source import TensorInfo

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LENGTH = struct.Struct("<Q")
_POINTER = b"version https://git-lfs.github.com/"


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


class SafetensorsFile:
    """One safetensors file, read by position instead of mapped into memory.

    The safetensors library validates the header; values are then read with ``pread``. Mapped pages would
    count as resident memory once touched, and monitoring streams over base and peers again and again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as checked:
                self.metadata: Mapping[str, str] = checked.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            if _is_pointer(path):
                raise FormatError(
                    f"{path} is a pointer of Git LFS in place of the file. Fetch it with `git lfs pull`."
                ) from error
            raise FormatError(
                f"{path} is not a complete safetensors file ({error}). Download or save it again."
            ) from error
        self._fd = os.open(path, os.O_RDONLY)
        self._lock = threading.Lock()
        (length,) = _HEADER_LENGTH.unpack(self._bytes(0, 8))
        header: dict[str, Any] = json.loads(self._bytes(8, length), object_pairs_hook=self._once_each)
        header.pop("__metadata__", None)
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        unknown = {f"{name} ({entry['dtype']})" for name, entry in ordered if entry["dtype"] not in DTYPES}
        if unknown:
            raise FormatError(
                f"{path} holds dtypes that torch cannot represent: {', '.join(sorted(unknown))}."
            )
        self.infos = {name: TensorInfo(tuple(e["shape"]), DTYPES[e["dtype"]]) for name, e in ordered}
        self._offsets = {name: 8 + length + entry["data_offsets"][0] for name, entry in ordered}

    def _once_each(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object of the header; parsers differ in which of two equal keys they take."""
        found = dict(pairs)
        if len(found) < len(pairs):
            raise FormatError(f"{self.path} names a tensor twice in its header. Save it again.")
        return found

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of tensor ``name`` in a fresh 1-D CPU tensor."""
        info = self.infos[name]
        out = torch.empty(stop - start, dtype=info.dtype)
        self.read_into(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Fill a contiguous 1-D CPU tensor of the stored dtype with the elements from ``start`` on."""
        if out.numel():
            view = memoryview(out.view(torch.uint8).numpy().data)
            self._read_into(view, self._offsets[name] + start * out.dtype.itemsize)

    def _bytes(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def _read_into(self, view: memoryview, offset: int) -> None:
        while view:
            got = self._read_some(view, offset)
            if got <= 0:
                raise FormatError(f"{self.path} ends before its header says. It changed while it was in use.")
            view, offset = view[got:], offset + got

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock:  # no positional reads on this platform: the file position is shared by all threads
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Release the file descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()
