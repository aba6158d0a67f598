from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mergeready import merge
from mergeready.errors import BaseMismatchError, NonFiniteError, NotTrainedError
from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense, LowRank
from mergeready.metrics.late_part import late_part, without_late_part
from mergeready.weights import StateDictSource
from tests.merging.matrices import adapters, matrices

BASE = StateDictSource({"matrix": torch.ones(12, 20), "bias": torch.ones(7)})


def vector(matrix: Tensor | LowRank, bias: Tensor, label: str) -> DeltaTaskVector:
    deltas = {"matrix": Dense(matrix) if isinstance(matrix, Tensor) else matrix, "bias": Dense(bias)}
    return DeltaTaskVector(deltas, BASE.infos, BaseIdentity.of(BASE), label)


def flat(matrix: Tensor, bias: Tensor) -> np.ndarray:
    return torch.cat([matrix.reshape(-1), bias]).double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_equals_the_definitions() -> None:
    pick, end, peer = matrices((12, 20), 3)
    biases = torch.randn(3, 7)
    found = late_part(
        vector(end, biases[0], "end"), vector(pick, biases[1], "pick"), [vector(peer, biases[2], "law")], BASE
    )
    late = flat(end - pick, biases[0] - biases[1])
    early, other = flat(pick, biases[1]), flat(peer, biases[2])
    assert found.late.norm == pytest.approx(np.linalg.norm(late), rel=1e-6)
    assert found.early.norm == pytest.approx(np.linalg.norm(early), rel=1e-6)
    assert found.share == pytest.approx(np.linalg.norm(late) / np.linalg.norm(flat(end, biases[0])), rel=1e-6)
    assert found.cosine_with_early == pytest.approx(cosine(late, early), abs=1e-6)
    assert found.late.cosine == {"law": pytest.approx(cosine(late, other), abs=1e-6)}
    assert found.early.cosine == {"law": pytest.approx(cosine(early, other), abs=1e-6)}
    assert found.late.sign_conflict == {"law": pytest.approx(np.mean(late * other < 0))}
    S = np.linalg.svd((end - pick).double().numpy(), compute_uv=False)
    assert found.late.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-6)
    assert found.late.top_energy[4] == pytest.approx((S[:4] ** 2).sum() / (S**2).sum(), rel=1e-6)


def test_peers_of_one_name_are_told_apart() -> None:
    pick, end, *peers = matrices((12, 20), 4)
    zero = torch.zeros(7)
    found = late_part(
        vector(end, zero, "end"), vector(pick, zero, "pick"), [vector(p, zero, "law") for p in peers], BASE
    )
    assert list(found.late.cosine) == list(found.early.sign_conflict) == ["law", "law (2)"]
    for label, peer in zip(found.late.cosine, peers, strict=True):
        exact = cosine(flat(end - pick, zero), flat(peer, zero))
        assert found.late.cosine[label] == pytest.approx(exact, abs=1e-6)


def test_an_adapter_s_late_part_is_of_low_rank() -> None:
    end, pick = adapters((12, 20), [2, 2])
    zero = torch.zeros(7)
    found = late_part(vector(end, zero, "end"), vector(pick, zero, "pick"), [], BASE)
    assert found.late.top_energy[4] == pytest.approx(1.0)
    assert found.late.norm == pytest.approx(float((end.B @ end.A - pick.B @ pick.A).norm()), rel=1e-5)
    assert found.late.effective_rank <= 4


def test_the_late_direction_is_gone_from_the_merge() -> None:
    pick, end, peer = matrices((12, 20), 3)
    zero = torch.zeros(7)
    run, earlier, other = vector(end, zero, "end"), vector(pick, zero, "pick"), vector(peer, zero, "law")
    cut = without_late_part(run, earlier)
    late = (end - pick).double()
    assert float((cut["matrix"].value.double() * late).sum()) == pytest.approx(0, abs=1e-6)
    merged = merge(BASE, [cut, other], "task_arithmetic")
    left = merged["matrix"].double() - 1 - peer.double()
    expected = end.double() - (end.double() * late).sum() / late.square().sum() * late
    torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-6)


def test_a_run_that_went_straight_on_loses_all_of_its_direction() -> None:
    """Its late part is parallel to the early one: that nothing is left is what the docstring warns of."""
    (pick,) = matrices((12, 20), 1)
    zero = torch.zeros(7)
    cut = without_late_part(vector(2 * pick, zero, "end"), vector(pick, zero, "pick"))
    assert cut["matrix"].norm() == pytest.approx(0, abs=1e-6)


def test_peers_of_another_base_are_refused() -> None:
    pick, end, peer = matrices((12, 20), 3)
    other = StateDictSource({"matrix": torch.zeros(12, 20)})
    stranger = DeltaTaskVector({"matrix": Dense(peer)}, other.infos, BaseIdentity.of(other), "stranger")
    zero = torch.zeros(7)
    with pytest.raises(BaseMismatchError, match="stranger was made for another base"):
        late_part(vector(end, zero, "end"), vector(pick, zero, "pick"), [stranger], BASE)


def test_what_cannot_be_measured_is_an_error() -> None:
    (a,) = matrices((12, 20), 1)
    zero = torch.zeros(7)
    with pytest.raises(NotTrainedError, match="end equals pick: there is no late part"):
        late_part(vector(a, zero, "end"), vector(a, zero, "pick"), [], BASE)
    broken = a.clone()
    broken[0, 0] = math.inf
    for end, pick in ((broken, a), (a, broken)):
        with pytest.raises(NonFiniteError, match="matrix"):
            late_part(vector(end, zero, "end"), vector(pick, zero, "pick"), [], BASE)
        with pytest.raises(NonFiniteError, match="matrix"):
            without_late_part(vector(end, zero, "end"), vector(pick, zero, "pick"))
