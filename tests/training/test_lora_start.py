"""Where adapters begin: merging shared factors is merging changes; OSRM's A against the eigenvalues' closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mergeready import input_grams, open_expert
from mergeready.errors import MismatchError, OptionError, UnsupportedError
from mergeready.experts import Base, LowRank, dense
from mergeready.experts.factors import KroneckerFactors
from mergeready.training import lora_start
from mergeready.training.kronecker import kronecker_factors
from mergeready.training.lora_start import lora_a, share_lora_a, start_orthogonal, weakest_directions
from tests.models import TinyConvNet, tiny_bert, tiny_gpt2, token_batch


def adapter(rank: int = 4, **options: object) -> PeftModel:
    chosen = {"target_modules": ["query", "value"], "lora_alpha": 12} | options
    return get_peft_model(tiny_bert(), LoraConfig(r=rank, **chosen))  # type: ignore[arg-type]


def train(model: PeftModel, seed: int, steps: int = 4) -> PeftModel:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    for step in range(steps):
        optimizer.zero_grad()
        labels = torch.randint(3, (4,))
        model(**token_batch(10 * seed + step), labels=labels).loss.backward()
        optimizer.step()
    return model


def factors(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (m.lora_B["default"].weight.detach(), m.lora_A["default"].weight.detach())
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }


def test_merging_shared_factors_is_merging_changes(tmp_path: Path) -> None:
    base, weights = Base.open(tiny_bert()), [0.3, 1.1, -0.4]
    experts = []
    for seed in range(3):
        model = adapter()
        share_lora_a(model, seed=5)
        torch.manual_seed(seed)  # what else is drawn differs between teams
        experts.append(train(model, seed))
        experts[-1].save_pretrained(tmp_path / str(seed))
    opened = [open_expert(tmp_path / str(seed), base).vector for seed in range(3)]
    assert len(opened[0]) == 4
    for name in opened[0]:
        deltas = [vector[name] for vector in opened]
        assert all(isinstance(delta, LowRank) for delta in deltas)
        summed = sum(w * dense(d).double() for w, d in zip(weights, deltas, strict=True))
        merged_B = sum(w * d.B.double() for w, d in zip(weights, deltas, strict=True))
        torch.testing.assert_close(merged_B @ deltas[0].A.double(), summed, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(d.A, deltas[0].A) for d in deltas)
        assert torch.linalg.matrix_rank(summed, rtol=1e-5) == 4  # of three adapters together
    plain = [factors(train(adapter(), seed)) for seed in range(2)]
    name = next(iter(plain[0]))
    (B1, A1), (B2, A2) = plain[0][name], plain[1][name]
    assert not torch.allclose((B1 + B2) @ (A1 + A2) / 2, B1 @ A1 + B2 @ A2, rtol=0.1)  # what others add up


def test_a_is_a_function_of_seed_name_and_place() -> None:
    whole = lora_a("x", rank=8, inputs=100, seed=3)
    assert torch.equal(lora_a("x", rank=2, inputs=100, seed=3), whole[:2])
    assert not torch.equal(lora_a("y", rank=8, inputs=100, seed=3), whole)
    assert not torch.equal(lora_a("x", rank=8, inputs=100, seed=4), whole)
    many = lora_a("x", rank=64, inputs=400)
    assert float(many.abs().max()) <= 0.05
    assert abs(float(many.std()) - 0.05 / 3**0.5) < 0.001
    assert abs(float(many.mean())) < 0.001


def test_teams_with_another_model_class_get_the_same_a_by_the_base_s_names() -> None:
    base = tiny_bert()
    inner = get_peft_model(tiny_bert().bert, LoraConfig(r=4, target_modules=["query"]))
    outer = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"]))
    first, second = share_lora_a(inner, base=base.bert), share_lora_a(outer, base=base.bert)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(A.requires_grad for A in first.values())


def test_the_model_is_the_same_and_only_b_trains() -> None:
    model = adapter()
    with torch.no_grad():
        before = model(**token_batch()).logits
        share_lora_a(model)
        assert torch.equal(model(**token_batch()).logits, before)
    start = factors(model)
    kept = {name: A.clone() for name, (_, A) in start.items()}
    after = factors(train(model, 1))
    assert all(torch.equal(kept[name], A) for name, (_, A) in after.items())
    assert all(bool(B.any()) for B, _ in after.values())


@pytest.mark.parametrize("kind", ["grams", "factors", "file"])
def test_osrm_sees_what_the_smallest_eigenvalues_say(kind: str, tmp_path: Path) -> None:
    base = tiny_bert()
    peers, exact = [], []
    for seed in (1, 2):
        grams = input_grams(
            base, [token_batch(seed, count=1)], base=base
        )  # 12 inputs: 20 of 32 directions are free
        exact.append(grams)
        if kind == "grams":
            peers.append(grams)
        else:
            made = kronecker_factors(base, [token_batch(seed, count=1)], base=base)
            peers.append(made if kind == "factors" else made.save(tmp_path / f"{seed}.factors.safetensors"))
    model = adapter(rank=12, target_modules=["query"])
    seen = start_orthogonal(model, peers)
    for name, A in zip(seen, (A for _, A in factors(model).values()), strict=True):
        total = sum(gram.read(name).double() for gram in exact)
        values = torch.linalg.eigvalsh(total)
        smallest = values[:12].sum() / total.trace()
        assert abs(seen[name] - float(smallest)) < 1e-5
        torch.testing.assert_close(A @ A.T, torch.eye(12), rtol=1e-4, atol=1e-5)
        random = torch.linalg.qr(torch.randn(32, 12, dtype=torch.float64)).Q.T
        assert float(((random @ total) * random).sum() / total.trace()) > 10 * seen[name]


def test_osrm_annihilates_inputs_that_leave_room() -> None:
    base = tiny_bert()
    batch = token_batch(1, count=1)
    model = adapter(rank=8, target_modules=["query"])
    start_orthogonal(model, [input_grams(base, [batch], base=base)], freeze=True)
    with torch.no_grad():
        hidden = base.bert.embeddings(input_ids=batch["input_ids"])[0]
    A = factors(model)["base_model.model.bert.encoder.layer.0.attention.self.query"][1]
    assert float((hidden @ A.T).norm() / hidden.norm()) < 1e-4
    trained = train(model, 2)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query"
    B, kept = factors(trained)[name]
    assert torch.equal(kept, A)
    assert float((hidden @ (B @ kept).T).norm()) < 1e-3 * float(hidden.norm() * (B @ kept).norm())


def test_adapters_that_began_so_still_load(tmp_path: Path) -> None:
    model = adapter()
    start_orthogonal(model, [input_grams(tiny_bert(), [token_batch()], base=tiny_bert())])
    train(model, 3).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**token_batch()).logits, model.eval()(**token_batch()).logits)


def test_what_peers_say_is_read_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of all peers at once would be larger than the model."""
    base = tiny_bert()
    peers = [kronecker_factors(base, [token_batch(seed)], base=base) for seed in (1, 2)]
    model, read, started = adapter(), [], []
    plain_read, plain_start = KroneckerFactors.read, lora_start.weakest_directions

    def reading(self: KroneckerFactors, name: str) -> tuple[Tensor, Tensor]:
        read.append(name)
        return plain_read(self, name)

    def starting(gram: Tensor, count: int) -> Tensor:
        started.append(len(read))
        return plain_start(gram, count)

    monkeypatch.setattr(KroneckerFactors, "read", reading)
    monkeypatch.setattr(lora_start, "weakest_directions", starting)
    seen = start_orthogonal(model, peers)
    assert read == [name for name in seen for _ in peers]
    assert started == [2, 4, 6, 8]


