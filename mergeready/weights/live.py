from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from mergeready.errors import UnsupportedError
from mergeready.weights.shards import held, is_sharded, local, whole
from mergeready.weights.source import TensorInfo, WeightSource


class LiveSource(WeightSource):
    """Tensors that live in a model; each read sees the values of that moment.

    Of a sharded tensor (DTensor) a rank can read what it holds; all of it inside ``gathered``, or through ``whole``.

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

    def whole(self) -> WeightSource:
        """The same tensors, gathered one at a time as they are read.

        Where they are sharded, all ranks have to read the same tensors in the same order.
        """
        return _Whole(self) if self.is_sharded else self


class _Whole(WeightSource):
    def __init__(self, source: LiveSource) -> None:
        self.label, self._source = source.label, source
        self._last: tuple[str, Tensor] | None = None

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._source.infos

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._source.aliases

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if self._last is None or self._last[0] != name:
            with self._source.gathered([name]):
                self._last = name, self._source.read(name)
        return self._last[1].reshape(-1)[start:stop]
