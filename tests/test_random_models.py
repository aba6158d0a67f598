"""Models of random modules: task vectors, metrics, fingerprints and merges in place against float64, bits restored."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mergeready.errors import NotTrainedError
from mergeready.experts import Base, LiveExpert, open_expert
from mergeready.merging import MergedInPlace
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.training.history import History
from mergeready.training.measure import measure
from mergeready.training.peers import Peer, open_peers

SIZES = st.integers(1, 5)


class Loose(nn.Module):
    """Parameters that belong to no layer: a number, nothing at all, and a transposed view of other memory."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, columns))
        self.turned = nn.Parameter(torch.randn(columns, rows + 1).t())
        self.register_buffer("offset", torch.randn(rows))


class Tied(nn.Module):
    """An embedding whose matrix is the output layer's as well."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, columns)
        self.out = nn.Linear(columns, rows)
        self.out.weight = self.embed.weight


def module(kind: str, rows: int, columns: int) -> nn.Module:
    made: dict[str, Any] = {
        "linear": lambda: nn.Linear(columns, rows),
        "bare linear": lambda: nn.Linear(columns, rows, bias=False),
        "conv": lambda: nn.Conv2d(columns, rows, 3),
        "conv1d": lambda: Conv1D(rows, columns),
        "embedding": lambda: nn.Embedding(rows, columns, padding_idx=0),
        "layer norm": lambda: nn.LayerNorm(columns),
        "batch norm": lambda: nn.BatchNorm2d(columns),
        "attention": lambda: nn.MultiheadAttention(2 * columns, 2),
        "no parameters": lambda: nn.ReLU(),
        "tied": lambda: Tied(rows, columns),
        "loose": lambda: Loose(rows, columns),
    }
    return made[kind]()


KINDS = [
    "linear", "bare linear", "conv", "conv1d", "embedding", "layer norm", "batch norm", "attention",
    "no parameters", "tied", "loose",
]  # fmt: skip


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A tree of modules in fp32 and bf16, some used twice, some frozen.

    The first layer is always trained, and large enough to tell a relative from a stranger.
    """
    torch.manual_seed(draw(st.integers(0, 999)))
    root = nn.ModuleDict({"first": nn.Linear(8, 8)})
    for index, kind in enumerate(draw(st.lists(st.sampled_from(KINDS), max_size=5))):
        part = module(kind, draw(SIZES), draw(SIZES))
        part.requires_grad_(draw(st.booleans()) or draw(st.booleans()))
        if draw(st.booleans()):
            part = part.to(torch.bfloat16)
        if draw(st.booleans()):
            part = nn.Sequential(part)
        root[f"part{index}"] = part
        if draw(st.integers(0, 4)) == 0:
            root[f"again{index}"] = part
    return root


def moved(model: nn.Module, seed: int) -> nn.Module:
    """A fine-tuned relative: the trained parameters moved, layout and ties kept."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            step = 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.requires_grad:
                parameter += step
    return other


def exact(model: nn.Module, base: nn.Module) -> dict[str, Tensor]:
    """Task vector of the trained parameters in float64."""
    start = dict(base.named_parameters())
    return {
        name: parameter.detach().double() - start[name].detach().double()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([values.reshape(-1) for values in vector.values()])


def state(model: nn.Module) -> list[Any]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [
        (
            name,
            id(tensor),
            tensor.dtype,
            tensor.stride(),
            tensor.requires_grad,
            tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist(),
        )
        for name, tensor in tensors
    ]


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(0, 99))
def test_task_vector_metrics_and_fingerprint_of_any_model(base: nn.Module, seed: int) -> None:
    model, other = moved(base, seed), moved(base, seed + 1)
    expected, theirs = exact(model, base), exact(other, base)
    live = LiveExpert(model, base)
    assert set(live.vector) == set(expected)
    for name, values in expected.items():
        found = live.vector.flat(name, 0, values.numel())
        assert torch.equal(found, values.reshape(-1).float()), name

    own, peer = flat(expected), flat(theirs)
    record = measure(live, open_peers([Peer(other, name="peer")], live.base), 3, History())
    assert record.norm == pytest.approx(float(own.norm()), rel=1e-6)
    start = flat({name: dict(base.named_parameters())[name].detach().double() for name in expected})
    assert record.relative_norm == pytest.approx(float(own.norm() / start.norm()), rel=1e-6)
    assert record.cosine["peer"] == pytest.approx(float(own @ peer / own.norm() / peer.norm()), abs=1e-5)
    both = (own != 0) & (peer != 0)
    conflict = float((own[both].sign() != peer[both].sign()).double().mean())
    found_conflict = record.sign_conflict["peer"]
    assert found_conflict is not None
    assert found_conflict == pytest.approx(conflict, abs=1e-9)
    assert math.hypot(*record.groups.values()) == pytest.approx(record.norm, rel=1e-6)

    sketch = take_fingerprint(live.vector, live.base, budget=10**6)
    changed = {name: values for name, values in expected.items() if float(values.norm()) > 0}
    assert set(sketch.norms) == set(changed)
    for name, values in changed.items():
        assert sketch.norms[name] == pytest.approx(float(values.norm()), rel=1e-6)
        everything = values.reshape(-1).float().bfloat16().float().sort().values
        assert torch.equal(sketch.samples[name].sort().values, everything), name


@settings(max_examples=20, deadline=None)
@given(models(), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0, -0.7]))
def test_a_merge_in_place_holds_the_sum_and_leaves_no_trace(base: nn.Module, seed: int, scale: float) -> None:
    model, other = moved(base, seed), moved(base, seed + 1)
    expected, theirs = exact(model, base), exact(other, base)
    before = state(model)
    with MergedInPlace(model, base, [other], scale=scale):
        start = dict(base.named_parameters())
        for name, parameter in model.named_parameters():
            total = expected[name] + theirs[name] if name in expected else torch.zeros(parameter.shape)
            wanted = start[name].detach().double() + scale * total
            # One rounding to fp32 a step, and one to the parameter's own dtype.
            unit = max(torch.finfo(parameter.dtype).eps, 4 * torch.finfo(torch.float32).eps)
            room = unit * (wanted.abs() + total.abs() + 1e-3)
            assert bool(((parameter.double() - wanted).abs() <= room).all()), name
    assert state(model) == before
    for method in ("ties", "tsv_m"):
        with pytest.raises(ZeroDivisionError), MergedInPlace(model, base, [other], method):
            raise ZeroDivisionError
        assert state(model) == before


@settings(max_examples=10, deadline=None)
@given(models())
def test_an_expert_that_equals_its_base_has_no_fingerprint(base: nn.Module) -> None:
    opened = Base.open(base)
    same = open_expert(copy.deepcopy(base), opened, strict=False)
    with pytest.raises(NotTrainedError):
        take_fingerprint(same.vector, opened)
