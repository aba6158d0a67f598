from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from mergeready.metrics.all_pairs import AllPairs
from mergeready.metrics.pairs_table import write_pairs


def random_pairs(count: int, *, errors: bool = True) -> AllPairs:
    rng = np.random.default_rng(0)
    cosine, sign = (rng.uniform(-1, 1, (count, count)).astype(np.float32) for _ in range(2))
    sign[0, 1] = np.nan
    more = (cosine / 100, sign / 100) if errors else (None, None)
    return AllPairs([f"e{i}" for i in range(count)], rng.uniform(1, 9, count), cosine, sign, *more)


@pytest.mark.parametrize("rows_of_a_group", [1, 8, 10**6])
def test_every_pair_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_of_a_group: int) -> None:
    monkeypatch.setattr("mergeready.metrics.pairs_table._ROWS_OF_A_GROUP", rows_of_a_group)
    pairs = random_pairs(5)
    rows = parquet.read_table(write_pairs(tmp_path / "x.parquet", pairs, [1, 1, 2, 2, 2])).to_pylist()
    assert [(r["a"], r["b"]) for r in rows] == [(f"e{i}", f"e{j}") for i in range(5) for j in range(i + 1, 5)]
    for row in rows:
        i, j = int(row["a"][1]), int(row["b"][1])
        assert row["cosine"] == pairs.cosine[i, j]
        assert row["cosine_error"] == pairs.cosine_error[i, j]
        assert row["norm_ratio"] == pytest.approx(max(pairs.norms[[i, j]]) / min(pairs.norms[[i, j]]))
        assert row["same_group"] == ((i < 2) == (j < 2))
    assert rows[0]["sign_conflict"] is None
    assert rows[0]["sign_error"] is None
    assert rows[1]["sign_conflict"] == pairs.sign_conflict[0, 2]


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    rows = parquet.read_table(write_pairs(tmp_path / "x.parquet", random_pairs(3, errors=False))).to_pylist()
    assert {(r["cosine_error"], r["sign_error"], r["same_group"]) for r in rows} == {(None, None, None)}
