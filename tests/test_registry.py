from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from mergeready.errors import OptionError
from mergeready.registry import Registry


@dataclass(frozen=True)
class Square:
    name: ClassVar[str] = "square"
    side: float
    colours: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    name: ClassVar[str] = "point"


@pytest.fixture
def shapes() -> Registry[Any]:
    registry: Registry[Any] = Registry("a shape", "parameter")
    registry.add(Square)
    registry.add(Point)
    return registry


def test_classes_are_found_by_name(shapes: Registry[Any]) -> None:
    assert shapes.names() == ["point", "square"]
    assert shapes.of("square") is Square
    assert shapes.make("square", {"side": 2.0}) == Square(2.0)
    assert shapes.make("point", {}) == Point()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("circle", {}, "there is no shape 'circle'; known are point, square"),
        ("square", {"size": 1, "side": 1}, "square has no parameter size; it has side, colours"),
        ("point", {"x": 1}, "point has no parameter x; it has none"),
        ("square", {}, "square needs `side`"),
    ],
)
def test_what_is_wrong_is_named(
    shapes: Registry[Any], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        shapes.make(name, settings)


def test_a_name_is_given_once(shapes: Registry[Any]) -> None:
    with pytest.raises(OptionError, match="a shape named 'point' exists already"):
        shapes.add(Point)
