from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mergeready.errors import BaseMismatchError, UnsupportedError, listing
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
            UnsupportedError: If its weights are 8-bit floats.
        """
        if isinstance(base, Base):
            return base
        if isinstance(base, str | Path):
            folder = resolve_folder(base, revision=revision)
            source = open_weights(folder, allow_pickle=allow_pickle)
            source.label = str(base)
            require_wide_floats(source)
            return cls(source, BaseIdentity.of(source), folder if folder.is_dir() else None, str(base))
        source = open_weights(base)
        require_wide_floats(source)
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


def require_wide_floats(source: WeightSource) -> None:
    """Raise if weights are 8-bit floats.

    Raises:
        UnsupportedError: If some are; all are listed.
    """
    narrow = [
        n for n, info in source.infos.items() if info.dtype.is_floating_point and info.dtype.itemsize == 1
    ]
    if narrow:
        raise UnsupportedError(
            f"{source.label} stores 8-bit floats: {listing(narrow)}. Their scales are tensors of their own, so adding "
            "to these numbers is not adding to the weights. Use the weights before quantisation."
        )
