from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.difficulty.measures import example_measures


def exact(logits: Tensor, label: int) -> tuple[float, float, float, bool]:
    """Loss, EL2N, confidence and correctness of one row, in float64 from the definitions."""
    z = [float(value) for value in logits.double()]
    top = max(z)
    size = sum(math.exp(value - top) for value in z)
    p = [math.exp(value - top) / size for value in z]
    el2n = math.sqrt(sum((q - (k == label)) ** 2 for k, q in enumerate(p)))
    return -(z[label] - top - math.log(size)), el2n, p[label], z.index(top) == label


@given(
    n=st.integers(1, 6),
    classes=st.integers(2, 7),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_equal_the_definitions(n: int, classes: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(n, classes, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    found = example_measures(logits, labels)
    for i in range(n):
        loss, el2n, confidence, correct = exact(logits[i], int(labels[i]))
        assert float(found.loss[i]) == pytest.approx(loss, abs=1e-6, rel=1e-6)
        assert float(found.el2n[i]) == pytest.approx(el2n, abs=1e-6)
        assert float(found.confidence[i]) == pytest.approx(confidence, abs=1e-6)
        assert bool(found.correct[i]) == correct


def test_el2n_is_the_gradient_s_norm() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0])
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(example_measures(logits, labels).el2n, gradient.norm(dim=1))


@pytest.mark.parametrize("shift", [False, True])
def test_sequences_are_means_over_what_counts(shift: bool) -> None:
    logits = torch.randn(3, 6, 5)
    labels = torch.randint(5, (3, 6))
    labels[0, 3:] = -100
    labels[2] = -100
    labels[1, 1] = int(logits[1, 0 if shift else 1].argmax())
    found = example_measures(logits, labels, shift=shift)
    for i in (0, 1):
        rows = [
            exact(logits[i, t - shift], int(labels[i, t]))
            for t in range(int(shift), 6)
            if int(labels[i, t]) != -100
        ]
        assert float(found.loss[i]) == pytest.approx(np.mean([r[0] for r in rows]), abs=1e-5)
        assert float(found.el2n[i]) == pytest.approx(np.mean([r[1] for r in rows]), abs=1e-6)
        assert float(found.confidence[i]) == pytest.approx(np.mean([r[2] for r in rows]), abs=1e-6)
        assert bool(found.correct[i]) == all(r[3] for r in rows)
    assert math.isnan(float(found.loss[2]))
    assert not bool(found.correct[2])


def test_a_sequence_is_right_where_all_of_it_is() -> None:
    logits = 9 * torch.eye(3)[None].repeat(2, 1, 1)
    labels = torch.tensor([[0, 1, 2], [0, 1, 1]])
    assert example_measures(logits, labels).correct.tolist() == [True, False]


def test_narrow_logits_are_measured_in_single_precision() -> None:
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    narrow = example_measures(logits.bfloat16(), labels)
    torch.testing.assert_close(narrow.loss, example_measures(logits.bfloat16().float(), labels).loss)
    assert narrow.loss.dtype == torch.float32


def test_what_has_no_classes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="class indices as labels"):
        example_measures(torch.randn(2, 3), torch.rand(2, 3))
    with pytest.raises(UnsupportedError, match="one logit a class"):
        example_measures(torch.randn(2, 1), torch.tensor([0, 0]))
    with pytest.raises(OptionError, match=r"logits \(2, 3\) and labels \(3,\) do not fit"):
        example_measures(torch.randn(2, 3), torch.tensor([0, 1, 2]))
