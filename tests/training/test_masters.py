"""Wherever a training keeps fp32 copies of its 16-bit weights, the task vector is that of the copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergeready import Monitor, NormBudget, Probe, Schedule
from mergeready.errors import MismatchError
from mergeready.experts import Base, LiveExpert
from mergeready.training.history import History
from mergeready.training.masters import Masters
from mergeready.training.measure import measure
from tests.ranks import run_ranks
from tests.sharded import adapter, spread
from tests.training.small import Evaluation, Net, equal, examples, save, state_of

DTYPES = (torch.bfloat16, torch.float16)


class Rounding(torch.optim.Optimizer):
    """Plain descent on fp32 copies, which are rounded into the parameters: what 16-bit optimizers have in common."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.05, keep: str = "master_param") -> None:
        super().__init__(params, {"lr": lr})
        self.keep = keep

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "exact" not in state:
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)  # of the shape, and fp32
                    state["exact"] = p.detach().float()
                state["exact"] -= group["lr"] * p.grad.float()
                state["exp_avg"].lerp_(p.grad.float(), 0.1)
                p.copy_(state["exact"])
                self._note(p, state)

    def _note(self, p: Tensor, state: dict[str, Any]) -> None:
        exact = state["exact"]
        if self.keep == "kahan_comp":
            state["kahan_comp"] = (exact - p.float()).to(p.dtype)
        elif self.keep == "nothing":
            del state["exact"]


class Kahan(torch.optim.Optimizer):
    """Descent that keeps what rounding left over, in 16 bits: Kahan summation, as torch-optimi and torchdistx do it."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.05, name: str = "kahan_comp") -> None:
        super().__init__(params, {"lr": lr})
        self.name = name

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                left = self.state[p].setdefault(self.name, torch.zeros_like(p))
                left.add_(p.grad, alpha=-group["lr"])
                before = p.clone()
                p.add_(left)
                left.add_(before - p)


def trained(
    model: nn.Module, optimizer: Any, steps: int = 3, after: Callable[[int], Any] | None = None
) -> None:
    """Steps in the model's own dtype."""
    dtype = next(model.parameters()).dtype
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        x, y = examples(0, step, 16)
        model.zero_grad()
        cross_entropy(model(x.to(dtype)).float(), y).backward()
        optimizer.step()
        if after is not None:
            after(step)


def true_norm(copies: dict[str, Tensor]) -> float:
    start = state_of(Net())
    total = sum(float((copies[name].double() - start[name].double()).square().sum()) for name in start)
    return total**0.5


def found(model: nn.Module, *optimizers: Any, given: Any = None) -> Any:
    live = LiveExpert(model, Base.open(Net()))
    masters = Masters(model, optimizers, given)
    masters.look()
    live.refine(masters.find)
    return measure(live, [], 1, History())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", ["anything", "nothing"])
def test_in_the_optimizers_state(dtype: torch.dtype, keep: str) -> None:
    model = Net().to(dtype)
    optimizer = Rounding(model.parameters(), keep=keep)
    trained(model, optimizer)
    record = found(model, optimizer)
    if keep == "nothing":
        assert record.norm == pytest.approx(true_norm(state_of(model)), rel=1e-6)
        assert record.resolution > 0
        return
    exact = {name: optimizer.state[p]["exact"] for name, p in model.named_parameters()}
    assert record.norm == pytest.approx(true_norm(exact), rel=1e-6)
    assert record.norm != pytest.approx(true_norm(state_of(model)), rel=1e-5)
    assert (record.resolution, record.unchanged) == (None, None)


@pytest.mark.parametrize("name", ["kahan_comp", "compensation"])
def test_what_rounding_left_over(name: str) -> None:
    model = Net().bfloat16()
    optimizer = Kahan(model.parameters(), lr=1e-3, name=name)
    trained(model, optimizer)
    exact = {n: p.float() + optimizer.state[p][name].float() for n, p in model.named_parameters()}
    record = found(model, optimizer)
    assert record.norm == pytest.approx(true_norm(exact), rel=1e-6)
    assert record.norm != pytest.approx(true_norm(state_of(model)), rel=1e-4)
    assert record.resolution is None


