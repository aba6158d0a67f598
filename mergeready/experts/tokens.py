"""Rows of embeddings belong to tokens, not to ids: an expert's are paired with the base's by the token's text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mergeready.errors import MismatchError, listing
from mergeready.experts.base import Base
from mergeready.experts.vocabulary import Vocabulary
from mergeready.weights.json_file import read_json_object
from mergeready.weights.names import match_names
from mergeready.weights.source import TensorInfo, WeightSource

_TOKEN_PARAMETER = re.compile(
    r"(embed_tokens|word_embeddings|tok_embeddings|\bwte\b|\bshared\b|lm_head|embed_out|predictions\.(decoder|bias))"
)
_TRAINED_ROWS = ".token_adapter."
_FACTOR = re.compile(r"\.lora_|\.loras\.|\.m$")


@dataclass(frozen=True)
class TokenRows:
    """An expert's weights with rows in the base's order, and what is known of its own tokens.

    Attributes:
        source: The weights.
        added: Tokens that the base does not know, with the base's padding rows that they took.
        lost: Tokens of the expert whose rows the base has no place for; they stay out.
        notes: What was done.
    """

    source: WeightSource
    added: Mapping[str, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def refuse_lost(self, label: str) -> None:
        """Raise if trained rows of added tokens would be left out.

        Raises:
            MismatchError: If so.
        """
        if self.lost:
            raise MismatchError(
                f"{label} adds tokens that the base has no rows for: {listing(self.lost, 6)}. Add them to the base's "
                "tokenizer, resize its embeddings, save it, and merge on that base (rows are paired by token, so ids "
                "may differ); or pass strict=False: they stay out of the merge."
            )


def token_rows(
    source: WeightSource,
    base: Base,
    folder: Path | None,
    plain: Callable[[str], str] = lambda name: name,
) -> TokenRows:
    """See an expert's weights with the rows of embeddings and head in the base's order.

    Nothing changes where tokens have the same ids. Fewer rows than the base has are no difference where the others
    are padding, and padding rows beyond the base's are dropped.

    Args:
        source: The expert's weights.
        base: The base.
        folder: Where the expert's tokenizer lies.
        plain: A parameter's name without what its format puts around it.

    Raises:
        MismatchError: If tokens have other ids, but the weights hold no embeddings that could be put in order, or an
            adapter's changes of them that cannot be.
    """
    own = None if folder is None or base.folder is None else Vocabulary.read(folder)
    theirs = None if own is None or base.folder is None else Vocabulary.read(base.folder)
    if theirs is None or own is None:
        return TokenRows(source)
    names = {plain(name): name for name in source.infos}
    pairs = match_names(names, base.source.infos, base_aliases=base.source.aliases).to_base
    found = {names[name]: theirs_name for name, theirs_name in pairs.items()}
    rows = _base_rows(base, theirs)
    wanted = {
        name: base_name
        for name, base_name in found.items()
        if _TOKEN_PARAMETER.search(base_name)
        and base.source.infos[base_name].rows == rows
        and source.infos[name].shape[1:] == base.source.infos[base_name].shape[1:]
    }
    moved = [token for token, index in theirs.ids.items() if own.ids.get(token, index) != index]
    if not wanted and moved:
        raise MismatchError(
            f"{source.label} comes with a tokenizer that numbers tokens otherwise than the base's "
            f"({listing(map(repr, moved), 6)}), so it reads other embeddings. Use the base it was trained from."
        )
    own_rows = source.infos[next(iter(wanted))].rows if wanted else rows
    by_id = _changes_by_id(source, wanted, own_rows)
    if not wanted and not by_id:
        return TokenRows(source, _added(own, theirs, rows))
    order = _order(own, theirs, rows, own_rows)
    if by_id and _moves(order, own):
        raise MismatchError(
            f"{source.label} comes with a tokenizer that numbers tokens otherwise than the base's, and changes "
            f"embeddings by token number: {listing(by_id)}. Merge it into the base that it was trained from (PEFT's "
            "`merge_and_unload`) and name the result, with its tokenizer: whole rows are paired by token."
        )
    if not wanted:
        return TokenRows(source, _added(own, theirs, rows))
    lost = tuple(t for t, i in own.ids.items() if t not in theirs.ids and (i >= rows or i in theirs.tokens))
    notes = []
    if moved:
        notes.append(f"{len(moved)} tokens have other ids than in the base: rows were paired by token")
    if lost:
        notes.append(f"rows of its own tokens stay out: {listing(lost, 6)}")
    if own_rows != rows or not torch.equal(order, torch.arange(rows)):
        source = RowsInOrder(source, base.source, wanted, order)
    return TokenRows(source, _added(own, theirs, rows), lost, tuple(notes))


def require_same_tokens(labels: Sequence[str], added: Sequence[Mapping[str, int]]) -> None:
    """Raise if experts gave one row to different tokens, or one token different rows.

    Args:
        labels: How messages call the experts.
        added: For each expert, tokens that the base does not know and the base's rows that they took.

    Raises:
        MismatchError: If so; all clashes are listed.
    """
    owners: dict[int, tuple[str, str]] = {}
    places: dict[str, tuple[int, str]] = {}
    clashes = []
    for label, tokens in zip(labels, added, strict=True):
        for token, row in tokens.items():
            other_token, other = owners.setdefault(row, (token, label))
            if other_token != token:
                clashes.append(f"row {row} is {other_token!r} in {other}, {token!r} in {label}")
            other_row, other = places.setdefault(token, (row, label))
            if other_row != row:
                clashes.append(f"{token!r} is row {other_row} in {other}, {row} in {label}")
    if clashes:
        raise MismatchError(
            f"experts added tokens to the same rows: {listing(clashes, 6)}. Add all their tokens to the base's "
            "tokenizer, resize its embeddings, save it, and merge on that base: rows are then paired by token."
        )


class RowsInOrder(WeightSource):
    """Weights whose token rows are seen in another order.

    Args:
        source: The weights.
        base: Where rows come from that the weights lack.
        names: Own name to base name of the parameters that have one row a token.
        order: For each row of the base, the own row, or −1 for the base's.
    """

    def __init__(
        self, source: WeightSource, base: WeightSource, names: Mapping[str, str], order: Tensor
    ) -> None:
        self.label = source.label
        self._source, self._base, self._names, self._order = source, base, names, order
        shapes = {name: base.infos[theirs].shape for name, theirs in names.items()}
        self._infos = {
            name: TensorInfo(shapes.get(name, info.shape), info.dtype) for name, info in source.infos.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._source.aliases

    @property
    def stored_names(self) -> Mapping[str, str]:
        return self._source.stored_names

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._names:
            return self._source.read_flat(name, start, stop)
        info = self._infos[name]
        width = info.numel // info.rows
        first, last = start // width, math.ceil(stop / width)
        pieces = [self._run(name, row, a, b).reshape(-1) for row, a, b in self._runs(first, last)]
        return torch.cat(pieces)[start - first * width : stop - first * width]

    def _runs(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Rows ``first`` to ``last`` as runs: own row of the first one (or −1), and the base's row range."""
        order = self._order[first:last].tolist()
        runs: list[tuple[int, int, int]] = []
        for row, own in enumerate(order, first):
            if runs:
                start, a, b = runs[-1]
                if (own == -1 == start) or (own != -1 != start and own == start + b - a):
                    runs[-1] = (start, a, b + 1)
                    continue
            runs.append((own, row, row + 1))
        return runs

    def _run(self, name: str, own: int, first: int, last: int) -> Tensor:
        if own == -1:
            dtype = self._infos[name].dtype
            return self._base.read_rows(self._names[name], first, last).to(dtype)
        return self._source.read_rows(name, own, own + last - first)


