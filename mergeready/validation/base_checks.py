"""Whether an expert belongs to its base and fits it."""

from __future__ import annotations

import re
from pathlib import Path

from mergeready.errors import BaseMismatchError, MergeReadyError, MismatchError, UnsupportedError, listing
from mergeready.experts.peft_config import quantised_note, unquantised
from mergeready.experts.record import recorded_base
from mergeready.metrics.groups import group_of
from mergeready.validation.card_checks import card_fields
from mergeready.validation.check import Limits, NotCheckedError, Result, check, failed, passed
from mergeready.validation.subject import Subject

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@check(
    "B101",
    "base",
    "error",
    "it names the base it is validated against",
    fix="Write the base's hub id into the configuration, or name the base that it was trained from.",
)
def base_name(subject: Subject, limits: Limits) -> Result:
    """Compares hub ids; local paths say nothing. Of a quantised copy of the base, B106 tells."""
    base = subject.base
    declared = declared_base(subject)
    if declared is None:
        raise NotCheckedError("it names no base")
    if base.name is None or Path(base.name).exists() or not _HUB_ID.fullmatch(declared):
        raise NotCheckedError(f"it names {declared}; only two hub ids can be compared")
    if unquantised(declared) != unquantised(base.name):
        return failed(f"it names {declared}, not {base.name}", where=(declared,))
    return passed(f"both are {unquantised(declared)}")


@check(
    "B107",
    "file",
    "warning",
    "the revision of its base is pinned",
    fix="Set `revision` in adapter_config.json to the commit of the base, so that a later upload cannot change it.",
)
def base_revision(subject: Subject, limits: Limits) -> Result:
    """A base may be uploaded again under its id; mergeready's own record pins its content instead."""
    if recorded_base(subject.folder) is not None:
        return passed("mergeready.json records the base's content")
    fields = subject.adapter_fields
    if fields is None:
        raise NotCheckedError("full models have no field for it")
    revision = fields.get("revision")
    if not revision:
        return failed("`revision` is empty")
    if not (isinstance(revision, str) and _COMMIT.fullmatch(revision)):
        return failed(f"`revision` is {revision}, which is no commit: branches and tags move")
    return passed(f"revision {revision}")


@check(
    "B102",
    "base",
    "error",
    "it was trained from this very base",
    fix="Name the base that it was trained from; the same model in another dtype or a re-upload is another base.",
)
def base_content(subject: Subject, limits: Limits) -> Result:
    """Exact where the expert records its base; for full models else by the weights' cosine with it."""
    base = subject.base
    try:
        recorded = recorded_base(subject.folder)
        if recorded is not None:
            base.identity.require_same(recorded, subject.label)
            return passed("its record of the base's content is equal")
        expert = subject.expert
    except BaseMismatchError as error:
        return failed(str(error))
    if expert.base_checked == "nothing":
        raise NotCheckedError(
            "an adapter that does not record its base: its factors fit any base of these shapes"
        )
    return passed("its weights are nearly parallel to the base's, as fine-tuning leaves them")


@check(
    "B103",
    "base",
    "error",
    "every parameter that it changes is in the base, with that shape",
    fix="Name the base that it was trained from, or save it again with the base's parameter names.",
)
def targets_exist(subject: Subject, limits: Limits) -> Result:
    """Own parameters beyond the base, such as a head of its own, are reported but do not fail."""
    try:
        expert = subject.expert
    except MismatchError as error:
        if isinstance(error, BaseMismatchError):
            raise NotCheckedError("B102 failed") from error
        return failed(str(error))
    beyond = f"; beyond the base: {listing(expert.extra)}" if expert.extra else ""
    missing = f"; counted as unchanged: {listing(expert.missing)}" if expert.missing else ""
    return passed(f"{len(expert.vector)} parameters{beyond}{missing}")


@check(
    "B105",
    "base",
    "error",
    "tied embeddings and quantised weights are changed in no way that merging would lose",
    fix="Untie the base's embeddings first, or leave them out of the adapter.",
)
def placement(subject: Subject, limits: Limits) -> Result:
    """Where a base ties its embeddings, a change through one of the two places has no single weight."""
    try:
        expert = subject.expert
    except UnsupportedError as error:
        return failed(str(error))
    except MergeReadyError as error:
        raise NotCheckedError("B102 or B103 failed") from error
    changed = [name for name in expert.vector if group_of(name) == "embedding"]
    if not changed:
        return passed("embeddings are not changed")
    if subject.adapter_kind is None:  # a full model stores them, changed or not
        return passed(f"embeddings are in the base's places: {listing(changed)}")
    return passed(f"embeddings are changed: {listing(changed)}")


@check(
    "B106",
    "base",
    "warning",
    "it was trained on the weights that it will be merged into",
    fix="Evaluate it on the full-precision base before sharing: what it learned fits the quantised weights.",
)
def not_quantised(subject: Subject, limits: Limits) -> Result:
    """An adapter of a quantised model was fitted to rounded weights."""
    _ = subject.expert  # without a base there is nothing it could be merged into
    config = subject.adapter_config
    notes = quantised_note(None if config is None else config.base_name)
    if notes:
        return failed(listing(notes), where=tuple(notes))
    return passed("no sign of training on quantised weights")


def declared_base(subject: Subject) -> str | None:
    """What the expert calls its base: in its adapter's configuration, else in its card."""
    config = subject.adapter_config
    if config is not None and config.base_name:
        return config.base_name
    named = card_fields(subject.card).get("base_model")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else None
