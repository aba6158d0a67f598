"""A live task vector at single places: what can be read at every step of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mergeready.errors import UnsupportedError, listing
from mergeready.experts.adapter import AdapterTaskVector
from mergeready.experts.delta import LowRank
from mergeready.experts.live import LiveExpert


class LiveSample:
    """Chosen elements of a live task vector, read without the rest of it.

    Of a model that is trained whole, the base's values there are read once. Of a LoRA adapter, elements of the product
    are computed from its factors; trained copies of whole modules are read whole. Of the ranks that hold an element the
    first one reads it, so that sums over ranks put the sample together. All ranks make one together.

    Args:
        live: The model in training.
        places: The elements of each parameter, in row-major order, int64; see ``coordinates``.

    Raises:
        UnsupportedError: If an adapter changes parameters in a way that cannot be read at single places.

    Attributes:
        size: Elements in all.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> base = {name: 0.5 * p for name, p in model.state_dict().items()}
        >>> sample = LiveSample(LiveExpert(model, base), {"weight": torch.tensor([5, 0])})
        >>> sample.read() * 2 == model.weight.flatten()[[5, 0]]
        tensor([True, True])
    """

    def __init__(self, live: LiveExpert, places: Mapping[str, Tensor]) -> None:
        self._live, self._places = live, dict(places)
        self.size = sum(map(len, places.values()))
        self._first: dict[str, int] = {}
        end = 0
        for name, wanted in self._places.items():
            self._first[name], end = end, end + len(wanted)
        self._picks: list[Callable[[], Tensor]] = []
        self._base: Tensor | None = None
        own: list[Tensor] = []  # where in the sample each pick goes
        if isinstance(live.vector, AdapterTaskVector):
            _require_factors(live.vector)
            for name, wanted in self._places.items():
                # All ranks gather factors; the first one computes with them.
                mine = wanted if live.ranks.is_first else wanted[:0]
                own.append(torch.arange(len(mine)) + self._first[name])
                self._picks.append(_Change(live, name, mine))
        else:
            for name, (inside, block) in self._shares().items():
                own.append(inside.nonzero().flatten() + self._first[name])
                self._picks.append(partial(live.pick, name, block.to(live.targets[name].device)))
        self._own = torch.cat([torch.zeros(0, dtype=torch.long), *own])
        self._is_whole = len(self._own) == self.size  # and in order, then
        if not isinstance(live.vector, AdapterTaskVector):
            base = live.base.source
            self._base = self.of(lambda name, start, stop: base.read_flat(name, start, stop).float())[
                self._own
            ].float()

    @torch.no_grad()
    def read(self) -> Tensor:
        """The values of this moment, float64 on the CPU, the whole sample on every rank; waits for a device once."""
        found = torch.zeros(self.size, dtype=torch.float64)
        with self._live.readable():
            values = [pick() for pick in self._picks]
        if values:
            picked = torch.cat(values).cpu()
            change = picked if self._base is None else picked - self._base
            found = change.double() if self._is_whole else found.index_copy_(0, self._own, change.double())
        self._live.ranks.add([found])
        return found

    def of(self, read: Callable[[str, int, int], Tensor]) -> Tensor:
        """The same elements of something that is read piece by piece, as :meth:`read` gives them.

        Args:
            read: Gives elements of a parameter, by name, first and end. Each rank reads its share.
        """
        found = torch.zeros(self.size, dtype=torch.float64)
        ordered = {name: torch.sort(places) for name, places in self._places.items()}
        with self._live.readable(), self._live.ranks.together():
            for name, start, stop in self._live.pieces():
                if name not in ordered:
                    continue
                wanted, order = ordered[name]
                first, last = torch.searchsorted(wanted, torch.tensor([start, stop])).tolist()
                if first < last:
                    values = read(name, start, stop)
                    picked = values[(wanted[first:last] - start).to(values.device)]
                    found[self._first[name] + order[first:last]] = picked.cpu().double()
        self._live.ranks.add([found])
        return found

    def _shares(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Which elements of each parameter this rank reads, as a mask, and their numbers in the block that it holds."""
        live = self._live
        before = live.ranks.each(live.blocks)[: live.ranks.rank]
        shares = {}
        for name, places in self._places.items():
            inside, block = live.blocks[name].places(places)
            taken = torch.zeros_like(inside)
            for blocks in before:
                taken |= blocks[name].places(places)[0]
            shares[name] = inside & ~taken, block[~taken[inside]]
        return {name: share for name, share in shares.items() if len(share[1])}


class _Change:
    """Reads elements of an adapter's change of one parameter."""

    def __init__(self, live: LiveExpert, name: str, places: Tensor) -> None:
        self._live, self._name, self._places = live, name, places

    def __call__(self) -> Tensor:
        with self._live.gathered(self._name):
            delta = self._live.vector[self._name]
        if isinstance(delta, LowRank):
            self._places = self._places.to(delta.A.device)
            return delta.pick(self._places)
        values = delta.value.reshape(-1)
        self._places = self._places.to(values.device)
        return values[self._places].float()


def _require_factors(vector: AdapterTaskVector) -> None:
    odd = [name for name, slot in vector.slots.items() if slot.dora or slot.kind in ("rows", "experts")]
    if odd:
        raise UnsupportedError(
            "`sampled_every` reads plain LoRA and whole copies; not DoRA, stacks of experts and token rows, whose "
            f"change cannot be computed at single places: {listing(odd, 4)}. Leave it out; `measure` works."
        )
