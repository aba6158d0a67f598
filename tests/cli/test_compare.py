from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

from mergeready.cli.compare_many import estimate
from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts import Base, open_expert
from mergeready.metrics.compare import compare_vectors
from tests.cli.test_cli import here, run, succeed, world
from tests.models import perturb, tiny_bert
from tests.ranks import run_ranks

__all__ = ["here", "world"]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crowd")
    tiny_bert().save_pretrained(root / "base")
    for seed in range(1, 19):
        perturb(tiny_bert(), seed, 0.02).save_pretrained(root / f"e{seed}")
    return root


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


def test_estimates_say_how_exact_they_are(here: Path) -> None:
    text = succeed("compare", "base", "law", "adapter", "--estimate")
    assert "standard errors at most 0 (cosine)" in text  # a tiny model is sampled whole


def test_a_crowd_is_summed_up(crowd: Path, tmp_path: Path) -> None:
    experts = [crowd / f"e{i}" for i in range(1, 19)]
    text = succeed(
        "compare", crowd / "base", *experts, "--estimate", "-o", tmp_path / "x.parquet",
        "--partners-of", experts[4], "-k", "3",
    )  # fmt: skip
    assert "18 experts are similar to no other" in text
    assert "Pairs that oppose each other most" in text
    assert "Partners for e5" in text
    assert (
        len([line for line in text[text.index("Partners for") :].splitlines() if line.startswith("│")]) == 3
    )
    assert parquet.read_table(tmp_path / "x.parquet").num_rows == 18 * 17 / 2


def on_a_rank(crowd: Path) -> list[list[float]]:
    return estimate(
        str(crowd / "base"), [str(crowd / f"e{i}") for i in range(1, 6)], strict=True
    ).cosine.tolist()


@pytest.mark.slow
def test_ranks_take_fingerprints_in_turn(crowd: Path) -> None:
    alone = on_a_rank(crowd)
    assert run_ranks(on_a_rank, 2, crowd) == [alone, alone]


def test_wrong_requests(here: Path, tmp_path: Path) -> None:
    assert isinstance(run("compare", "base", "law", "adapter", "--partners-of", "x").exception, OptionError)
    assert isinstance(
        run("compare", "base", "law", "adapter", "-o", tmp_path / "x.xls").exception, OptionError
    )
    done = run("compare", "base", "law", "adapter", "--nearest", "-o", tmp_path / "x.png")
    assert isinstance(done.exception, UnsupportedError)


def test_nearest(crowd: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    experts = [crowd / f"e{i}" for i in range(1, 5)]
    text = succeed("compare", crowd / "base", *experts, "--nearest", "-k", "2", "-o", tmp_path / "x.parquet")
    assert "Nearest experts" in text
    assert parquet.read_table(tmp_path / "x.parquet").num_rows == 8
