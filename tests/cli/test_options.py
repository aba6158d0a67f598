from __future__ import annotations

import pytest
import torch

from mergeready.cli.options import parse_bytes, parse_dtype, parse_numbers, parse_parameter
from mergeready.errors import OptionError


class TestParameters:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("x=3", 3),
            ("x=-3", -3),
            ("x=0.5", 0.5),
            ("x=1e-3", 0.001),
            ("x=true", True),
            ("x=False", False),
            ("x=sum", "sum"),
            ("x=a=b", "a=b"),
            ("x=", ""),
        ],
    )
    def test_values_have_the_type_they_look_like(self, text: str, value: object) -> None:
        name, found = parse_parameter(text)
        assert name == "x"
        assert found == value
        assert type(found) is type(value)

    def test_numbers(self) -> None:
        assert parse_numbers("1,0.5,-2") == [1.0, 0.5, -2.0]
        assert parse_numbers(None) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2k", 2000), ("2 KiB", 2048), ("0.5MB", 500_000), (" 3gb ", 3 * 10**9), ("1TiB", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "0", "0.0kB", "5iB", "1 000", "1XB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="is not a size such as 500MB"):
        parse_bytes(text)


def test_dtypes() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype(None) is None
    assert parse_bytes(None) is None
    with pytest.raises(OptionError, match="must be one of float32, bfloat16, float16, not float64"):
        parse_dtype("float64")
