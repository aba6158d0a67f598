from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NameMatch:
    """How names of one source correspond to names of the base.

    ``to_base`` maps own names to base names; ``extra`` are own names that the base lacks; ``missing`` are
    base names that nothing maps to.
    """

    to_base: Mapping[str, str]
    extra: tuple[str, ...]
    missing: tuple[str, ...]


def match_names(
    names: Iterable[str],
    base_names: Iterable[str],
    *,
    aliases: Mapping[str, str] | None = None,
    base_aliases: Mapping[str, str] | None = None,
) -> NameMatch:
    """Pair names with base names, allowing for one model prefix on either side.

    ``BertForSequenceClassification`` calls a weight ``bert.encoder.…`` that ``BertModel`` calls
    ``encoder.…``; loaders in the wild accept both. The prefix that pairs most names wins. Tensors with several
    names, as tied ones have, are paired under any of them.

    >>> match = match_names(["bert.x.weight", "bert.y.weight", "head.weight"], ["x.weight", "y.weight"])
    >>> match.to_base["bert.x.weight"], match.extra
    ('x.weight', ('head.weight',))
    """
    own, base = list(names), list(base_names)
    known = set(base) | set(base_aliases or {})
    strip, add = _best_prefix([*own, *(aliases or {})], known)
    other_names: dict[str, list[str]] = {}
    for alias, canonical in (aliases or {}).items():
        other_names.setdefault(canonical, []).append(alias)
    to_base: dict[str, str] = {}
    for name in own:
        for candidate in (name, *other_names.get(name, ())):
            renamed = add + candidate.removeprefix(strip)
            if renamed in known:
                to_base[name] = (base_aliases or {}).get(renamed, renamed)
                break
    taken = set(to_base.values())
    extra = tuple(name for name in own if name not in to_base)
    return NameMatch(to_base, extra, tuple(name for name in base if name not in taken))


def _best_prefix(own: list[str], known: set[str]) -> tuple[str, str]:
    strip_candidates = {"", *(_first(name) for name in own)}
    add_candidates = {"", *(_first(name) for name in known)}
    options = [(strip, "") for strip in strip_candidates] + [("", add) for add in add_candidates]
    # Ties go to the shortest change, so that equal name sets are never renamed.
    return max(
        options,
        key=lambda o: (sum(o[1] + n.removeprefix(o[0]) in known for n in own), -len(o[0]) - len(o[1]), o),
    )


def _first(name: str) -> str:
    head, dot, _ = name.partition(".")
    return head + dot if dot else ""
