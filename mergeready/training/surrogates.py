from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import Dense
from mergeready.experts.task_vector import TaskVector
from mergeready.merging.random_mask import random_mask
from mergeready.merging.scale_search import check_scales


@dataclass(frozen=True, kw_only=True)
class Surrogates:
    """What stands in for peers while there are none. Everything measured with them is labelled a surrogate.

    Attributes:
        count: Number of synthetic peers.
        alone_scales: Scales at which the expert is also evaluated without any peer, as if averaged with nothing.
        seed: Seed of the synthetic peers.
    """

    count: int = 3
    alone_scales: Sequence[float] = (0.3,)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise OptionError(f"`count` must be at least 1, not {self.count}.")
        if self.alone_scales:
            check_scales(self.alone_scales)


class SyntheticPeer(TaskVector):
    """A peer made from the expert itself: each delta's entries shifted cyclically, with random signs.

    Keeps norm and magnitude distribution of every parameter exactly, so that trimming and averaging behave as
    with a real expert of equal training, while its direction is unrelated: what it adds is pure interference.
    """

    def __init__(self, expert: TaskVector, index: int, seed: int) -> None:
        self.label, self.base, self.infos = f"surrogate {index + 1}", expert.base, expert.infos
        self._expert, self._slot, self._seed = expert, index, seed

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        numel = self.infos[name].numel
        begin = (start + self._shift(name, numel)) % numel
        first = self._expert.flat(name, begin, min(begin + stop - start, numel))
        if len(first) < stop - start:
            first = torch.cat([first, self._expert.flat(name, 0, stop - start - len(first))])
        signs = random_mask(0.5, seed=self._seed, slot=self._slot, name=name, start=start, stop=stop)
        return first.mul_(signs.to(first.device, torch.float32).mul_(2).sub_(1))

    def __getitem__(self, name: str) -> Dense:
        info = self.infos[name]
        return Dense(self.flat(name, 0, info.numel).reshape(info.shape))

    def _shift(self, name: str, numel: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}/{self._slot}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % numel


def synthetic_peers(expert: TaskVector, surrogates: Surrogates) -> list[TaskVector]:
    """The synthetic peers of an expert at this moment."""
    return [SyntheticPeer(expert, index, surrogates.seed) for index in range(surrogates.count)]
