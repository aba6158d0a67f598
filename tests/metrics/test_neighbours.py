from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from mergeready.errors import OptionError, UnsupportedError
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.all_pairs import compare_all
from mergeready.metrics.neighbours import Neighbours, _sketch, nearest_experts, write_neighbours
from mergeready.metrics.sampled_block import Layout, SampledBlock, open_sampled
from tests.metrics.test_estimates import base, prints, vectors


@pytest.fixture(scope="module")
def found() -> list[Fingerprint]:
    """Experts in pairs: those of one trial have half of their change in common."""
    opened = base()
    return prints(opened, [v for trial in range(6) for v in vectors(opened, trial, 0.6)], 3000)


def test_the_nearest_is_the_other_of_its_pair(found: list[Fingerprint]) -> None:
    pytest.importorskip("faiss")
    near = nearest_experts(found, 2)
    assert near.nearest[:, 0].tolist() == [i ^ 1 for i in range(12)]
    exact = compare_all(found)
    rows = np.arange(12)
    assert near.cosine[:, 0] == pytest.approx(exact.cosine[rows, near.nearest[:, 0]], abs=4 * near.error)
    assert near.error == 1 / 64


def test_experts_that_are_one_have_other_neighbours_too(found: list[Fingerprint]) -> None:
    """A hundred copies of each are a hundred nearest neighbours of each other, and links of the graph go no further."""
    pytest.importorskip("faiss")
    copies = [one for one in found[::4] for _ in range(100)]
    near = nearest_experts(copies, 150)
    assert near.nearest.min() >= 0
    for i, row in enumerate(near.nearest.tolist()):
        assert len({i, *row}) == 151
        assert {j for j in range(300) if j // 100 == i // 100} <= {i, *row}
    assert (np.diff(near.cosine, axis=1) < 1e-5).all()


def test_projections_keep_inner_products(found: list[Fingerprint]) -> None:
    experts = open_sampled(found)
    layout = Layout.of(experts)
    sketch = _sketch(SampledBlock(experts, layout), layout, 4096).numpy()
    again = _sketch(SampledBlock(experts[3:5], layout), layout, 4096).numpy()
    assert np.array_equal(again, sketch[3:5])  # whatever block an expert is in
    difference = sketch @ sketch.T - compare_all(found).cosine
    assert 0.2 / 64 < difference.std() < 1.5 / 64
    assert np.abs(difference).max() < 5 / 64


def test_without_faiss(found: list[Fingerprint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UnsupportedError, match=r"mergeready\[faiss\]"):
        nearest_experts(found, 2)


@pytest.mark.parametrize("count", [0, 12])
def test_how_many_there_are(found: list[Fingerprint], monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setitem(sys.modules, "faiss", sys)
    with pytest.raises(OptionError, match="1 to 11"):
        nearest_experts(found, count)


def test_the_table(tmp_path: Path) -> None:
    near = Neighbours(["a", "b"], np.array([[1], [0]]), np.array([[0.5], [0.25]], dtype=np.float32), 0.1)
    rows = parquet.read_table(write_neighbours(tmp_path / "x.parquet", near)).to_pylist()
    assert rows == [
        {"expert": "a", "rank": 1, "neighbour": "b", "cosine": 0.5},
        {"expert": "b", "rank": 1, "neighbour": "a", "cosine": 0.25},
    ]