@pytest.mark.parametrize("groups", ["one", "by kind", "beside"])
def test_copies_that_the_optimizer_steps(groups: str) -> None:
    """fp32 copies are the optimizer's parameters, whatever their order; or stand in groups of their own."""
    model = Net().bfloat16()
    copies = {name: p.detach().float().requires_grad_() for name, p in model.named_parameters()}
    kinds = [list(copies.values())]
    if groups == "by kind":
        kinds = [[c for c in copies.values() if (c.ndim > 1) == matrix] for matrix in (False, True)]
    optimizer: Any = torch.optim.SGD([{"params": kind} for kind in kinds], lr=0.05)

    class Stepping:
        def step(self) -> None:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    copies[name].grad = p.grad.float()
                optimizer.step()
                for name, p in model.named_parameters():
                    p.copy_(copies[name])

    trained(model, Stepping())
    if groups == "beside":
        optimizer, stepped = torch.optim.SGD(model.parameters()), optimizer
        optimizer.param_groups_master = stepped.param_groups
    assert found(model, optimizer).norm == pytest.approx(true_norm(copies), rel=1e-6)


@pytest.mark.parametrize("kind", ["mapping", "function"])
def test_given_ones(kind: str) -> None:
    model = Net().bfloat16()
    optimizer = Rounding(model.parameters())
    trained(model, optimizer)
    exact = {name: optimizer.state[p]["exact"] for name, p in model.named_parameters()}
    given: Any = exact if kind == "mapping" else lambda: exact
    assert found(model, given=given).norm == pytest.approx(true_norm(exact), rel=1e-6)


def test_given_ones_that_do_not_fit_are_all_named() -> None:
    model = Net().bfloat16()
    given = {"head.bias": torch.zeros(4), "tail.bias": torch.zeros(3)}
    with pytest.raises(MismatchError, match=r"no 16-bit parameter .*head\.bias, tail\.bias"):
        Masters(model, [], given).look()
    with pytest.raises(MismatchError, match=r"head\.bias"):
        Masters(Net(), [], {"head.bias": torch.zeros(3)}).look()  # is in fp32 itself


def test_given_ones_that_are_behind_are_refused() -> None:
    model = Net().bfloat16()
    given = {name: p.detach().float() for name, p in model.named_parameters()}
    masters = Masters(model, [], given)
    masters.look()
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(MismatchError, match=r"differ by more than rounding: head\.bias\. Round"):
        masters.look()


def test_wrappers_are_looked_through() -> None:
    model = Net().bfloat16()
    optimizer = Rounding(model.parameters())
    prepared = Accelerator(cpu=True).prepare(optimizer)
    trained(model, optimizer)
    assert found(model, prepared).norm == found(model, optimizer).norm
    assert found(model, prepared).resolution is None


def test_nothing_else_is_taken_for_a_copy() -> None:
    """Moments have the shape of the parameter too."""
    model = Net().bfloat16()
    optimizer = Rounding(model.parameters(), keep="nothing")
    trained(model, optimizer)
    masters = Masters(model, [optimizer])
    masters.look()
    assert all(masters.find(name, p) is None for name, p in model.named_parameters())


def test_a_copy_that_is_replaced_is_found_again() -> None:
    model = Net().bfloat16()
    optimizer = Rounding(model.parameters())
    trained(model, optimizer)
    masters = Masters(model, [optimizer])
    masters.look()
    assert masters.find("head.bias", model.head.bias) is not None
    with torch.no_grad():
        model.head.bias += 1
    optimizer.state[model.head.bias]["exact"] = model.head.bias.detach().float() + 1e-6
    [copy] = masters.find("head.bias", model.head.bias) or []
    assert copy is optimizer.state[model.head.bias]["exact"]


