from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts import Base, open_expert
from mergeready.metrics.compare import compare_vectors
from tests.cli.commands import run, succeed


def test_every_output_of_an_exact_comparison(here: Path, tmp_path: Path) -> None:
    names = ("law", "code[bold]", "adapter")
    outputs = [tmp_path / f"x{ending}" for ending in (".png", ".html", ".parquet")]
    text = succeed("compare", "base", *names, *(part for path in outputs for part in ("-o", path)))
    assert "Norm ratio" in text
    assert "Estimated" not in text
    base = Base.open("base")
    exact = compare_vectors([open_expert(name, base).vector for name in names], base.source)
    rows = parquet.read_table(outputs[2]).to_pylist()
    assert [row["cosine"] for row in rows] == pytest.approx(
        [exact.cosine[0][1], exact.cosine[0][2], exact.cosine[1][2]]
    )
    assert rows[0]["cosine_error"] is None
    assert "3 experts, pair by pair" in outputs[1].read_text()
    with Image.open(outputs[0]) as image:
        assert image.size[0] > 300


def test_an_expert_that_equals_its_base_has_pairs_that_are_not_known(here: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"x{ending}" for ending in (".png", ".html", ".parquet")]
    succeed("compare", "base", "law", "adapter", "base", *(part for path in outputs for part in ("-o", path)))
    rows = {(row["a"], row["b"]): row for row in parquet.read_table(outputs[2]).to_pylist()}
    assert rows["law", "adapter"]["norm_ratio"] >= 1
    for name in ("law", "adapter"):
        row = rows[name, "base"]
        assert (row["cosine"], row["norm_ratio"], row["same_group"]) == (None, None, False)


def test_estimates_say_how_exact_they_are(here: Path) -> None:
    text = succeed("compare", "base", "law", "adapter", "--estimate")
    assert "standard errors at most 0 (cosine)" in text  # a tiny model is sampled whole


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--partners-of", "x"], OptionError, "must be one of the experts as given, law, adapter, not x"),
        (
            ["-o", "a.xls", "-o", "b.png", "-o", "c"],
            OptionError,
            "a.xls, c must end with .html, .parquet, .png",
        ),
        (["--nearest", "-o", "x.png"], UnsupportedError, "only be written as .parquet, not x.png"),
        (["--nearest", "--subspaces"], OptionError, "--subspaces cannot be had with it"),
        (
            ["--nearest", "--estimate", "--partners-of", "law"],
            OptionError,
            "--partners-of, --estimate cannot",
        ),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_opened(
    arguments: list[str], error: type[Exception], message: str
) -> None:
    done = run("compare", "no base", "law", "adapter", *arguments)
    assert isinstance(done.exception, error)
    assert message in str(done.exception)


def test_a_page_of_too_many_experts_is_refused_at_once(tmp_path: Path) -> None:
    done = run("compare", "no base", *(f"e{i}" for i in range(201)), "-o", tmp_path / "x.html")
    assert isinstance(done.exception, OptionError)
    assert "up to 200 experts, not 201" in str(done.exception)
