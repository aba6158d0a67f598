"""What declared licences say about each other. A table of known pairs, and nothing about others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergeready.errors import listing
from mergeready.experts.fingerprint import Fingerprint, is_fingerprint
from mergeready.experts.open import Expert, ExpertLike
from mergeready.validation.card_checks import card_fields
from mergeready.validation.check import Limits, NotCheckedError, Result, check, failed, passed
from mergeready.validation.subject import Subject
from mergeready.weights.open import resolve_folder

_FREE = re.compile(r"mit|apache-2\.0|bsd(-\w+)*|isc|unlicense|cc0-1\.0|zlib|0bsd|ecl-2\.0")
_COPYLEFT = re.compile(r"a?gpl(-\d(\.\d)?)?")
_SHARE_ALIKE = re.compile(r"cc-by-(nc-)?sa-\d\.\d")
_NON_COMMERCIAL = re.compile(r"cc-by-nc(-\w+)*-\d\.\d")
_COMMUNITY = re.compile(r"llama\d?(\.\d)?|llama-\d(\.\d)?|gemma")
_NO_DERIVATIVES = re.compile(r"cc-by-(nc-)?nd-\d\.\d")


@check(
    "P502",
    "base",
    "warning",
    "its licence is not known to contradict the base's or a peer's",
    fix="Ask the authors, or declare the base's licence; terms of a base usually hold for what is made from it.",
)
def licences(subject: Subject, limits: Limits) -> Result:
    """Compares what cards declare. A pair that is not in the table is unknown, and unknown is not passed."""
    own = _declared(subject.folder)
    if own is None:
        raise NotCheckedError("its card declares no licence that is known by name, or several")
    base = subject.base.folder
    theirs = None if base is None else _declared(base)
    peers = [found for peer in subject.given_peers if (found := _peer_licence(peer)) is not None]
    if theirs is None and not peers:
        raise NotCheckedError(f"it declares {own}; neither base nor peers declare one")
    pairs = [(own, theirs, "the base")] if theirs is not None else []
    conflicts = [
        f"{own} contradicts {other} of {whose}" for _, other, whose in pairs if _derived(own, other) is False
    ]
    conflicts += [
        f"{own} and {other} of a peer cannot both be kept"
        for other in peers
        if _together(own, other) is False
    ]
    if conflicts:
        return failed(listing(conflicts), where=tuple(conflicts), value=len(conflicts))
    unknown = list(_unknown(own, theirs, peers))
    if unknown:
        raise NotCheckedError(f"unknown pairs of licences: {listing(unknown)}")
    return passed(f"{own}; {listing(sorted({other for other in (theirs, *peers) if other}))}")


def _unknown(own: str, theirs: str | None, peers: list[str]) -> Iterator[str]:
    if theirs is not None and _derived(own, theirs) is None:
        yield f"{own} on a base of {theirs}"
    yield from (f"{own} with {other}" for other in sorted(set(peers)) if _together(own, other) is None)


def _derived(own: str, base: str) -> bool | None:
    """Whether what is made from a base may be given that licence; None where the table does not say."""
    if _NO_DERIVATIVES.fullmatch(base):
        return False
    if own == base or _FREE.fullmatch(base):
        return True
    bound = (_COPYLEFT, _SHARE_ALIKE, _NON_COMMERCIAL, _COMMUNITY)
    if _FREE.fullmatch(own) and any(rule.fullmatch(base) for rule in bound):
        return False
    return None


def _together(one: str, other: str) -> bool | None:
    """Whether a merge can keep both licences; None where the table does not say."""
    if _NO_DERIVATIVES.fullmatch(one) or _NO_DERIVATIVES.fullmatch(other):
        return False  # what is merged from it is derived from it
    if one == other or _FREE.fullmatch(one) or _FREE.fullmatch(other):
        return True
    for first, second in ((one, other), (other, one)):
        if _COPYLEFT.fullmatch(first) and (_NON_COMMERCIAL.fullmatch(second) or _COMMUNITY.fullmatch(second)):
            return False
    return None


def _declared(folder: Path) -> str | None:
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    value: Any = card_fields(text).get("license")
    return value.lower() if isinstance(value, str) and value != "other" else None


def _peer_licence(peer: ExpertLike | Fingerprint) -> str | None:
    if isinstance(peer, Expert):
        return None if peer.folder is None else _declared(peer.folder)
    if not isinstance(peer, str | Path) or is_fingerprint(peer):
        return None
    return _declared(resolve_folder(peer))
