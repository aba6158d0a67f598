"""What data say about experts, by parameter: importances, products of inputs. Merge methods read it piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard, cast, get_args

from torch import Tensor

from mergeready.errors import FormatError, MismatchError, OptionError, listing
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.open import WeightsLike, open_weights
from mergeready.weights.safetensors_folder import SafetensorsFolder
from mergeready.weights.source import WeightSource
from mergeready.weights.state_dict import StateDictSource
from mergeready.weights.writer import write_tensors

Kind: TypeAlias = Literal["fisher", "input_grams"]
_METADATA_KEY = "mergeready"


class Collected(StateDictSource):
    """What data say about one expert: tensors by base parameter name, with what they are and where they come from.

    Attributes:
        kind: ``fisher`` or ``input_grams``.
        base: Identity of the base that the expert started from; None if nobody said.
        facts: How it was collected, JSON-ready.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        kind: Kind,
        base: BaseIdentity | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tensors, label=kind)
        self.kind, self.base, self.facts = kind, base, dict(facts or {})

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, complete or not at all; merge methods take its path.

        Raises:
            OSError: If it cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "kind": self.kind,
            "base": None if self.base is None else self.base.to_json(),
            "facts": self.facts,
        }
        tensors = {name: self.read(name).cpu().contiguous() for name in self.infos}
        tensors |= {alias: tensors[name].clone() for alias, name in self.aliases.items()}
        write_tensors(path, tensors, {_METADATA_KEY: json.dumps(record)})
        return path


InformationLike: TypeAlias = "Information | str | Path | Sequence[WeightsLike | Mapping[str, str]]"
"""One source an expert: paths (a string may hold several, separated by commas), dicts of tensors, ``Collected``, or
what :meth:`Information.describe` returns."""


