from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mergeready.errors import BaseMismatchError, UnsupportedError, listing
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.peft_config import unquantised
from mergeready.weights.names import match_names
from mergeready.weights.open import WeightsLike, open_weights, resolve_folder
from mergeready.weights.source import TensorInfo, WeightSource, equal

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_GENERATES = re.compile(
    r"LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|MTModel|(?<!Electra)(?<!Funnel)ForPreTraining"
)
"""Architectures that score tokens; Electra and Funnel are pretrained to tell which tokens were replaced."""


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

    @property
    def tied(self) -> frozenset[str]:
        """Parameters that the model uses in two places, as far as that can be told: embeddings that are also head."""
        return frozenset(self.source.aliases.values()) | self._tied_by_config()

    def _tied_by_config(self) -> frozenset[str]:
        """The embeddings of a language model's folder that holds no head."""
        if self.folder is None:
            return frozenset()
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return frozenset()
        if not isinstance(config, dict):
            return frozenset()
        vocabulary = (config.get("text_config") or config).get("vocab_size")
        infos = self.source.infos.items()
        sized = [name for name, info in infos if len(info.shape) == 2 and info.rows == vocabulary]
        generates = any(_GENERATES.search(name) for name in config.get("architectures") or ())
        return frozenset(sized if generates and len(sized) == 1 else ())

    def require_name(self, declared: str | None, what: str) -> None:
        """Raise if an expert declares a hub id that is not the hub id this base was opened by.

        Local paths differ from machine to machine and say nothing, so only two ids are compared. That one of them
        names a quantised copy is no difference here; an expert's notes say so.

        Raises:
            BaseMismatchError: If the ids differ.
        """
        if declared is None or self.name is None or Path(self.name).exists() or Path(declared).exists():
            return
        differ = unquantised(declared) != unquantised(self.name)
        if _HUB_ID.fullmatch(declared) and _HUB_ID.fullmatch(self.name) and differ:
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


def require_unquantised(expert: WeightSource, base: WeightSource) -> None:
    """Raise if a full model or its base stores weights as integers that are not the same ones in both.

    Only floats are merged, so quantised layers would stay the base's while their scales and everything else move on.

    Raises:
        UnsupportedError: If so; all are listed.
    """
    own, theirs = _not_shared(expert, base, _packed)
    if own or theirs:
        raise UnsupportedError(
            f"{expert.label if own else base.label} stores weights as integers: {listing(sorted(own or theirs))}. "
            "Their scales are tensors of their own, so they cannot be merged. Use the weights before quantisation."
        )


def require_real(expert: WeightSource, base: WeightSource) -> None:
    """Raise if a full model has complex weights other than its base's: they would stay the base's.

    Raises:
        UnsupportedError: If so; all are listed.
    """
    own, theirs = _not_shared(expert, base, lambda name, info: info.dtype.is_complex)
    if own or theirs:
        raise UnsupportedError(
            f"{expert.label if own else base.label} has complex weights: {listing(sorted(own or theirs))}. Only real "
            "ones are merged: store them as pairs of real numbers (torch.view_as_real), in base and experts alike."
        )


def _not_shared(
    expert: WeightSource, base: WeightSource, chosen: Callable[[str, TensorInfo], bool]
) -> tuple[set[str], set[str]]:
    """The chosen tensors of an expert and of its base that are not the same in both."""
    own, theirs = ({n for n, info in source.infos.items() if chosen(n, info)} for source in (expert, base))
    if not own and not theirs:
        return own, theirs
    names = match_names(
        expert.infos,
        base.infos,
        aliases=expert.other_names,
        base_aliases=base.other_names,
    ).to_base
    same = {
        mine: name
        for mine, name in names.items()
        if (mine in own or name in theirs)
        and expert.infos[mine].dtype == base.infos[name].dtype
        and equal(expert, mine, base, name)
    }
    return own.difference(same), theirs.difference(same.values())


def _packed(name: str, info: TensorInfo) -> bool:
    """Whether a tensor looks like quantised weights: indices are 64 bits long, and masks are called bias."""
    integer = not (info.dtype.is_floating_point or info.dtype.is_complex)
    wide = info.dtype in (torch.bool, torch.int64, torch.uint64)
    return integer and not wide and len(info.shape) > 1 and name.rpartition(".")[2] != "bias"
