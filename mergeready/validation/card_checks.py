"""What an expert says about itself to people: its card, licence and provenance, and what it should not say."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mergeready.errors import FormatError, MergeReadyError, listing
from mergeready.experts.record import read_record
from mergeready.validation.check import Limits, NotCheckedError, Result, check, failed, passed
from mergeready.validation.public import PRIVATE
from mergeready.validation.subject import Subject
from mergeready.weights.model_card import split_card
from mergeready.weights.safetensors_file import SafetensorsFile

_FIELDS = ("base_model", "license")
_TEXTS = ("*.json", "*.md", "*.yaml", "*.yml", "*.txt")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LISTS = re.compile(r"tokenizer\.json|(vocab|merges).*|.*\.index\.json")
"""Files that list tokens or tensors: long, and nothing that a person wrote."""
_LARGEST_TEXT = 2_000_000


@check(
    "F007",
    "file",
    "warning",
    "no local path, access token or e-mail address is in its files",
    fix="Replace local paths by hub ids and delete the rest; a token that was shared must be revoked.",
)
def nothing_private(subject: Subject, limits: Limits) -> Result:
    """Looks through small text files and safetensors' metadata. Says where and what kind, never the text itself."""
    found: set[str] = set()
    unread = []
    for place, text in _texts(subject):
        if text is None:
            unread.append(place)
        else:
            found |= {f"{kind} in {place}" for kind, rule in PRIVATE.items() if rule.search(text)}
    if found:
        return failed(listing(sorted(found)), where=tuple(sorted(found)), value=len(found))
    if unread:
        raise NotCheckedError(f"nothing found, but {listing(unread)} could not be looked through")
    return passed("nothing found")


@check(
    "P501",
    "file",
    "warning",
    "its model card names base and licence",
    fix="Write README.md with `base_model:` and `license:` at its top; `mergeready validate --card` adds the rest.",
)
def names_base_and_licence(subject: Subject, limits: Limits) -> Result:
    """The hub links experts to bases by these fields."""
    if "\N{REPLACEMENT CHARACTER}" in subject.card:
        return failed("README.md is not UTF-8")
    fields = card_fields(subject.card)
    if not fields:
        return failed(_why_no_fields(subject.card))
    missing = [name for name in _FIELDS if not fields.get(name)]
    if missing:
        return failed(f"{listing(missing)} missing in README.md", where=tuple(missing))
    # Also since a few aliases can stand for billions of values as soon as these are written out.
    odd = [name for name in _FIELDS if not _is_text(fields[name])]
    if odd:
        return failed(f"{listing(odd)} in README.md must be a name or names", where=tuple(odd))
    bases = fields["base_model"]
    if not all(_HUB_NAME.fullmatch(name) for name in ([bases] if isinstance(bases, str) else bases)):
        return failed(
            "base_model in README.md is no hub id, such as a path of this machine", where=("base_model",)
        )
    return passed(f"base_model {fields['base_model']}, license {fields['license']}")


@check(
    "P503",
    "file",
    "info",
    "how it was made is recorded",
    fix="Train with a mergeready callback: it writes mergeready.json beside every pick.",
)
def provenance(subject: Subject, limits: Limits) -> Result:
    """``mergeready.json`` beside the weights says which base an expert is relative to."""
    try:
        record = read_record(subject.folder)
    except MergeReadyError as error:
        return failed(str(error))
    if record is None:
        return failed("no mergeready.json")
    return passed(f"mergeready.json, schema {record.get('schema')}")


@functools.lru_cache(
    maxsize=8
)  # scores of many tasks make cards whose metadata takes longer to read than weights
def card_fields(text: str) -> Mapping[str, Any]:
    """The metadata of a model card; empty where there is none that can be read."""
    try:
        return split_card(text)[0]
    except FormatError:
        return {}


def _why_no_fields(text: str) -> str:
    try:
        split_card(text)
    except FormatError as error:
        return str(error)
    return "README.md has no metadata at its top"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _texts(subject: Subject) -> Iterator[tuple[str, str | None]]:
    """Names of what people may read, with the text; None for one that is too large or damaged."""
    for pattern in _TEXTS:
        for path in sorted(subject.folder.rglob(pattern)):
            if path.is_file() and not _LISTS.fullmatch(path.name):
                small = path.stat().st_size <= _LARGEST_TEXT
                text = path.read_text(encoding="utf-8", errors="replace") if small else None
                yield path.relative_to(subject.folder).as_posix(), text
    for path in sorted(subject.folder.glob("*.safetensors")):
        try:
            metadata = SafetensorsFile(path).metadata
        except MergeReadyError:
            yield path.name, None
        else:
            yield from ((f"{path.name} ({key})", value) for key, value in metadata.items())
