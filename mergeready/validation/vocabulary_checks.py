"""Whether an expert and its base mean the same tokens by the same rows."""

from __future__ import annotations

from mergeready.errors import (
    FormatError,
    MismatchError,
    NonFiniteError,
    NotTrainedError,
    UnsupportedError,
    listing,
)
from mergeready.experts.vocabulary import Vocabulary
from mergeready.metrics.groups import group_of, layer_of
from mergeready.validation.check import Limits, NotCheckedError, Result, check, failed, passed
from mergeready.validation.subject import Subject


@check(
    "B104",
    "base",
    "error",
    "its tokenizer gives tokens the rows that they have in the base",
    fix="Share the base's tokenizer; tokens of its own belong into the base's tokenizer and embeddings first.",
)
def same_tokens(subject: Subject, limits: Limits) -> Result:
    """Compares token to id maps, never sizes alone. Weights that hold embeddings can be put in order, others cannot."""
    base = subject.base
    try:
        own = Vocabulary.read(subject.folder)
    except FormatError as error:
        return failed(str(error))
    theirs = None if base.folder is None else Vocabulary.read(base.folder)
    if own is None or theirs is None:
        raise NotCheckedError(f"{'it' if own is None else 'the base'} has no tokenizer that can be read")
    moved = [t for t, index in theirs.ids.items() if own.ids.get(t, index) != index]
    absent = [token for token in theirs.ids if token not in own.ids]
    added = [token for token in own.ids if token not in theirs.ids]
    try:
        kept, moved = dict(subject.expert.added_tokens), []  # it opens: rows were paired by token
    except (MismatchError, UnsupportedError, NotTrainedError, NonFiniteError):
        kept = {}
    lost = [token for token in added if token not in kept]
    problems = [
        f"{text} {listing(map(repr, tokens), 6)}"
        for text, tokens in (
            ("other ids for", moved),
            ("lacks", absent),
            ("the base has no rows for", lost),
        )
        if tokens
    ]
    if problems:
        return failed("; ".join(problems), where=(*moved, *absent, *lost), value=len(moved) + len(absent))
    return passed(f"{len(own.ids)} tokens, {len(added)} of its own in padding rows")


@check(
    "B108",
    "base",
    "warning",
    "its layers hold the base's parameters, no fewer and no others",
    fix="Save the whole model under the base's names; missing ones count as unchanged, extra ones are not merged.",
)
def whole_layers(subject: Subject, limits: Limits) -> Result:
    """Heads come and go with tasks and are not looked at; parameters of layers and embeddings should not."""
    try:
        expert = subject.expert
    except MismatchError as error:
        raise NotCheckedError("B102 or B103 failed") from error
    tied = bool(subject.base.tied)
    extra = [n for n in expert.extra if layer_of(n) is not None or (tied and group_of(n) == "embedding")]
    missing = [n for n in expert.missing if layer_of(n) is not None or group_of(n) == "embedding"]
    if extra or missing:
        found = [f"lacks {listing(missing)}"] * bool(missing) + [
            f"has beyond the base {listing(extra)}"
        ] * bool(extra)
        return failed("; ".join(found), where=(*missing, *extra), value=len(missing) + len(extra))
    return passed("nothing is missing or extra in its layers")
