from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mergeready.errors import FormatError, listing
from mergeready.weights.source import TensorInfo, WeightSource


class StateDictSource(WeightSource):
    """A mapping of names to tensors. Tensors that share all their memory count as tied: one name lists them, all read.

    Raises:
        FormatError: If something in it is no tensor; all are listed.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str = "state dict") -> None:
        strange = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
        if strange:
            raise FormatError(f"{label} is no state dict: {listing(strange)} are no tensors.")
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        seen: dict[tuple[object, ...], str] = {}
        for name, tensor in tensors.items():
            value = tensor.detach()
            key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if value.numel() and value.device.type != "meta" and key in seen:
                self._aliases[name] = seen[key]
            else:
                seen[key] = name
                self._tensors[name] = value
        self._infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).reshape(-1)[start:stop]

    def read(self, name: str) -> Tensor:
        return self._tensors[self._aliases.get(name, name)]
