from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.training.disentanglement import disentanglement_error
from tests.models import perturb, tiny_llama, token_batch
from tests.training.small import Net, equal, examples, expert, state_of


class Linear(nn.Module):
    """A linear model, whose output is linear in its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def supported(columns: slice, seed: int) -> dict[str, Tensor]:
    weight = Linear().layer.weight.detach().clone()
    # Small, as fine-tuning is; the scales make up for it.
    weight[:, columns] += 0.02 * torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    return {"layer.weight": weight}


def inputs(columns: slice, seed: int) -> list[Tensor]:
    x = torch.zeros(60, 8)
    x[:, columns] = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed))
    return list(x.split(25))


FIRST, SECOND = slice(0, 4), slice(4, 8)


@pytest.mark.parametrize("scales", [[50.0, 50.0], [15.0, 100.0]])
def test_a_linear_model_of_disjoint_supports_is_disentangled(scales: list[float]) -> None:
    experts = [supported(FIRST, 1), supported(SECOND, 2)]
    data = [inputs(FIRST, 3), inputs(SECOND, 4)]
    found = disentanglement_error(Linear(), Linear().state_dict(), experts, data, scales=scales)
    assert found.error == 0.0
    swapped = disentanglement_error(Linear(), Linear().state_dict(), experts, data[::-1], scales=scales)
    assert swapped.error > 0.2, "each on the other's inputs, a task vector matters"


def test_equals_counting_decisions() -> None:
    base, experts = Net(), [expert(1), expert(2), expert(3)]
    data = [list(examples(task, 9, 50)[0].split(20)) for task in (1, 2, 3)]
    scales = [1.0, 0.7, 1.5]
    model = expert(4, steps=3)
    before = state_of(model)
    found = disentanglement_error(model, base, experts, data, scales=scales)
    assert equal(before, state_of(model))

    def decisions(factors: list[float], x: Tensor) -> Tensor:
        merged = copy.deepcopy(base).eval()
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                start = parameter.clone()
                for factor, one in zip(factors, experts, strict=True):
                    parameter += factor * (one.get_parameter(name) - start)
            return merged(x).argmax(1)

    total = 0.0
    for i, x in enumerate(torch.cat(part) for part in data):
        alone = [scale if i == j else 0.0 for j, scale in enumerate(scales)]
        total += float((decisions(alone, x) != decisions(scales, x)).double().mean())
    assert total > 0.1
    assert found.error == pytest.approx(total, abs=1e-9)
    assert sum(task.value for task in found.tasks.values()) == pytest.approx(found.error)
    assert len(found.tasks) == 3


def test_padding_decides_nothing() -> None:
    base, experts = tiny_llama(), [perturb(tiny_llama(), seed, 0.1) for seed in (1, 2)]
    batch = token_batch(count=4)
    batch["attention_mask"][:, 8:] = 0
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 8:] = 7
    found = disentanglement_error(tiny_llama(), base, experts, [[batch], [batch]])
    again = disentanglement_error(tiny_llama(), base, experts, [[other], [other]])
    assert 0 < found.error == again.error
    assert all(task.n == 4 * 8 for task in found.tasks.values())


def test_arguments_are_checked() -> None:
    with pytest.raises(OptionError, match="at least two experts, with inputs and a scale each, not 1"):
        disentanglement_error(Net(), Net(), [expert(1)], [[examples(1, 0, 3)[0]]])
    once = [iter([examples(1, 0, 3)[0]]) for _ in range(2)]
    with pytest.raises(OptionError, match="needed more than once"):
        disentanglement_error(Net(), Net(), [expert(1), expert(2)], once)
    with pytest.raises(OptionError, match="2 experts, 1 inputs and 2 scales"):
        disentanglement_error(Net(), Net(), [expert(1), expert(2)], [[examples(1, 0, 3)[0]]])
