"""Fisher information against closed forms and against float64 loops over examples."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergeready import fisher_information, merge
from mergeready.errors import NonFiniteError, OptionError
from tests.experts.test_peft_lora import VARIANTS, Variant, trained
from tests.models import perturb, tiny_bert, tiny_llama, token_batch
from tests.training.small import Net, examples, left_alone
from tests.training.test_activations import batch_for


def linear(seed: int = 0, inputs: int = 4, classes: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, classes)


def data(count: int = 12, inputs: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, inputs, generator=generator)
    return x, torch.randint(classes, (count,), generator=generator)


def by_loops(model: nn.Module, x: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """mean over x of Σ_y p(y|x) (∂ log p(y|x))², or of the true label's term, one gradient at a time in float64."""
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i, one in enumerate(x.double()):
        classes = range(model(one[None]).shape[-1]) if y is None else [int(y[i])]
        for c in classes:
            log_p = torch.log(torch.softmax(model(one[None])[0], 0)[c])
            share = float(log_p.exp()) if y is None else 1.0
            gradients = torch.autograd.grad(log_p, list(model.parameters()))
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += share * gradient**2 / len(x)
    return total


def assert_close(found: object, exact: dict[str, Tensor], rtol: float = 1e-4) -> None:
    for name, value in exact.items():
        ours = found.read(name).double()
        torch.testing.assert_close(
            ours, value.double(), rtol=rtol, atol=1e-7 + rtol * float(value.abs().max()) / 100
        )


def test_the_closed_form_of_linear_softmax() -> None:
    model, (x, y) = linear(), data()
    p = torch.softmax(x.double() @ model.weight.double().T + model.bias.double(), 1)
    expected = fisher_information(model, [x[:5], x[5:]], labels="expected")
    slope = p * (1 - p)
    assert_close(expected, {"weight": slope.T @ x.double() ** 2 / len(x), "bias": slope.mean(0)})
    true = fisher_information(model, [(x[:5], y[:5]), (x[5:], y[5:])], labels="true")
    error = (nn.functional.one_hot(y, 3) - p) ** 2
    assert_close(true, {"weight": error.T @ x.double() ** 2 / len(x), "bias": error.mean(0)})


@pytest.mark.parametrize("labels", ["expected", "true"])
def test_float64_loops_over_examples(labels: str) -> None:
    model = Net().train()  # dropout is off while the Fisher information is collected
    x, y = examples(1, part=0, count=10)
    found = fisher_information(model, [(x[:4], y[:4]), (x[4:], y[4:])], labels=labels)
    assert_close(found, by_loops(model, x, y if labels == "true" else None))
    assert found.facts == {"examples": 10, "labels": labels, "seed": 0}


def test_sampled_labels_are_right_on_average_and_repeatable() -> None:
    model, (x, _) = linear(), data()
    exact = by_loops(model, x, None)["weight"]
    draws = torch.stack([fisher_information(model, [x], seed=s).read("weight").double() for s in range(80)])
    error = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert float(error.abs().max()) < 4
    again = fisher_information(model, [x[:6], x[6:]], seed=3).read("weight")
    torch.testing.assert_close(again, draws[3].float())
    assert not torch.equal(draws[0], draws[1])


def test_gradients_are_squared_by_example_not_by_batch() -> None:
    model, (x, y) = linear(), data()
    nn.functional.cross_entropy(model(x), y).backward()
    of_batch = model.weight.grad**2
    model.zero_grad()
    found = fisher_information(model, [(x, y)], labels="true").read("weight")
    assert float((found / of_batch).median()) > 2


def test_a_loss_of_one_s_own() -> None:
    model, x = linear(classes=1), data()[0]
    target = torch.randn(12, 1)

    def half_squared_error(m: nn.Module, one: object) -> Tensor:
        return 0.5 * (m(one[0]) - one[1]).square().sum()

    found = fisher_information(model, [(x, target)], loss=half_squared_error)
    error = (x @ model.weight.T + model.bias - target).double()
    assert_close(
        found, {"weight": (error * x.double()).square().mean(0, keepdim=True), "bias": (error**2).mean(0)}
    )