def test_layers_stored_transposed() -> None:
    base = tiny_gpt2()
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    seen = start_orthogonal(model, [input_grams(base, [token_batch()], base=base)])
    assert list(seen) == [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]
    assert all(value < 0.2 for value in seen.values())


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no LoRA adapter"):
        share_lora_a(tiny_bert())
    with pytest.raises(OptionError, match="trained already"):
        share_lora_a(train(adapter(), 1))
    with pytest.raises(UnsupportedError, match="word_embeddings"):
        share_lora_a(adapter(target_modules=["word_embeddings", "query"]))
    with pytest.raises(UnsupportedError, match="conv"):
        share_lora_a(get_peft_model(TinyConvNet(), LoraConfig(r=2, target_modules=["conv"])))
    with pytest.raises(OptionError, match="nothing to be orthogonal to"):
        start_orthogonal(adapter(), [])
    net = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(MismatchError, match=r"query\.weight in input_grams"):
        start_orthogonal(adapter(), [input_grams(net, [torch.ones(1, 3)])])


def test_weakest_directions_of_a_known_matrix() -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    gram = basis @ torch.diag(torch.tensor([5.0, 0.1, 3.0, 0.2, 9.0, 0.3], dtype=torch.float64)) @ basis.T
    found = weakest_directions(gram, 3)
    torch.testing.assert_close((found @ gram @ found.T).diagonal(), torch.tensor([0.1, 0.2, 0.3]).double())
