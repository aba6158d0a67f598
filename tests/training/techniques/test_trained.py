from __future__ import annotations

import torch

from mergeready.experts import LiveExpert
from mergeready.training.techniques.norms import scale_change
from mergeready.training.techniques.trained import trained_weights
from tests.models import perturb, tiny_gpt2


def test_tied_weights_train_once_also_where_the_base_holds_them_twice() -> None:
    """As a copy of the state dict does: what acts on each weight that trains would act on these twice."""
    base = {name: value.clone() for name, value in tiny_gpt2().state_dict().items()}
    model = perturb(tiny_gpt2(), 1)
    live = LiveExpert(model, base)
    assert live.targets["lm_head.weight"] is live.targets["transformer.wte.weight"]
    weights = trained_weights(live)
    assert [weight.name for weight in weights.values()] == list(weights)
    assert [id(weight.place) for weight in weights.values()] == [id(p) for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale_change(weights.values(), 0.5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value - base[name], 0.5 * (before[name] - base[name]))
