from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mergeready.errors import OptionError
from mergeready.training.batches import (
    examples_of,
    forward_logits,
    labels_of,
    on_device_of,
    positions,
    require_repeatable,
    size_of,
)
from tests.models import tiny_bert, token_batch

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 0, 1])


def test_models_are_called_as_their_batches_say() -> None:
    linear = nn.Linear(2, 4)
    for batch in (X, (X, Y), [X, Y]):
        assert torch.equal(forward_logits(linear, batch), linear(X))
    bert, batch = tiny_bert(), token_batch()
    labelled = batch | {"labels": torch.full((4,), 99)}  # would be out of range if it were passed on
    torch.testing.assert_close(forward_logits(bert, labelled), bert(**batch).logits)


def test_a_model_without_logits_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(hidden=x)

    with pytest.raises(
        OptionError, match=r"Odd returned SimpleNamespace, which holds no logits: pass `forward`"
    ):
        forward_logits(Odd(), X)


def test_labels() -> None:
    assert labels_of((X, Y)) is Y
    assert labels_of({"x": X, "labels": Y}) is Y
    for batch in (X, (X,), {"x": X}):
        with pytest.raises(OptionError, match="holds no labels"):
            labels_of(batch)


def test_examples_are_batches_of_one() -> None:
    batch = {"x": X, "labels": Y, "table": torch.eye(5), "one": torch.tensor(7), "name": "a"}
    cut = list(examples_of(batch))
    assert len(cut) == size_of(batch) == 3
    assert torch.equal(torch.cat([c["x"] for c in cut]), X)
    assert torch.equal(torch.cat([c["labels"] for c in cut]), Y)
    assert all(c["table"].shape == (5, 5) and c["one"] == 7 and c["name"] == "a" for c in cut)
    assert torch.equal(torch.cat(list(examples_of(X))), X)
    with pytest.raises(OptionError, match="a batch of type dict holds no tensor"):
        size_of({"name": "a"})
    assert [int(c[1]) for c in examples_of((X, Y))] == Y.tolist()


def test_padding_has_no_positions() -> None:
    logits = torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(
        positions(logits, {"attention_mask": mask}), torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]])
    )
    assert positions(logits, (X, Y)).shape == (6, 4)
    assert positions(logits[:, 0], {"attention_mask": mask}).shape == (2, 4)


def test_batches_must_be_there_and_repeatable() -> None:
    with pytest.raises(OptionError, match="`batches` is empty"):
        list(on_device_of(nn.Linear(1, 1), []))
    require_repeatable([X])
    with pytest.raises(OptionError, match="not an iterator"):
        require_repeatable(iter([X]))
