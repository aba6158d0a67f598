from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergeready.demo.encoder import ZeroShotClassifier
from mergeready.demo.evaluate import Accuracy, pad
from tests.demo.tiny import tiny_classifier


def texts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [torch.randint(2, 60, (length,), generator=generator).tolist() for length in lengths]


def naive(model: ZeroShotClassifier, ids: list[list[int]], labels: list[int], head: Tensor) -> list[float]:
    """One text at a time, in the order given."""
    right = []
    for text, label in zip(ids, labels, strict=True):
        tensor = torch.tensor([text])
        with torch.no_grad():
            states = model.bert(input_ids=tensor, attention_mask=torch.ones_like(tensor)).last_hidden_state
        scores = head @ states[0].mean(0)
        right.append(float(int(scores.argmax()) == label))
    return right


@pytest.mark.parametrize("count", [1, 64, 150])
def test_it_equals_a_naive_loop(count: int) -> None:
    """Also the order of examples: batches are sorted by length inside."""
    model = tiny_classifier()
    head = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    head /= head.norm(dim=1, keepdim=True)
    ids = texts(count)
    labels = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(2)).tolist()
    found = Accuracy(ids, labels, head)(model)
    assert list(found) == ["accuracy"]
    assert found["accuracy"].tolist() == naive(model, ids, labels, head)


def test_it_is_its_own_head_that_counts() -> None:
    model = tiny_classifier()
    ids, head = texts(40), torch.eye(32)[:4]
    model.set_head(-torch.eye(32)[:2])
    before = model.label_embeddings.clone()
    right = Accuracy(ids, [0] * 40, head)(model)["accuracy"]
    assert right.tolist() == naive(model, ids, [0] * 40, head)
    assert 0 < right.mean() < 1
    assert torch.equal(model.label_embeddings, before)


def test_another_model_is_refused() -> None:
    with pytest.raises(TypeError, match="evaluates its own classifier, not Linear"):
        Accuracy([[1]], [0], torch.eye(2))(nn.Linear(2, 2))


def test_padding() -> None:
    ids, mask = pad([[5, 6, 7], [8], [9, 10]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
