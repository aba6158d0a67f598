"""Blocked matrix products against one pair at a time, whose estimates are checked against exact figures elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import BaseMismatchError, MismatchError, OptionError
from mergeready.experts import Base
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.all_pairs import compare_all, compare_fingerprints
from mergeready.metrics.estimates import estimate_cosine, estimate_sign_conflict
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.weights.ranks import Ranks
from tests.metrics.test_estimates import base, prints, vectors
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def opened() -> Base:
    return base()


@pytest.fixture(scope="module")
def found(opened: Base) -> list[Fingerprint]:
    made = [v for trial, mix in ((0, 0.3), (1, 0.6), (2, 0.9)) for v in vectors(opened, trial, mix)]
    del made[2]._deltas["a0"], made[2].infos["a0"]  # type: ignore[attr-defined]  # it leaves a parameter alone
    half = made[3]._deltas["b0"].value  # and one half of another
    half[: len(half) // 2] = 0
    return prints(opened, made, 3000)


def require_the_pairs(table: object, found: list[Fingerprint]) -> None:
    for i, a in enumerate(found):
        for j, b in enumerate(found):
            cosine, sign = estimate_cosine(a, b), estimate_sign_conflict(a, b)
            if i == j:
                cosine, sign = type(cosine)(1.0, 0.0), type(sign)(0.0, 0.0)
            assert table.cosine[i][j] == pytest.approx(cosine.value, abs=1e-5)
            assert table.sign_conflict[i][j] == pytest.approx(sign.value, abs=1e-5)
            assert table.cosine_error[i][j] == pytest.approx(cosine.error, abs=1e-5, rel=1e-3)
            assert table.sign_error[i][j] == pytest.approx(sign.error, abs=1e-5, rel=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_blocks_are_the_pairs(found: list[Fingerprint], rows: int) -> None:
    table = compare_fingerprints(found, rows=rows)
    require_the_pairs(table, found)
    assert table.norms == pytest.approx([f.norm for f in found])
    assert table.labels == [f.label for f in found]


def test_long_parameters_are_taken_piece_by_piece(
    found: list[Fingerprint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergeready.metrics.all_pairs._COLUMNS", 100)
    require_the_pairs(compare_fingerprints(found), found)


def test_files_say_the_same(found: list[Fingerprint], opened: Base, tmp_path: Path) -> None:
    paths = [f.save(tmp_path / f"{i}.fingerprint.safetensors") for i, f in enumerate(found)]
    expected = compare_all(found, errors=False)
    for base_too in (None, opened):
        read = compare_all(paths, base=base_too, errors=False)
        assert np.array_equal(read.cosine, expected.cosine)
        assert np.array_equal(read.sign_conflict, expected.sign_conflict)
        assert (read.cosine_error, read.sign_error) == (None, None)


def test_different_budgets_compare_what_all_hold(opened: Base) -> None:
    made = vectors(opened, 0, 0.5)
    for first, second in ((500, 5000), (500, 10**9), (40_000, 10**9)):
        [a, _], [_, b] = prints(opened, made, first), prints(opened, made, second)
        [_, same] = prints(opened, made, first)
        assert np.array_equal(compare_all([a, b]).cosine, compare_all([a, same]).cosine)


def test_nothing_in_common(opened: Base) -> None:
    one, two = vectors(opened, 0, 0.5)
    for vector, kept in ((one, "a0"), (two, "b0")):
        for name in set(vector.infos) - {kept}:
            del vector._deltas[name], vector.infos[name]  # type: ignore[attr-defined]
    found = compare_fingerprints([take_fingerprint(one, opened), take_fingerprint(two, opened)])
    assert found.cosine[0][1] == 0.0
    assert math.isnan(found.sign_conflict[0][1])
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["sign_conflict"][0] == [0.0, None]


@given(st.integers(2, 9), st.integers(1, 10), st.permutations(range(6)))
def test_neither_order_nor_blocks_matter(count: int, rows: int, order: list[int]) -> None:
    opened = base()
    made = [v for trial in range(3) for v in vectors(opened, trial, 0.4)]
    found = prints(opened, made, 300)
    chosen = [i for i in order if i < count]
    whole, part = compare_all(found), compare_all([found[i] for i in chosen], rows=rows)
    places = np.ix_(chosen, chosen)
    np.testing.assert_allclose(part.cosine, whole.cosine[places], atol=2e-6)
    np.testing.assert_allclose(part.sign_conflict, whole.sign_conflict[places], atol=2e-6)


def test_what_cannot_be_compared_is_refused(opened: Base, found: list[Fingerprint]) -> None:
    other = base(seed=9)
    [stranger, _] = prints(other, vectors(other, 0, 0.3), 3000)
    with pytest.raises(BaseMismatchError, match="another base"):
        compare_all([found[0], stranger])
    with pytest.raises(BaseMismatchError, match="another base"):
        compare_all([stranger, stranger], base=opened)
    with pytest.raises(OptionError, match="two"):
        compare_all(found[:1])
    with pytest.raises(OptionError, match="rows"):
        compare_all(found, rows=0)
    lying = {**found[1].shapes, "a0": (150, 121)}
    odd = Fingerprint(
        "odd", found[1].base, lying, found[1].norms, found[1].samples, {}, found[1].total, found[1].budget
    )
    with pytest.raises(MismatchError, match="disagree on the size of a0"):
        compare_all([found[0], odd])


def on_a_rank(paths: list[Path]) -> tuple[list[list[float]], list[list[float]]]:
    table = compare_all(paths, rows=2, ranks=Ranks.world()).as_lists()
    return table.cosine, table.sign_conflict


@pytest.mark.slow
def test_ranks_share_the_work(found: list[Fingerprint], tmp_path: Path) -> None:
    paths = [f.save(tmp_path / f"{i}.fingerprint.safetensors") for i, f in enumerate(found)]
    alone = compare_all(paths, rows=2).as_lists()
    for cosine, sign_conflict in run_ranks(on_a_rank, 2, paths):
        assert cosine == alone.cosine
        assert sign_conflict == alone.sign_conflict