class Information:
    """What data say about each expert, one source an expert, in the order in which the experts are merged.

    Sources are opened, not read. Equal if their contents are, as far as :class:`BaseIdentity` samples them.

    Args:
        sources: One an expert.
        kind: What the sources must hold, where they say it.

    Raises:
        FormatError: If a source cannot be read, or is not what a description says it was.
        OptionError: If a source holds something else.
    """

    def __init__(self, sources: Sequence[WeightsLike | Mapping[str, str]], kind: Kind) -> None:
        if not sources:
            raise OptionError(f"`{kind}` is empty: one source an expert is needed.")
        self.kind = kind
        self.sources: list[WeightSource] = [_open(source) for source in sources]
        self._bases: list[BaseIdentity | None] = [_recorded(source, kind) for source in self.sources]
        self.fingerprints = tuple(BaseIdentity.of(source).fingerprint for source in self.sources)
        for given, found in zip(sources, self.fingerprints, strict=True):
            if _is_description(given) and given["fingerprint"] != found:
                raise FormatError(f"{given['path']} is not the file that this merge was made with.")

    @classmethod
    def open(cls, given: InformationLike, kind: Kind) -> Information:
        """Open whatever stands for information; what is open already stays as it is."""
        if isinstance(given, Information):
            return given
        if isinstance(given, str):
            return cls([path.strip() for path in given.split(",") if path.strip()], kind)
        return cls([given] if isinstance(given, Path) else given, kind)

    def __len__(self) -> int:
        return len(self.sources)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Information) and self.fingerprints == other.fingerprints

    def __hash__(self) -> int:
        return hash(self.fingerprints)

    def describe(self) -> list[dict[str, str]]:
        """Path and fingerprint of each source, JSON-ready; the path is empty for what is in memory."""
        paths = [str(source.path) if isinstance(source, SafetensorsFolder) else "" for source in self.sources]
        return [
            {"path": path, "fingerprint": fingerprint}
            for path, fingerprint in zip(paths, self.fingerprints, strict=True)
        ]

    def shape(self, slot: int, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor about an expert; None if there is none."""
        source = self.sources[slot]
        info = source.infos.get(source.aliases.get(name, name))
        return None if info is None else info.shape

    def read(self, slot: int, name: str) -> Tensor:
        """A whole tensor about an expert; do not write to it."""
        source = self.sources[slot]
        return source.read(source.aliases.get(name, name))

    def read_flat(self, slot: int, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor about an expert; do not write to it."""
        source = self.sources[slot]
        return source.read_flat(source.aliases.get(name, name), start, stop)

    def require_fit(self, vectors: Sequence[TaskVector]) -> None:
        """Raise unless there is one source an expert, made on the experts' base.

        Raises:
            OptionError: If their numbers differ.
            BaseMismatchError: If a source was collected from an expert of another base.
        """
        if len(vectors) != len(self):
            raise OptionError(
                f"`{self.kind}` has {len(self)} sources for {len(vectors)} experts: one an expert, in their order."
            )
        for vector, source, base in zip(vectors, self.sources, self._bases, strict=True):
            if base is not None:
                vector.base.require_same(base, source.label, vector)

    def require_shapes(
        self, vectors: Sequence[TaskVector], wanted: Iterable[tuple[str, str, tuple[int, ...]]]
    ) -> None:
        """Raise unless every source holds what is needed about the parameters that its expert changes.

        Args:
            vectors: The experts.
            wanted: Parameter, tensor's name, tensor's shape.

        Raises:
            MismatchError: If one is missing or has another shape; all are listed at once.
        """
        problems: list[str] = []
        for parameter, name, shape in wanted:
            for slot, vector in enumerate(vectors):
                found, label = self.shape(slot, name), self.sources[slot].label
                if found is not None and found != shape:
                    problems.append(f"{name} in {label} is {found}, it must be {shape}")
                elif found is None and parameter in vector:
                    problems.append(f"{label}, for {vector.label}, lacks {name}")
        if problems:
            raise MismatchError(
                f"`{self.kind}` does not fit the experts: {listing(problems)}. Collect it from the expert itself, "
                "with `base=` so that its names are the base's."
            )


def require_shares(method: str, weights: Sequence[float]) -> None:
    """Check weights that only set proportions.

    Raises:
        OptionError: If one is negative, or none is positive.
    """
    if min(weights) < 0 or max(weights) <= 0:
        raise OptionError(
            f"{method} is a mean, so its weights are shares: none may be negative and one must be positive, "
            f"not {list(weights)}."
        )


def _is_description(given: object) -> TypeGuard[Mapping[str, str]]:
    return isinstance(given, Mapping) and all(isinstance(value, str) for value in given.values())


def _open(given: WeightsLike | Mapping[str, str]) -> WeightSource:
    if _is_description(given):
        path = given.get("path", "")
        if not path or "fingerprint" not in given:
            raise OptionError(
                "the information about an expert was in memory when this merge was described; save it to a file, "
                "and name the file."
            )
        return open_weights(path)
    return open_weights(cast("WeightsLike", given))


def _recorded(source: WeightSource, kind: Kind) -> BaseIdentity | None:
    """The base that a source says it belongs to; checks what it says it holds."""
    if isinstance(source, Collected):
        found, base = str(source.kind), source.base
    elif isinstance(source, SafetensorsFolder) and _METADATA_KEY in source.metadata:
        found, base = _read_record(source)
    else:
        return None
    if found != kind:
        raise OptionError(f"{source.label} holds {found}, where {kind} is needed.")
    return base


def _read_record(source: SafetensorsFolder) -> tuple[str, BaseIdentity | None]:
    try:
        record = json.loads(source.metadata[_METADATA_KEY])
        kind, base = record["kind"], record["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{source.label} has a record that cannot be read ({error}). Collect it again."
        ) from error
    if kind not in get_args(Kind):
        raise FormatError(f"{source.label} holds {kind!r}, which this version does not know.")
    return kind, None if base is None else BaseIdentity.from_json(base, source.label)
