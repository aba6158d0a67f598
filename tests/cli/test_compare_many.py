from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import parquet

from mergeready.cli.compare_many import estimate
from tests.cli.commands import succeed
from tests.models import perturb, tiny_bert
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crowd")
    tiny_bert().save_pretrained(root / "base")
    for seed in range(1, 19):
        perturb(tiny_bert(), seed, 0.02).save_pretrained(root / f"e{seed}")
    return root


def test_a_crowd_is_summed_up(crowd: Path, tmp_path: Path) -> None:
    experts = [crowd / f"e{i}" for i in range(1, 19)]
    text = succeed(
        "compare", crowd / "base", *experts, "--estimate", "-o", tmp_path / "x.parquet",
        "--partners-of", experts[4], "-k", "3",
    )  # fmt: skip
    assert "18 experts are similar to no other" in text
    assert "Estimated from fingerprints, standard errors at most" in text
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


def test_nearest(crowd: Path, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    experts = [crowd / f"e{i}" for i in range(1, 5)]
    text = succeed("compare", crowd / "base", *experts, "--nearest", "-k", "2", "-o", tmp_path / "x.parquet")
    assert "Nearest experts" in text
    assert parquet.read_table(tmp_path / "x.parquet").num_rows == 8