def test_padding_does_not_count_and_every_position_does() -> None:
    model = tiny_llama()
    batch = token_batch(1, count=2)
    batch["attention_mask"][1, 8:] = 0
    padded = fisher_information(model, [batch])
    generator = torch.Generator().manual_seed(0)
    double = copy.deepcopy(model).double()
    total = {n: torch.zeros_like(p) for n, p in double.named_parameters()}
    for i, length in enumerate((12, 8)):
        ids = batch["input_ids"][i : i + 1]
        with torch.no_grad():
            p = model(input_ids=ids, attention_mask=batch["attention_mask"][i : i + 1]).logits[0, :length]
        drawn = torch.multinomial(p.float().softmax(-1), 1, generator=generator)
        log_p = double(input_ids=ids[:, :length]).logits[0].log_softmax(-1).gather(1, drawn).sum()
        for name, gradient in zip(total, torch.autograd.grad(log_p, list(double.parameters())), strict=True):
            total[name] += gradient**2 / 2
    assert_close(padded, total, rtol=2e-3)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_an_adapter_s_is_that_of_the_model_it_makes(variant: Variant) -> None:
    base, adapter = trained(variant)
    model_batch = batch_for(base)
    found = fisher_information(adapter, [model_batch], base=base, seed=1)
    made = copy.deepcopy(adapter).merge_and_unload(safe_merge=True)
    exact = fisher_information(made, [model_batch], base=base, seed=1)
    assert found.infos.keys() == exact.infos.keys()
    for name in exact.infos:
        size = float(exact.read(name).max())
        torch.testing.assert_close(found.read(name), exact.read(name), rtol=1e-2, atol=1e-3 * size + 1e-12)


def test_names_are_the_base_s_and_the_base_is_recorded(tmp_path: Path) -> None:
    base = tiny_bert()
    expert = perturb(copy.deepcopy(base), 1, 0.02)
    found = fisher_information(expert, [token_batch()], base=base.bert)
    assert "encoder.layer.0.output.dense.weight" in found.infos
    assert not any(name.startswith(("bert.", "classifier")) for name in found.infos)
    path = found.save(tmp_path / "fisher.safetensors")
    merged = merge(base.bert, [expert], "fisher", fisher=[path], strict=False)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expert.bert.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_the_model_stays_as_it_was() -> None:
    x, _ = examples(1, part=0, count=4)
    with left_alone() as model:
        found = fisher_information(model, [x])
    assert float(found.read("head.weight").sum()) > 0  # frozen parameters have a say as well
    with left_alone() as model, pytest.raises(RuntimeError):
        fisher_information(model, [x, torch.ones(4, 5)])


def test_parameters_out_of_reach_are_zero() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    found = fisher_information(Half(), [data()[0]])
    assert float(found.read("unused.weight").abs().max()) == 0
    assert float(found.read("used.weight").max()) > 0


def test_what_does_not_fit_is_refused() -> None:
    model, (x, y) = linear(), data()
    with pytest.raises(OptionError, match="`labels` must be sampled, expected or true"):
        fisher_information(model, [x], labels="all")
    with pytest.raises(OptionError, match="holds no labels"):
        fisher_information(model, [x], labels="true")
    with pytest.raises(OptionError, match="`batches` is empty"):
        fisher_information(model, [])
    with pytest.raises(OptionError, match="one output, so its likelihood is not known"):
        fisher_information(linear(classes=1), [x])
    with pytest.raises(OptionError, match="many positions: labels='true' needs `loss`"):
        fisher_information(tiny_llama(), [token_batch()], labels="true")
    with pytest.raises(NonFiniteError, match=r"gradients are NaN or infinite in 2 parameters: weight, bias"):
        fisher_information(model, [(x * float("nan"), y)], loss=lambda m, one: m(one[0]).sum() * float("nan"))
