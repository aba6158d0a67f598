"""MLX adapters against MLX's forward pass, written down in float64 from its formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergeready.errors import FormatError, MismatchError, UnsupportedError
from mergeready.experts import LowRank, open_expert
from mergeready.merging import merge
from tests.experts.mlx_files import SCALE, adapted, random_adapter, write_adapter
from tests.models import perturb, tiny_bert, tiny_gpt2, tiny_llama, token_batch

ATTENTION = ("q_proj", "v_proj")
VARIANTS = {
    "plain": (tiny_llama, ATTENTION, False),
    "everywhere": (tiny_llama, ("_proj",), False),
    "embedding": (tiny_llama, ("embed_tokens", "q_proj"), False),
    "head": (tiny_llama, ("lm_head",), False),
    "biases": (tiny_bert, ("query", "dense"), False),
    "dora": (tiny_llama, ("_proj",), True),
    "dora biases": (tiny_bert, ("query", "dense"), True),
    "dora embedding": (tiny_llama, ("embed_tokens",), True),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**token_batch()).logits.double()


@pytest.mark.parametrize("name", VARIANTS)
def test_folded_weights_compute_what_mlx_does(name: str, tmp_path: Path) -> None:
    make, modules, dora = VARIANTS[name]
    base = make()
    tensors = random_adapter(base, modules, dora=dora)
    folder = write_adapter(tmp_path / "adapter", tensors, "dora" if dora else "lora")
    expected = logits(adapted(base, tensors))
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    torch.testing.assert_close(logits(merge(base, [folder])), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_is_not_divided_by_the_rank(tmp_path: Path) -> None:
    base = tiny_llama()
    tensors = random_adapter(base, ATTENTION)
    folder = write_adapter(tmp_path / "adapter", tensors)
    expert = open_expert(folder, base)
    assert (expert.format, expert.base_checked) == ("mlx", "nothing")
    for name in expert.vector:
        delta = expert.vector[name]
        assert isinstance(delta, LowRank)
        assert delta.rank() == 3
        a, b = (tensors[name.removesuffix("weight") + f"lora_{side}"].double() for side in "ab")
        exact = SCALE * (a @ b).T
        torch.testing.assert_close((delta.B @ delta.A).double(), exact, rtol=1e-5, atol=1e-6)


def test_a_full_adapter_holds_whole_parameters(tmp_path: Path) -> None:
    base, trained = tiny_llama(), perturb(tiny_llama(), 1)
    last = {n: t.detach().clone() for n, t in trained.named_parameters() if ".layers.1." in n}
    folder = write_adapter(tmp_path / "adapter", last, "full")
    vector = open_expert(folder, base).vector
    assert set(vector) == set(last)
    merged = merge(base, [folder]).state_dict()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(merged[name], last.get(name, value), rtol=1e-6, atol=1e-7)


def test_tied_embeddings_act_in_both_places(tmp_path: Path) -> None:
    """MLX's adapted embedding serves as head as well, so one weight acts as both."""
    base = tiny_gpt2()
    tensors = random_adapter(base, ("wte",))
    folder = write_adapter(tmp_path / "adapter", tensors)
    merged = merge(base, [folder])
    a, b = tensors["transformer.wte.lora_a"], tensors["transformer.wte.lora_b"]
    expected = tiny_gpt2()
    with torch.no_grad():
        expected.transformer.wte.weight += SCALE * a @ b
    torch.testing.assert_close(logits(merged), logits(expected), rtol=1e-5, atol=1e-5)
    assert merged.lm_head.weight is merged.transformer.wte.weight


def test_training_on_quantised_weights_is_noted(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", random_adapter(tiny_llama(), ATTENTION), model="mlx-community/Llama-4bit"
    )
    (note,) = open_expert(folder, tiny_llama()).notes
    assert "quantised mlx-community/Llama-4bit" in note


def test_an_old_configuration_with_alpha_is_ambiguous(tmp_path: Path) -> None:
    old = {"rank": 3, "alpha": 16.0, "scale": 10.0}
    folder = write_adapter(tmp_path / "adapter", random_adapter(tiny_llama(), ATTENTION), lora_parameters=old)
    assert len(open_expert(folder, tiny_llama()).vector) == 4  # a current one ignores it
    text = (folder / "adapter_config.json").read_text().replace('"fine_tune_type": "lora", ', "")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UnsupportedError, match="`alpha` counted in some versions"):
        open_expert(folder, tiny_llama())


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_b"), FormatError, r"only one of two LoRA factors: .*q_proj\.A"),
        (lambda t: t.update({f"{Q}.lora_a": torch.ones(9, 3)}), MismatchError, r"do not make its \(32, 32\)"),
        (lambda t: t.update({f"{Q}.m": torch.ones(32)}), MismatchError, "has magnitudes"),
        (lambda t: t.update({f"{Q}.x": torch.ones(1)}), FormatError, r"q_proj\.x"),
        (
            lambda t: t.update({"z.lora_a": torch.ones(4, 3), "z.lora_b": torch.ones(3, 4)}),
            MismatchError,
            r"z\.weight is not in the base",
        ),
        (lambda t: t.clear(), FormatError, "holds no tensors"),
    ],
)
def test_broken_files_are_refused(
    change: Callable[[dict[str, Tensor]], object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", random_adapter(tiny_llama(), ATTENTION))
    tensors = load_file(folder / "adapters.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(error, match=message):
        open_expert(folder, tiny_llama())


def test_unknown_kinds_and_scales_are_refused(tmp_path: Path) -> None:
    tensors = random_adapter(tiny_llama(), ATTENTION)
    with pytest.raises(UnsupportedError, match=r"`fine_tune_type` is 'galore'"):
        open_expert(write_adapter(tmp_path / "a", tensors, "galore"), tiny_llama())
    with pytest.raises(FormatError, match="`scale` is None"):
        open_expert(write_adapter(tmp_path / "b", tensors, lora_parameters={"rank": 3}), tiny_llama())
