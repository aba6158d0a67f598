"""What every merge must satisfy, for adapters of AdapterHub and MLX; for PEFT's and full models see test_invariants.

Expected logits are not ours: AdapterHub's were computed by its library, MLX's by its formulas in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergeready.merging import MergeMethod, make_method, merge, merge_folders
from tests.experts import test_adapterhub as hub
from tests.experts import test_mlx as mlx
from tests.experts.mlx_files import adapted as mlx_adapted
from tests.experts.mlx_files import random_adapter, write_adapter
from tests.merging.worlds import tensors_of
from tests.models import token_batch

LINEAR = [make_method("average"), make_method("task_arithmetic")]
WHOLE = [*LINEAR, make_method("ties", density=1.0)]
SYMMETRIC = [make_method("task_arithmetic"), make_method("ties", density=0.25)]


def each(methods: list[MergeMethod]) -> Callable[..., object]:
    return pytest.mark.parametrize("method", methods, ids=lambda m: "-".join(map(str, m.describe().values())))


@dataclass
class Experts:
    """Two adapters of one base, and what their own libraries compute with each."""

    base: nn.Module
    folders: list[Path]
    logits: list[Tensor]
    ids: Tensor

    def compute(self, model: nn.Module) -> Tensor:
        return hub.logits(model, self.ids).double()

    def computes(self, model: nn.Module, expected: Tensor) -> None:
        torch.testing.assert_close(self.compute(model), expected.double(), rtol=5e-5, atol=5e-5)


CASES = [f"adapterhub {folder.parent.name} {folder.name}" for folder in hub.VARIANTS]
CASES += [f"mlx {name}" for name in mlx.VARIANTS]


@pytest.fixture(scope="module", params=CASES)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experts:
    library, _, case = request.param.partition(" ")
    if library == "mlx":
        make, modules, dora = mlx.VARIANTS[case]
        base, root = make(), tmp_path_factory.mktemp("mlx")
        tensors = [random_adapter(base, modules, dora=dora, seed=seed) for seed in (1, 2)]
        folders = [write_adapter(root / str(i), t, "dora" if dora else "lora") for i, t in enumerate(tensors)]
        logits = [mlx.logits(mlx_adapted(base, t)) for t in tensors]
        return Experts(base, folders, logits, token_batch()["input_ids"])
    folder = hub.GOLDENS.joinpath(*case.split())
    other = next(f for f in hub.VARIANTS if f.parent == folder.parent and f != folder)
    ids = hub.golden(folder)[0]
    return Experts(hub.base_of(folder), [folder, other], [hub.golden(f)[1] for f in (folder, other)], ids)


@each(WHOLE)
def test_identity_and_one_hot(experts: Experts, method: MergeMethod) -> None:
    experts.computes(merge(experts.base, experts.folders[:1], method, weights=[1.0]), experts.logits[0])
    for weights, expected in zip(([1.0, 0.0], [0.0, 1.0]), experts.logits, strict=True):
        experts.computes(merge(experts.base, experts.folders, method, weights=weights), expected)


@each(SYMMETRIC)
def test_twins_order_and_negation(experts: Experts, method: MergeMethod) -> None:
    a, b = experts.folders
    twins = experts.compute(merge(experts.base, [a, a], method, weights=[0.5, 0.5]))
    alone = merge(experts.base, [a], method, weights=[1.0])
    experts.computes(alone, twins)
    straight = experts.compute(merge(experts.base, [a, b], method, weights=[0.5, 0.75]))
    experts.computes(merge(experts.base, [b, a], method, weights=[0.75, 0.5]), straight)
    gone = merge(experts.base, [a, a], method, weights=[1.0, -1.0])
    assert torch.equal(experts.compute(gone), experts.compute(experts.base))


def test_linear_in_the_weights(experts: Experts) -> None:
    first, second, together = (
        dict(merge(experts.base, experts.folders, weights=w).named_parameters())
        for w in ([1.0, 0.5], [-0.5, 0.25], [0.5, 0.75])
    )
    for name, start in experts.base.named_parameters():
        both = first[name].double() + second[name].double() - start.double()
        torch.testing.assert_close(together[name].double(), both, rtol=1e-5, atol=1e-5)


def test_written_and_read(experts: Experts, tmp_path: Path) -> None:
    out = merge_folders(experts.base, experts.folders[:1], tmp_path / "out")
    model = copy.deepcopy(experts.base)
    assert not model.load_state_dict(tensors_of(out), strict=False).unexpected_keys
    experts.computes(model, experts.logits[0])