def _order(own: Vocabulary, theirs: Vocabulary, rows: int, own_rows: int) -> Tensor:
    """For each row of the base, the expert's row of the same token, or −1."""
    tokens = theirs.tokens
    taken = {index for token, index in own.ids.items() if token in theirs.ids}
    order = torch.full((rows,), -1, dtype=torch.long)
    for row in range(rows):
        # A row without a token is padding, or the place of a token that the expert added.
        index = own.ids.get(tokens[row], -1) if row in tokens else -1 if row in taken else row
        order[row] = index if index < own_rows else -1
    return order


def _changes_by_id(source: WeightSource, ordered: Mapping[str, str], own_rows: int) -> list[str]:
    """An adapter's tensors that belong to token numbers and hold no whole rows, which alone are put in order."""
    return [
        name
        for name, info in source.infos.items()
        if name not in ordered
        and _TOKEN_PARAMETER.search(name)
        and (_TRAINED_ROWS in name or (_FACTOR.search(name) and own_rows in info.shape))
    ]


def _moves(order: Tensor, own: Vocabulary) -> bool:
    """Whether some row of the base stands for another token than the expert's row of the same number."""
    tokens = own.tokens
    return any(index != row and (index != -1 or row in tokens) for row, index in enumerate(order.tolist()))


def _added(own: Vocabulary, theirs: Vocabulary, rows: int) -> dict[str, int]:
    known = theirs.tokens
    return {t: i for t, i in own.ids.items() if t not in theirs.ids and i < rows and i not in known}


def _base_rows(base: Base, vocabulary: Vocabulary) -> int:
    """Rows of the base's embeddings: what its configuration says, else those of the first parameter that fits."""
    needed = max(vocabulary.ids.values()) + 1
    path = None if base.folder is None else base.folder / "config.json"
    if path is not None and path.is_file():
        config = read_json_object(path)
        inner = config.get("text_config")
        size = (inner if isinstance(inner, dict) else config).get("vocab_size")
        if isinstance(size, int):
            return size
    fitting = (
        i.rows for n, i in base.source.infos.items() if _TOKEN_PARAMETER.search(n) and i.rows >= needed
    )
    return next(fitting, needed)
