"""Ranks and directions of changes with a known spectrum, and intruders against PEFT's own count."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import Dense, LowRank, Rows
from mergeready.experts.svd import leading_svd
from mergeready.metrics.intruders import intruders
from mergeready.validation import Verdict, validate
from mergeready.validation.spectrum_checks import half_energy, spectrum_of_delta
from tests.models import perturb, tiny_bert
from tests.validation.experts import write_adapter, write_base


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def matrix(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    count = len(values)
    return orthonormal(rows, count, seed) * values @ orthonormal(columns, count, seed + 1).T


@pytest.mark.parametrize("shape", [(700, 600), (600, 700), (40, 30)])
def test_leading_triples_of_a_known_spectrum(shape: tuple[int, int]) -> None:
    values = 0.97 ** torch.arange(min(shape), dtype=torch.float64)
    given = matrix(values, *shape)
    left, found, right = leading_svd(given, 20)
    assert torch.allclose(found, values[:20], rtol=1e-4)
    assert torch.allclose(
        (left.T @ orthonormal(shape[0], min(shape), 0)[:, :20]).abs().diag(),
        torch.ones(20).double(),
        atol=1e-2,
    )
    assert torch.allclose((left * found) @ right, given @ right.T @ right, atol=1e-3)


def test_it_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    leading_svd(matrix(torch.ones(520).double(), 520, 520), 3)
    assert torch.equal(torch.get_rng_state(), before)


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
    rows = Rows(index=torch.arange(4), value=torch.diag(values).float(), shape=(9, 4))
    assert spectrum_of_delta(rows).top_energy[1] == pytest.approx(16 / 22, rel=1e-5)


@pytest.mark.parametrize("amount", [0.05, 0.4, 1.5])
def test_intruders_are_those_that_peft_counts(amount: float) -> None:
    base = tiny_bert()
    options = LoraConfig(r=4, target_modules=["query", "value", "dense"])
    model = perturb(get_peft_model(copy.deepcopy(base), options), 3, amount)
    lines: list[str] = []
    reduce_intruder_dimension(model, logging_sink=lines.append)
    expected = {}
    for line in lines:
        name, _, count = line.partition(": ")
        if "ntruders" not in count:
            continue
        expected[name.removeprefix("base_model.model.")] = int((re.findall(r"\d+", count) or ["0"])[0])
    found = {}
    for name in expected:
        layer = model.base_model.model.get_submodule(name)
        before = base.get_submodule(name).weight.detach()
        found[name] = intruders(before, before + layer.get_delta_weight("default").detach())
    assert found == expected
    assert sum(expected.values()) > 0 or amount < 0.4


def test_intruders_of_a_large_matrix() -> None:
    base = matrix(0.97 ** torch.arange(600, dtype=torch.float64), 600, 600)
    outside = orthonormal(600, 600, 0)[:, 500:503]  # the base hardly uses them
    assert intruders(base, 1.1 * base) == 0
    assert (
        intruders(base, base + outside * torch.tensor([5.0, 4.0, 3.0]).double() @ orthonormal(600, 3, 7).T)
        == 3
    )


def test_a_base_of_zeros_has_no_directions() -> None:
    assert intruders(torch.zeros(20, 20), matrix(torch.ones(3).double(), 20, 20)) == 3


@pytest.mark.parametrize("options", [{"top": 0}, {"cosine": 0.0}, {"cosine": 1.5}])
def test_what_cannot_be_counted(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        intruders(torch.eye(3), torch.eye(3), **options)


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


def test_without_matrices_nothing_is_checked(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path / "law")
    assert {verdict(tmp_path / "law", base, name).status for name in ("D202", "D205")} == {"not checked"}
