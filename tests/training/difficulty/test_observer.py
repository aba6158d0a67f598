from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mergeready.errors import UnsupportedError
from mergeready.training.difficulty.measures import example_measures
from mergeready.training.difficulty.observer import ForwardObserver
from mergeready.training.difficulty.shares import share_of_hardest
from mergeready.training.difficulty.tracker import DifficultyTracker
from tests.models import tiny_bert, tiny_llama, token_batch


def batch(count: int = 6) -> dict[str, Tensor]:
    labels = torch.arange(count) % 3
    return token_batch(count=count) | {"labels": labels}


def quiet_bert() -> nn.Module:
    model = tiny_bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def marked(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return data | {"example_id": 10 + torch.arange(len(data["input_ids"]))}


@pytest.mark.parametrize("labels", ["given", "taken away", "positional"])
def test_sees_what_the_model_computes_and_changes_nothing(labels: str) -> None:
    model, tracker, data = quiet_bert(), DifficultyTracker(), batch()
    expected = model(**data)
    measured = example_measures(expected.logits, data["labels"])
    observer = ForwardObserver(model, tracker)
    given = marked(data)
    if labels == "taken away":  # as the Trainer does for label smoothing
        given["example_label"] = given.pop("labels")
    found = model(**given)
    assert torch.equal(found.logits, expected.logits)
    assert found.logits.requires_grad
    table = tracker.table()
    assert table.id.tolist() == list(range(10, 16))
    np.testing.assert_allclose(table.loss, measured.loss.double().numpy(), atol=1e-6)
    np.testing.assert_allclose(table.el2n, measured.el2n.double().numpy(), atol=1e-6)
    observer.remove()
    model(**data)
    assert tracker.table().seen.tolist() == [1] * 6
    assert not model._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_s_share_is_that_of_the_head() -> None:
    model, tracker, data = quiet_bert(), DifficultyTracker(), batch(20)
    norms = []
    for i in range(20):
        one = {name: value[i : i + 1] for name, value in data.items()}
        gradients = torch.autograd.grad(model(**one).loss, [model.classifier.weight, model.classifier.bias])
        norms.append(float(sum(g.double().square().sum() for g in gradients)) ** 0.5)
    ForwardObserver(model, tracker)
    model(**marked(data))
    assert tracker.steps()["gradient_share"][0] == pytest.approx(share_of_hardest(norms), abs=1e-5)


def test_where_logits_are_not_linear_in_a_layer_the_share_is_not_known() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return 9 * nn.functional.normalize(self.body(x))

    model, tracker = Cosine(), DifficultyTracker()
    ForwardObserver(model, tracker)
    model(x=torch.randn(4, 3), example_id=torch.arange(4), example_label=torch.tensor([0, 1, 2, 0]))
    assert np.isnan(tracker.steps()["gradient_share"]).all()
    assert np.isfinite(tracker.steps()["loss_share"]).all()


def test_evaluations_are_not_seen_and_do_not_choke_on_ids() -> None:
    model, tracker = quiet_bert(), DifficultyTracker()
    ForwardObserver(model, tracker)
    model.eval()
    model(**marked(batch()))
    model.train()
    model(**batch())
    assert len(tracker.table()) == 0


def test_a_batch_as_one_argument() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            assert set(batch) == {"x", "labels"}
            return {"logits": self.head(batch["x"])}

    model, tracker = Net(), DifficultyTracker()
    ForwardObserver(model, tracker)
    given = {"x": torch.randn(2, 2), "labels": torch.tensor([0, 1]), "example_id": torch.tensor([4, 2])}
    model(given)
    assert tracker.table().id.tolist() == [2, 4]
    assert "example_id" in given, "the caller's batch changed"


@pytest.mark.parametrize("adapter", [False, True])
def test_language_models_are_measured_at_the_next_token(adapter: bool) -> None:
    model = tiny_llama()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.train()
    tracker = DifficultyTracker()
    ForwardObserver(model, tracker)
    data = token_batch(count=3)
    data["labels"] = data["input_ids"].clone()
    data["labels"][1, 5:] = -100
    loss = model(**marked(data)).loss
    table = tracker.table()
    tokens = np.array([11, 4, 11])
    assert float(loss) == pytest.approx((table.loss * tokens).sum() / tokens.sum(), rel=1e-5)


def test_what_cannot_be_seen_is_an_error() -> None:
    model, tracker = quiet_bert(), DifficultyTracker()
    ForwardObserver(model, tracker)
    given = marked(batch())
    del given["labels"]
    with pytest.raises(UnsupportedError, match="no labels can be found in its inputs: collate with"):
        model(**given)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        ForwardObserver(nn.DataParallel(model), tracker)
