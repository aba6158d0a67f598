"""Ranks and directions of changes with a known spectrum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeready.experts.delta import Dense, LowRank, Rows
from mergeready.validation import Verdict, validate
from mergeready.validation.spectrum_checks import half_energy, spectrum_of_delta
from tests.experts.test_svd import matrix, orthonormal
from tests.models import tiny_bert
from tests.validation.experts import write_adapter, write_base


@pytest.mark.parametrize("size", [40, 600])
def test_the_spectrum_of_a_dense_change(size: int) -> None:
    values = 0.9 ** torch.arange(size, dtype=torch.float64)
    found = spectrum_of_delta(Dense(matrix(values, size, size).float()))
    energy = values.square()
    assert found.stable_rank == pytest.approx(float(energy.sum()), rel=1e-4)
    assert found.top_energy[4] == pytest.approx(float(energy[:4].sum() / energy.sum()), rel=1e-4)


def test_the_effective_rank_is_stated_only_where_all_values_are_known() -> None:
    few = spectrum_of_delta(Dense(matrix(torch.ones(5).double(), 600, 600).float()))
    assert few.effective_rank == pytest.approx(5, rel=1e-3)
    many = spectrum_of_delta(Dense(matrix(torch.ones(600).double(), 600, 600).float()))
    assert many.effective_rank != many.effective_rank
    assert many.stable_rank == pytest.approx(600, rel=1e-3)


def test_factors_and_rows_are_measured_as_the_matrix_they_stand_for() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    B, A = orthonormal(30, 4, 0) * values, orthonormal(20, 4, 1).T
    factors = LowRank(B=B.float(), A=A.float(), shape=(30, 20))
    assert spectrum_of_delta(factors).stable_rank == pytest.approx(22 / 16, rel=1e-5)
    assert half_energy(factors) == pytest.approx(20 / 22, rel=1e-5)
    odd = LowRank(B=B[:, :3].float(), A=A[:3].float(), shape=(30, 20))
    assert half_energy(odd) == pytest.approx(20 / 21, rel=1e-5)  # two of three directions
    rows = Rows(index=torch.arange(4), value=torch.diag(values).float(), shape=(9, 4))
    assert spectrum_of_delta(rows).top_energy[1] == pytest.approx(16 / 22, rel=1e-5)


def verdict(folder: Path, base: Path, name: str) -> Verdict:
    return next(v for v in validate(folder, base, level="base").verdicts if v.id == name)


def test_an_adapter_of_rank_one_is_no_collapse(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    found = verdict(write_adapter(tmp_path / "law", r=1), base, "D202")
    assert found.status == "passed"
    assert "rank 1 only" in found.message


def test_an_adapter_states_what_half_its_rank_keeps(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    found = verdict(write_adapter(tmp_path / "law"), base, "D202")
    assert "half the rank keeps" in found.message
    assert found.value is not None
    assert 0.25 < found.value < 0.9


def changed(folder: Path, deltas: dict[str, Tensor]) -> Path:
    """The base of :func:`write_base`, of which some parameters were changed."""
    model = tiny_bert()
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
    model.save_pretrained(folder)
    return folder


def matrices_of_base() -> dict[str, Tensor]:
    return {n: p.detach() for n, p in tiny_bert().named_parameters() if p.ndim == 2 and min(p.shape) >= 16}


def test_a_change_of_one_direction_is_said_and_one_of_many_is_not(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    shapes = {name: weight.shape for name, weight in matrices_of_base().items()}
    for share, status in ((0.95, "failed"), (0.85, "passed")):
        # Two directions: the first has a share of the energy that is known.
        values = torch.tensor([share, 1 - share]).double().sqrt()
        deltas = {
            n: 0.01 * matrix(values, *shape, seed=i).float() for i, (n, shape) in enumerate(shapes.items())
        }
        found = verdict(changed(tmp_path / status, deltas), base, "D202")
        assert found.value == pytest.approx(share, abs=1e-3)
        assert found.status == status
        assert "half the rank" not in found.message


def test_an_adapter_of_rank_three_cannot_collapse_either(tmp_path: Path) -> None:
    found = verdict(write_adapter(tmp_path / "law", r=3), write_base(tmp_path / "base"), "D202")
    assert "rank 3 only" in found.message


def test_adapters_of_too_low_rank_do_not_count_beside_others(tmp_path: Path) -> None:
    """The median is that of matrices that were free to spread."""
    base = write_base(tmp_path / "base")
    options = {"r": 1, "rank_pattern": {"layer.1.attention.self.value": 8}}
    found = verdict(write_adapter(tmp_path / "law", **options), base, "D202")
    assert "median of 1 matrices" in found.message
    assert "only" not in found.message


def test_without_matrices_nothing_is_checked(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "law")
    assert {verdict(tmp_path / "law", base, name).status for name in ("D202", "D205")} == {"not checked"}
