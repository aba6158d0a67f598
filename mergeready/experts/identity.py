from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergeready.errors import BaseMismatchError, listing
from mergeready.weights.names import match_names
from mergeready.weights.source import TensorInfo, WeightSource, is_mergeable

_BLOCKS, _BLOCK_LENGTH = 8, 16


@dataclass(frozen=True)
class BaseIdentity:
    """What tells one base from another of equal shapes: a digest per tensor, and one over all.

    A tensor's digest covers its shape, its dtype and the exact bits of 8 blocks of 16 values spread evenly
    over it, so that making an identity costs milliseconds and reads almost nothing, while another
    initialisation, another release or another rounding of the same weights all differ.

    Attributes:
        digests: Tensor name to 16 hex digits.
        label: Where it was taken from; for messages, never compared.
    """

    digests: Mapping[str, str]
    label: str = field(default="", compare=False)

    @classmethod
    def of(cls, source: WeightSource) -> BaseIdentity:
        """Take the identity of a base."""
        return cls(
            {
                name: _digest(source, name, info)
                for name, info in source.infos.items()
                if is_mergeable(name, info)
            },
            source.label,
        )

    @property
    def fingerprint(self) -> str:
        """64 hex digits over all tensors, whatever their order."""
        lines = "\n".join(f"{name} {digest}" for name, digest in sorted(self.digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def require_same(self, other: BaseIdentity, what: str, names: Iterable[str] | None = None) -> None:
        """Raise unless both are the same base, as far as both know it.

        Args:
            other: The base that ``what`` was made for.
            what: The expert or run being checked, for the message.
            names: Base names that matter (default: all that both know).

        Raises:
            BaseMismatchError: If a tensor differs, or the two have no tensor in common.
        """
        pairs = match_names(other.digests, self.digests).to_base
        wanted = set(self.digests if names is None else names)
        compared = {base: own for own, base in pairs.items() if base in wanted}
        if not compared:
            raise BaseMismatchError(
                f"{what} was made for {other.label or 'a base'}, which shares no tensor name with {self.label}."
            )
        differing = sorted(b for b, own in compared.items() if self.digests[b] != other.digests[own])
        if differing:
            raise BaseMismatchError(
                f"{what} was made for another base than {self.label}: {len(differing)} of {len(compared)} "
                f"tensors differ ({listing(differing, 4)}). Use the base it was trained from"
                f"{f' ({other.label})' if other.label else ''}; the same model in another dtype is another base."
            )

    def to_json(self) -> dict[str, object]:
        """A JSON-ready form, without the label, which may be a local path."""
        return {"fingerprint": self.fingerprint, "digests": dict(self.digests)}

    @classmethod
    def from_json(cls, content: object, label: str = "") -> BaseIdentity:
        """The inverse of :meth:`to_json`.

        Raises:
            BaseMismatchError: If the content does not describe an identity, or was altered.
        """
        if not isinstance(content, Mapping) or not isinstance(content.get("digests"), Mapping):
            raise BaseMismatchError(f"{label or 'the record'} holds no base identity.")
        identity = cls({str(name): str(digest) for name, digest in content["digests"].items()}, label)
        if identity.fingerprint != content.get("fingerprint"):
            raise BaseMismatchError(f"the base identity in {label or 'the record'} contradicts itself.")
        return identity


def _digest(source: WeightSource, name: str, info: TensorInfo) -> str:
    digest = hashlib.sha256(f"{info.shape} {info.dtype}".encode())
    for block in sampled(source, name):
        digest.update(block.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sampled(source: WeightSource, name: str) -> list[Tensor]:
    """The blocks of a tensor that stand for it: 1-D, in the stored dtype, on the CPU; a small tensor whole."""
    numel = source.infos[name].numel
    if numel <= _BLOCKS * _BLOCK_LENGTH:
        return [source.read_flat(name, 0, numel).cpu()]
    return [source.read_flat(name, start, start + _BLOCK_LENGTH).cpu() for start in sample_starts(numel)]


def sample_starts(numel: int) -> list[int]:
    """Where the sampled blocks of a tensor begin.

    >>> sample_starts(20), sample_starts(1000)[:3]
    ([0, 16], [0, 140, 281])
    """
    if numel <= _BLOCKS * _BLOCK_LENGTH:
        return list(range(0, numel, _BLOCK_LENGTH))
    last = numel - _BLOCK_LENGTH
    return [last * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