def test_a_copy_that_is_replaced_by_a_finer_step_is_found_too() -> None:
    """Steps too small to be seen in 16 bits leave the copy of last time as near as the new one."""
    model = Net().bfloat16()
    optimizer = torch.optim.SGD(model.parameters())
    bias = model.head.bias
    kept, stepped = bias.detach().float(), model.embed.bias.detach().float()
    masters = Masters(model, [optimizer])
    for _ in range(3):
        kept, stepped = kept * (1 + 1e-5), stepped * (1 + 1e-5)
        optimizer.state[bias]["exact"] = kept
        optimizer.param_groups_master = [{"params": [torch.zeros(16), stepped]}]
        masters.look()
        assert (masters.find("head.bias", bias) or [None])[0] is kept
        assert (masters.find("embed.bias", model.embed.bias) or [None])[0] is stepped


def test_an_adapter_in_16_bits() -> None:
    model: Any = adapter(Net())
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16().float()
    exact = measure(LiveExpert(model, None), [], 1, History())
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.bfloat16()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    live = LiveExpert(model, None)
    alone = measure(live, [], 1, History())
    assert alone.norm == pytest.approx(exact.norm, rel=1e-6)
    assert 0.0005 < alone.resolution < 0.01  # a share of the delta
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["master"] = p.detach().float()
    masters = Masters(model, [optimizer])
    masters.look()
    live.refine(masters.find)
    assert measure(live, [], 1, History()).resolution is None


@pytest.mark.parametrize("keep", ["anything", "nothing"])
def test_a_run(tmp_path: Path, keep: str) -> None:
    """Copies appear with the first step, after the monitor started; probes leave them alone."""
    model, base = Net().bfloat16(), save(Net(), tmp_path / "base")
    optimizer = Rounding(model.parameters(), keep=keep)
    inner = Evaluation(0)

    def evaluate(model: nn.Module) -> Any:
        dtype, wanted = next(model.parameters()).dtype, inner._x.dtype
        inner._x = inner._x.to(dtype)
        values = {name: value.float() for name, value in inner(model).items()}
        inner._x = inner._x.to(wanted)
        return values

    monitor = Monitor(
        base=base,
        measure=Schedule(every=1),
        probe=Probe(evaluate=evaluate, scales=(0.5,), max_evaluations=1, schedule=Schedule(every=2)),
        stop=NormBudget(max_norm=100),
    )
    monitor.start(model, tmp_path, optimizers=[optimizer])
    trained(model, optimizer, after=monitor.on_step)
    exact = {name: optimizer.state[p].get("exact", p.detach()) for name, p in model.named_parameters()}
    assert equal({n: e.bfloat16() for n, e in exact.items()}, state_of(model))
    record = monitor.history.metrics[-1]
    assert record.norm == pytest.approx(true_norm(exact), rel=1e-6)
    assert (record.resolution is None) == (keep == "anything")


def test_a_task_vector_that_is_rounding_is_said_to_be_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A base in fp32 that was loaded in 16 bits: all that there is to measure is what that rounded away."""
    monitor = Monitor(base=save(Net(), tmp_path / "base"), measure=Schedule(every=1))
    monitor.start(Net().bfloat16(), tmp_path)
    for step in (1, 2):
        monitor.on_step(step)
        assert (
            monitor.history.metrics[-1].resolution or 0
        ) > 1  # numbers that 16 bits hold exactly count too
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "rounding alone" in warning
    assert "step 1" in warning


def sharded(folder: Path) -> tuple[float, float | None, float]:
    """Columns of a matrix are gathered to be measured, with their copies."""
    model = spread(Net().bfloat16(), "columns")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for p in model.parameters():
        optimizer.state[p]["master"] = p.detach().float() * (1 + 2**-12)
    monitor = Monitor(base=folder / "base", measure=Schedule(every=1))
    monitor.start(model, folder / "run", optimizers=[optimizer])
    monitor.on_step(1)
    with torch.no_grad():
        merged = float(sum(p.full_tensor().float().square().sum() for p in model.parameters()))
    return monitor.history.metrics[-1].norm, monitor.history.metrics[-1].resolution, merged


def test_copies_of_sharded_parameters(tmp_path: Path) -> None:
    save(Net(), tmp_path / "base")
    start = state_of(Net())
    exact = true_norm({name: value.bfloat16().float() * (1 + 2**-12) for name, value in start.items()})
    for norm, resolution, _ in run_ranks(sharded, 2, tmp_path):
        assert norm == pytest.approx(exact, rel=1e-6)
        assert resolution is None
