"""What a technique needs to know of tasks, and a file cannot hold: factors, inputs, functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergeready.errors import OptionError, listing
from mergeready.study.suite import StudySuite

PREFIX = "suite:"

Techniques = Sequence[str | Mapping[str, Mapping[str, Any]]]


def with_given(techniques: Techniques, suite: StudySuite, task: str) -> list[Any]:
    """Techniques with their settings, in which ``suite:NAME`` is replaced with what the suite gives for a task.

    A list of this one string is replaced as well, so that settings which must be lists can be checked before.

    Raises:
        OptionError: If the suite does not give it; every such name is listed.

    Example:
        >>> suite = StudySuite(model=lambda: None, tasks={}, given={"factors": lambda task: [f"not {task}"]})
        >>> with_given([{"kronecker_penalty": {"factors": ["suite:factors"], "strength": 1}}], suite, "law")
        [{'kronecker_penalty': {'factors': ['not law'], 'strength': 1}}]
    """
    wanted = {name for given in techniques for value in _values(given) if (name := _name(value)) is not None}
    if unknown := sorted(wanted - set(suite.given)):
        has = f"it gives {listing(suite.given)}" if suite.given else "it gives nothing"
        raise OptionError(f"`techniques` ask the suite for {listing(unknown)}; {has}.")
    made = {name: suite.given[name](task) for name in sorted(wanted)}

    def settled(value: Any) -> Any:
        name = _name(value)
        return value if name is None else made[name]

    return [
        given
        if isinstance(given, str)
        else {key: {name: settled(value) for name, value in own.items()} for key, own in given.items()}
        for given in techniques
    ]


def _values(given: str | Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    if not isinstance(given, str):
        for settings in given.values():
            yield from settings.values()


def _name(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.removeprefix(PREFIX) if isinstance(value, str) and value.startswith(PREFIX) else None
