from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from mergeready.errors import BaseMismatchError, MismatchError, OptionError, UnsupportedError
from mergeready.experts import LiveExpert, dense
from mergeready.experts.live import is_peft
from mergeready.weights.module import unwrap
from tests.models import TinyConvNet, perturb, tiny_bert, tiny_gpt2, tiny_llama


def adapted(base: nn.Module | None = None, **options: object) -> PeftModel:
    settings = {"r": 2, "target_modules": ["query"]} | options
    model = get_peft_model(copy.deepcopy(base or tiny_bert()), LoraConfig(**settings))
    return perturb(model, 1, 0.1)


class DistributedDataParallel(nn.Module):
    """What torch's wrapper looks like from outside, without processes to talk to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Compiled(nn.Module):
    """What ``torch.compile`` returns looks like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama, TinyConvNet])
def test_a_full_model_is_its_difference_to_the_base(make: type[nn.Module]) -> None:
    base, model = make(), perturb(make(), 1)
    live = LiveExpert(model, base)
    parameters, start = dict(model.named_parameters()), dict(base.named_parameters())
    assert set(live.vector) == set(live.targets) == set(parameters)
    for name, parameter in parameters.items():
        assert live.targets[name] is parameter
        exact = parameter.double() - start[name].double()
        torch.testing.assert_close(dense(live.vector[name]).double(), exact.detach(), rtol=1e-5, atol=1e-7)
    assert (live.extra, live.missing, live.is_peft, live.base_is_live) == ((), (), False, False)


def test_it_follows_training() -> None:
    model = perturb(tiny_bert(), 1)
    live = LiveExpert(model, tiny_bert())
    before = dense(live.vector["classifier.bias"]).clone()
    with torch.no_grad():
        model.classifier.bias += 1
    torch.testing.assert_close(dense(live.vector["classifier.bias"]), before + 1)


def test_a_full_model_needs_a_base() -> None:
    with pytest.raises(OptionError, match="needs `base`"):
        LiveExpert(tiny_bert(), None)


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    model.classifier.bias.requires_grad_(False)
    live = LiveExpert(perturb(model, 1), tiny_bert())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 6
    assert set(live.vector) == set(dict(model.named_parameters())) - frozen
    assert frozen <= set(live.targets)


def test_frozen_parameters_show_a_wrong_base() -> None:
    """Nearly the same weights, such as another release: only what must not have moved tells."""
    other = perturb(tiny_bert(), 9, scale=0.05)
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    with pytest.raises(BaseMismatchError, match=r"bert\.embeddings\..* is frozen in live"):
        LiveExpert(model, other)
    model.requires_grad_(True)
    LiveExpert(model, other)


def test_another_initialisation_is_refused() -> None:
    with pytest.raises(BaseMismatchError, match="does not descend from"):
        LiveExpert(tiny_bert(), tiny_bert(seed=5))


def test_other_shapes_are_refused() -> None:
    base = tiny_bert().state_dict()
    base["classifier.weight"] = torch.zeros(4, 32)
    with pytest.raises(MismatchError, match=r"classifier\.weight is \(3, 32\), in the base \(4, 32\)"):
        LiveExpert(tiny_bert(), base)


def test_a_head_of_its_own_stays_out() -> None:
    live = LiveExpert(perturb(tiny_bert(), 1), tiny_bert().bert)
    assert live.extra == ("classifier.weight", "classifier.bias")
    assert live.missing == ()
    assert "classifier.weight" not in live.targets
    back = LiveExpert(perturb(tiny_bert(), 1).bert, tiny_bert())
    assert back.missing == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        Compiled,
        torch.compile,
        nn.DataParallel,
        lambda m: DistributedDataParallel(Compiled(m)),
        lambda m: Compiled(DistributedDataParallel(m)),
    ],
)
@pytest.mark.parametrize("peft", [False, True])
def test_wrappers_are_looked_through(wrap: type[nn.Module], peft: bool) -> None:
    model = adapted() if peft else perturb(tiny_bert(), 1)
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert is_peft(unwrap(wrapped)) is peft
    live, plain = LiveExpert(wrapped, tiny_bert()), LiveExpert(model, tiny_bert())
    assert live.model is model
    assert set(live.vector) == set(plain.vector)
    assert all(torch.equal(dense(live.vector[n]), dense(plain.vector[n])) for n in plain.vector)


