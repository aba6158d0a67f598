from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from mergeready.errors import OptionError
from mergeready.training.similarity import LinearCka, representation_similarity
from tests.models import perturb, tiny_encoder, token_batch
from tests.training.small import Net, equal, examples, state_of


def exact(x: np.ndarray, y: np.ndarray) -> float:
    """From HSIC of linear kernels: centred Gram matrices over inputs, where we sum over features."""
    n = len(x)
    H = np.eye(n) - np.ones((n, n)) / n
    K, L = H @ x @ x.T @ H, H @ y @ y.T @ H
    return float(np.trace(K @ L) / math.sqrt(np.trace(K @ K) * np.trace(L @ L)))


def cka_of(x: torch.Tensor, y: torch.Tensor, cuts: int = 1) -> float:
    cka = LinearCka()
    for a, b in zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True):
        cka.update(a, b)
    return cka.result()


@given(
    n=st.integers(3, 30),
    p=st.integers(1, 6),
    q=st.integers(1, 6),
    cuts=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_equals_hsic_over_inputs(n: int, p: int, q: int, cuts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64) + 5
    y = torch.randn(n, q, generator=generator, dtype=torch.float64) + x[:, :1]
    assert cka_of(x, y, cuts) == pytest.approx(exact(x.numpy(), y.numpy()), abs=1e-9)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_rotations_shifts_and_factors_do_not_matter(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 40, 5, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert cka_of(x, scale * x @ Q + 3) == pytest.approx(1.0)
    assert cka_of(scale * x @ Q - 1, y) == pytest.approx(cka_of(x, y))
    assert cka_of(y, x) == pytest.approx(cka_of(x, y))


def test_large_means_do_not_cancel() -> None:
    x, y = torch.randn(2, 50, 4)
    assert cka_of(x + 1000, y + 1000, 5) == pytest.approx(
        exact(x.double().numpy(), y.double().numpy()), abs=1e-3
    )


def test_what_does_not_vary_has_no_similarity() -> None:
    assert math.isnan(cka_of(torch.ones(5, 2), torch.randn(5, 2)))


def test_layers_of_two_models_on_the_same_inputs() -> None:
    first, second = Net(), perturb(Net(), 1, 0.2)
    before = state_of(second)
    second.train()
    batches = [examples(1, part, 20)[0] for part in range(3)]
    found = representation_similarity(first, second, batches, ["embed", "layers.1"])
    assert second.training
    assert equal(before, state_of(second))
    x = torch.cat(batches)
    with torch.no_grad():
        a, b = first.embed(x), second.embed(x)
    assert found["embed"] == pytest.approx(exact(a.double().numpy(), b.double().numpy()), abs=1e-6)
    assert 0 < found["layers.1"] < 1
    assert representation_similarity(first, first, batches, ["head"])["head"] == pytest.approx(1.0)


def test_padding_does_not_count() -> None:
    first, second = tiny_encoder(), perturb(tiny_encoder(), 1, 0.1)
    batch = token_batch(count=6)
    batch["attention_mask"][:, 8:] = 0
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 8:] = 7
    layer = ["encoder.layer.1"]
    a = representation_similarity(first, second, [batch], layer)
    b = representation_similarity(first, second, [other], layer)
    assert a[layer[0]] == pytest.approx(b[layer[0]], rel=1e-6)


def test_a_layer_that_says_nothing_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(OptionError, match="unused of Half did not run"):
        representation_similarity(Half(), Half(), [torch.ones(3, 2)], ["used", "unused"])
    with pytest.raises(OptionError, match=r"encoder of BertModel .* something else than a tensor"):
        representation_similarity(tiny_encoder(), tiny_encoder(), [token_batch()], ["encoder"])


def test_reading_a_loader_leaves_the_random_state_alone() -> None:
    loader = DataLoader(torch.randn(8, 6), batch_size=4, shuffle=True)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    representation_similarity(Net(), Net(), loader, ["head"])
    assert torch.equal(torch.rand(2), expected)


def test_arguments_are_checked() -> None:
    with pytest.raises(OptionError, match="no layers head2, tail; see"):
        representation_similarity(Net(), Net(), [torch.ones(2, 6)], ["head2", "head", "tail"])
    with pytest.raises(OptionError, match="`batches` is empty"):
        representation_similarity(Net(), Net(), [], ["head"])
    cka = LinearCka()
    with pytest.raises(OptionError, match="2 and 3 representations are not of the same inputs"):
        cka.update(torch.ones(2, 1), torch.ones(3, 1))
    cka.update(torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(OptionError, match="other features than those before"):
        cka.update(torch.ones(2, 2), torch.ones(2, 1))
