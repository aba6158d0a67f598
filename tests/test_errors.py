from __future__ import annotations

import inspect

import pytest

from mergeready import errors
from mergeready.errors import MergeReadyError, listing


def test_every_error_of_ours_has_one_root_and_says_what_it_is() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    assert len(kinds) > 10
    assert all(issubclass(kind, MergeReadyError) and kind.__doc__ for kind in kinds)


@pytest.mark.parametrize(
    ("kind", "builtin"), [(errors.OptionError, ValueError), (errors.OutputExistsError, FileExistsError)]
)
def test_those_who_expect_pythons_own_kind_catch_ours(
    kind: type[Exception], builtin: type[Exception]
) -> None:
    with pytest.raises(builtin, match=r"^as it is$"):
        raise kind("as it is")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, and 1 more"), (9, "0, 1, 2, and 6 more")],
)
def test_listing(count: int, text: str) -> None:
    assert listing((str(number) for number in range(count)), limit=3) == text
