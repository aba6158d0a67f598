from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from mergeready.errors import UnsupportedError
from mergeready.weights.shards import held, is_sharded, local, whole
from mergeready.weights.source import TensorInfo, WeightSource


class LiveSource(WeightSource):
    """Tensors that live in a model; each read sees the values of that moment.

    Of a sharded tensor (DTensor) a rank can read what it holds; all of it inside ``gathered`` and ``gathering``.

    Args:
        tensors: Names to tensors. One that occurs under several names is tied, and listed under the first.
        label: How messages call the source.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in tensors.items():
            canonical = first.setdefault(id(tensor), name)
            if canonical == name:
                self._tensors[name] = tensor
            else:
                self._aliases[name] = canonical
        self._infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self._held = {name: held(t) for name, t in self._tensors.items() if is_sharded(t)}
        self._gathered: dict[str, Tensor] = {}
        self._gathering = False
        self._last: tuple[str, Tensor] | None = None

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    @property
    def is_sharded(self) -> bool:
        """Whether any of the tensors is."""
        return bool(self._held)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._gathered:
            return self._gathered[name].reshape(-1)[start:stop]
        if name not in self._held:
            return self._tensors[name].detach().reshape(-1)[start:stop]
        if self._gathering:
            return self._gather(name).reshape(-1)[start:stop]
        span = self._held[name].span
        if span is None or not span[0] <= start <= stop <= span[1]:
            raise UnsupportedError(
                f"elements {start} to {stop} of {name} lie on other ranks, and cannot be read alone. Where a live base "
                "is sharded, pass `base`: its folder or hub id."
            )
        return local(self._tensors[name]).reshape(-1)[start - span[0] : stop - span[0]]

    @contextmanager
    def gathered(self, names: Iterable[str]) -> Iterator[None]:
        """Hold tensors whole on every rank inside the block. A collective of all ranks where they are sharded."""
        before = self._gathered
        added = {name: whole(self._tensors[name]) for name in names if name in self._held}
        self._gathered = before | added
        try:
            yield
        finally:
            self._gathered = before

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside the block every tensor can be read; each is gathered as it is read, and kept until the next one.

        Where they are sharded, all ranks have to read the same tensors in the same order.
        """
        self._gathering, before = True, self._gathering
        try:
            yield
        finally:
            self._gathering, self._last = before, None

    def _gather(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = name, whole(self._tensors[name])
        return self._last[1]
