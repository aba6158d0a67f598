from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergeready.errors import NonFiniteError, NotTrainedError, OptionError
from mergeready.experts import Base, DeltaTaskVector, Dense, LowRank, open_expert
from mergeready.experts.coordinates import coordinates, projection
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.take_fingerprint import RANK, WIDTH, take_fingerprint
from tests.merging.worlds import adapted
from tests.models import perturb, tiny_bert
from tests.training.small import Net, expert, state_of


def base_of(shapes: dict[str, tuple[int, ...]]) -> Base:
    generator = torch.Generator().manual_seed(0)
    return Base.open({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def vector(base: Base, deltas: dict[str, object]) -> DeltaTaskVector:
    return DeltaTaskVector(deltas, base.source.infos, base.identity, "runs/experts/law/")  # type: ignore[arg-type]


def test_norms_and_samples_are_those_of_the_differences() -> None:
    base, expert = tiny_bert(), perturb(tiny_bert(), 1, 0.02)
    opened = Base.open(base)
    made = take_fingerprint(open_expert(expert, opened).vector, opened, budget=500)
    for (name, old), new in zip(base.named_parameters(), expert.parameters(), strict=True):
        delta = (new.detach().double() - old.detach().double()).flatten()
        assert made.norms[name] == pytest.approx(float(delta.norm()), rel=1e-6)
        picked = delta[coordinates(name, len(delta), len(made.samples[name]))]
        torch.testing.assert_close(made.samples[name].double(), picked, rtol=2**-8, atol=1e-7)


def test_an_adapter_leaves_out_what_it_does_not_touch() -> None:
    base = tiny_bert()
    model = adapted(base, seed=3)
    opened = Base.open(base)
    from mergeready.experts import LiveExpert

    made = take_fingerprint(LiveExpert(model, opened).vector, opened)
    assert made.norms
    assert all("query" in name or "value" in name for name in made.norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_need_no_reading_of_the_base(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of many gigabytes, for an adapter of a few megabytes."""
    from mergeready.experts import LiveExpert

    base = tiny_bert()
    model = adapted(base, seed=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    vector, opened = LiveExpert(model, base).vector, Base.open(base)
    expected = take_fingerprint(vector, opened)
    assert ("resolution" in expected.facts) == (dtype == torch.bfloat16)
    monkeypatch.setattr(opened.source, "read_flat", None)
    assert take_fingerprint(vector, opened).norms == expected.norms


def test_the_budget_is_the_bases_not_the_experts() -> None:
    """Two experts that change different parts hold the same coordinates where both change."""
    base = base_of({"a": (400, 400), "b": (400, 400)})
    change = Dense(torch.ones(400, 400))
    one = take_fingerprint(vector(base, {"a": change}), base, budget=1000)
    two = take_fingerprint(vector(base, {"a": change, "b": change}), base, budget=1000)
    assert len(one.samples["a"]) == len(two.samples["a"]) == 500


def test_unchanged_parameters_are_left_out_and_local_paths_too() -> None:
    base = base_of({"a": (3, 3), "b": (3,)})
    made = take_fingerprint(vector(base, {"a": Dense(torch.ones(3, 3)), "b": Dense(torch.zeros(3))}), base)
    assert list(made.norms) == ["a"]
    assert made.label == "law"


@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (3000, 100)])
@pytest.mark.parametrize("compact", [True, False])
def test_subspaces_are_the_leading_right_singular_vectors(shape: tuple[int, int], compact: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    left = torch.linalg.qr(torch.randn(shape[0], 6, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], 6, generator=generator)).Q
    values = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 0.5])
    delta = (
        LowRank(left * values, right.T.contiguous(), shape) if compact else Dense((left * values) @ right.T)
    )
    base = base_of({"w": shape})
    made = take_fingerprint(vector(base, {"w": delta}), base)
    sketch = made.subspaces["w"]
    assert sketch.shape == (RANK, WIDTH)
    expected = right[:, :RANK].T.double() @ projection("w", shape[1], WIDTH).double()
    # The same span: the sketches' Gram projectors agree, whatever the signs and order of vectors.
    torch.testing.assert_close(gram(sketch), gram(expected), rtol=2e-3, atol=2e-3)


def gram(sketch: Tensor) -> Tensor:
    return sketch.double().T @ sketch.double()


def test_small_and_flat_parameters_have_no_subspace() -> None:
    base = base_of({"w": (80, 80), "small": (80, 20), "flat": (80,), "conv": (80, 80, 3)})
    deltas = {name: Dense(torch.randn(info.shape)) for name, info in base.source.infos.items()}
    assert list(take_fingerprint(vector(base, deltas), base).subspaces) == ["w"]
    assert not take_fingerprint(vector(base, deltas), base, subspaces=False).subspaces


def test_what_cannot_be_is_refused() -> None:
    base = base_of({"a": (3, 3)})
    with pytest.raises(NotTrainedError, match="law"):
        take_fingerprint(vector(base, {"a": Dense(torch.zeros(3, 3))}), base)
    with pytest.raises(NonFiniteError, match="a"):
        take_fingerprint(vector(base, {"a": Dense(torch.full((3, 3), math.nan))}), base)
    with pytest.raises(OptionError, match="budget"):
        take_fingerprint(vector(base, {"a": Dense(torch.ones(3, 3))}), base, budget=0)


def test_size_of_a_file_for_a_billion_parameters() -> None:
    """From shapes alone: 24 layers of a Llama of a billion parameters, at the default budget."""
    from mergeready.experts.coordinates import sample_count
    from mergeready.experts.fingerprint import BUDGET

    wide = {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048), "o": (2048, 2048)}
    wide |= {"gate": (8192, 2048), "up": (8192, 2048), "down": (2048, 8192), "n1": (2048,), "n2": (2048,)}
    shapes = {f"model.layers.{i}.self_attn.{n}_proj.weight": s for i in range(16) for n, s in wide.items()}
    shapes["model.embed_tokens.weight"] = (128256, 2048)
    total = sum(math.prod(s) for s in shapes.values())
    assert total > 1.2e9
    samples = 2 * sum(sample_count(math.prod(s), total, BUDGET) for s in shapes.values())
    sketches = 2 * RANK * WIDTH * sum(len(s) == 2 for s in shapes.values())
    described = sum(len(name) * 2 + 60 for name in shapes) + 8 * len(shapes)
    assert samples + sketches + described < 1_000_000


def test_a_live_model_gives_what_its_file_gives(tmp_path: object) -> None:
    base = tiny_bert()
    expert = perturb(copy.deepcopy(base), 4, 0.02)
    opened = Base.open(base)
    a = take_fingerprint(open_expert(expert, opened).vector, opened)
    b = take_fingerprint(open_expert(dict(expert.state_dict()), opened).vector, opened)
    assert a.norms == b.norms
    assert all(torch.equal(a.samples[n], b.samples[n]) for n in a.samples)


def test_an_expert_in_16_bits_says_what_rounding_left(tmp_path: Path) -> None:
    base, tuned = Net(), expert(1)
    fine = take_fingerprint(open_expert(state_of(tuned), Base.open(base)).vector, Base.open(base))
    assert "resolution" not in fine.facts
    rounded = state_of(tuned.bfloat16())
    made = take_fingerprint(open_expert(rounded, Base.open(base)).vector, Base.open(base), facts={"by": "us"})
    steps = [
        (size.view(torch.int16) + 1).view(size.dtype).double() - size.double()
        for size in (value.abs() for value in rounded.values())
    ]
    expected = math.sqrt(sum(float(step.square().sum()) for step in steps) / 12) / made.norm
    assert made.facts["resolution"] == pytest.approx(expected, rel=1e-5)
    made.save(tmp_path / "rounded.fingerprint.safetensors")
    assert Fingerprint.load(tmp_path / "rounded.fingerprint.safetensors").facts == made.facts
