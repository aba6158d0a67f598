from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mergeready.errors import BaseMismatchError
from mergeready.experts.identity import BaseIdentity
from mergeready.weights.open import WeightsLike, open_weights, resolve_folder
from mergeready.weights.source import WeightSource

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """The pretrained weights that experts started from: where to read them, and what tells them apart.

    Attributes:
        source: Reads the weights.
        identity: Taken when the base was opened.
        folder: The local folder with config and tokenizer, if the base is one.
        name: The hub id or path that it was opened by, if any.
    """

    source: WeightSource
    identity: BaseIdentity
    folder: Path | None = None
    name: str | None = None

    @classmethod
    def open(
        cls, base: WeightsLike | Base, *, revision: str | None = None, allow_pickle: bool = False
    ) -> Base:
        """Open a base: a folder, a hub id, a state dict, a live module or an open source.

        Raises:
            FormatError: If there is nothing to read.
        """
        if isinstance(base, Base):
            return base
        if isinstance(base, str | Path):
            folder = resolve_folder(base, revision=revision)
            source = open_weights(folder, allow_pickle=allow_pickle)
            source.label = str(base)
            return cls(source, BaseIdentity.of(source), folder if folder.is_dir() else None, str(base))
        source = open_weights(base)
        return cls(source, BaseIdentity.of(source))

    def require_name(self, declared: str | None, what: str) -> None:
        """Raise if an expert declares a hub id that is not the hub id this base was opened by.

        Local paths differ from machine to machine and say nothing, so only two ids are compared.

        Raises:
            BaseMismatchError: If the ids differ.
        """
        if declared is None or self.name is None or Path(self.name).exists() or Path(declared).exists():
            return
        if _HUB_ID.fullmatch(declared) and _HUB_ID.fullmatch(self.name) and declared != self.name:
            raise BaseMismatchError(f"{what} says that its base is {declared}, not {self.name}.")