def test_a_layer_that_is_compiled_alone_keeps_its_name() -> None:
    model = perturb(tiny_bert(), 1)
    names = set(dict(model.named_parameters()))
    model.bert.encoder.layer[0] = Compiled(model.bert.encoder.layer[0])
    assert set(LiveExpert(model, tiny_bert()).vector) == names


def test_an_adapter_carries_its_base() -> None:
    base = tiny_bert()
    model = adapted(base)
    live = LiveExpert(model, None)
    assert live.base_is_live
    start = base.state_dict()
    assert set(live.targets) == set(dict(base.named_parameters()))
    assert all(torch.equal(live.base.source.read(name), start[name]) for name in live.targets)
    given_base = LiveExpert(model, base)
    assert not given_base.base_is_live
    assert given_base.base.identity == live.base.identity
    for name in given_base.vector:
        assert torch.equal(dense(given_base.vector[name]), dense(live.vector[name]))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["word_embeddings", "query"]},
        {"modules_to_save": ["classifier"]},
        {"trainable_token_indices": {"word_embeddings": [3]}},
        {"use_dora": True},
    ],
)
def test_the_base_inside_has_the_names_it_had(options: dict[str, object]) -> None:
    base = tiny_bert()
    live = LiveExpert(adapted(base, **options), None)
    start = base.state_dict()
    assert set(live.targets) == set(dict(base.named_parameters()))
    assert all(torch.equal(target, start[name]) for name, target in live.targets.items())
    assert live.extra == live.missing == ()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_biases_need_a_base(bias: str) -> None:
    with pytest.raises(OptionError, match=r"also trains parameters of the base \(.*bias.*pass `base`"):
        LiveExpert(adapted(bias=bias), None)
    assert (
        "bert.encoder.layer.0.attention.self.query.bias" in LiveExpert(adapted(bias=bias), tiny_bert()).vector
    )


def test_a_wrong_base_of_an_adapter_is_refused() -> None:
    with pytest.raises(BaseMismatchError, match="is frozen in live"):
        LiveExpert(adapted(tiny_bert()), tiny_bert(seed=5))


def test_an_adapter_on_rounded_weights_of_the_base_passes() -> None:
    live = LiveExpert(adapted(tiny_bert().bfloat16()), tiny_bert())
    assert len(live.vector) == 2


def test_two_active_adapters_are_refused() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
    assert set(LiveExpert(model, None).vector) == set(LiveExpert(adapted(), None).vector)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match="one active adapter is needed, not default, second"):
        LiveExpert(model, None)


def test_the_active_adapter_counts() -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
    model.set_adapter("second")
    assert all(".value." in name for name in LiveExpert(model, None).vector)


def test_injected_adapters_are_refused() -> None:
    model = tiny_bert()
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(UnsupportedError, match=r"injected adapters.*get_peft_model"):
        LiveExpert(model, tiny_bert())


def test_other_adapters_than_lora_are_refused() -> None:
    config = IA3Config(target_modules=["query", "dense"], feedforward_modules=["dense"])
    with pytest.raises(UnsupportedError, match="its type is IA3"):
        LiveExpert(get_peft_model(tiny_bert(), config), tiny_bert())


def test_an_untrained_adapter_is_no_error_while_it_trains() -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"]))
    vector = LiveExpert(model, None).vector
    assert all(vector[name].norm() == 0 for name in vector)


def test_switching_the_adapter_off_leaves_flags_alone_also_after_an_error() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # a common way to train: PEFT itself would turn it on again
            parameter.requires_grad_(False)
    live = LiveExpert(model, None)
    flags = [p.requires_grad for p in model.parameters()]
    assert True in flags
    with pytest.raises(KeyboardInterrupt), live.adapter_off():
        raise KeyboardInterrupt
    assert [p.requires_grad for p in model.parameters()] == flags
    with LiveExpert(tiny_bert(), tiny_bert()).adapter_off():
        pass


def test_complex_weights_that_train_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.filters = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="complex weights are trained: filters"):
        LiveExpert(model, base)
    model.filters.requires_grad_(False)
    assert set(LiveExpert(model, base).targets) == {"weight", "bias"}
