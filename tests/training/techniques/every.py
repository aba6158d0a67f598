"""Every technique in a short run of the small net: with what model, peers and settings, and how it is laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from mergeready import (
    DistilledFinish,
    DriftPenalty,
    JacobianPenalty,
    KroneckerFactors,
    KroneckerFilter,
    KroneckerPenalty,
    LoraOverlap,
    NormGovernor,
    OrthogonalStart,
    Peer,
    PeerProjection,
    PlateauSchedule,
    Probe,
    Schedule,
    SharedLoraA,
    SharpnessAware,
    SimulatedMerge,
    SparseMask,
    TrainOnly,
    WeightAverage,
    kronecker_factors,
    lowest_fisher,
    share_lora_a,
    start_orthogonal,
    train_only,
)
from mergeready.training.techniques.technique import Technique
from tests.sharded import adapter
from tests.training.small import Net, examples, expert
from tests.training.techniques.runs import net


@cache
def factors() -> KroneckerFactors:
    return kronecker_factors(Net(), [examples(2, 0, 24)[0]], base=Net())


@cache
def masks() -> dict[str, torch.Tensor]:
    return lowest_fisher(Net(), [examples(1, 0, 16)[0]], share=0.3, rounds=1)


def moved_adapter() -> nn.Module:
    return adapter(net())


def fresh_adapter() -> nn.Module:
    """It changes nothing yet."""
    model = moved_adapter()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    return model


@dataclass(frozen=True)
class Case:
    """A technique in a run.

    Attributes:
        technique: What is used.
        model: Makes the model, whose base is ``Net()``.
        peers: The run's peers.
        options: More arguments of the monitor.
        before_wrapping: What stands for it under DDP, which has to know beforehand what trains.
        refused_sharded: Part of the message under FSDP2; None where it works.
    """

    technique: Technique
    model: Callable[[], nn.Module] = net
    peers: Sequence[Any] = ()
    options: dict[str, Any] = field(default_factory=dict)
    before_wrapping: Callable[[nn.Module], object] | None = None
    refused_sharded: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The monitor's arguments, but the technique."""
        return {"base": Net().state_dict(), "peers": list(self.peers)} | self.options


PEERS = [Peer(expert(task).state_dict(), name=f"peer {task}") for task in (2, 3)]
INPUTS = [examples(2, 0, 8)[0]]
STEADY = Probe(
    evaluate=lambda model: {"accuracy": 0.5}, scales=(0.5,), schedule=Schedule(every=1, geometric=False)
)
CASES: dict[str, Case] = {
    "distilled_finish": Case(DistilledFinish(inputs=INPUTS, norm=0.2, steps=3, lr=1e-3)),
    "distilled_finish, lora": Case(
        DistilledFinish(inputs=INPUTS, steps=3, lr=1e-3, teacher_temperature=2.0), moved_adapter
    ),
    "drift_penalty": Case(DriftPenalty(strength=0.5)),
    "drift_penalty, lora": Case(DriftPenalty(strength=0.5), moved_adapter),
    "jacobian_penalty": Case(
        JacobianPenalty(inputs=[INPUTS], strength=0.5), refused_sharded="differentiates in forward mode"
    ),
    "jacobian_penalty, lora": Case(
        JacobianPenalty(inputs=[INPUTS], strength=0.5), moved_adapter, refused_sharded="in forward mode"
    ),
    "kronecker_filter": Case(KroneckerFilter(factors=[factors()], strength=3.0, every=2)),
    "kronecker_penalty": Case(KroneckerPenalty(factors=[factors()], strength=3.0, every=1)),
    "kronecker_penalty, lora": Case(
        KroneckerPenalty(factors=[factors()], strength=3.0, every=1), moved_adapter
    ),
    "lora_overlap": Case(LoraOverlap(strength=0.1), moved_adapter, PEERS),
    "norm_governor": Case(NormGovernor(max_norm=0.3)),
    "norm_governor, lora": Case(NormGovernor(max_norm=0.2), moved_adapter),
    "orthogonal_start": Case(OrthogonalStart(inputs=[factors()]), fresh_adapter),
    "orthogonal_start, frozen": Case(
        OrthogonalStart(inputs=[factors()], freeze=True),
        fresh_adapter,
        before_wrapping=lambda model: start_orthogonal(model, [factors()], freeze=True),
    ),
    "peer_projection": Case(PeerProjection(rank=2, sides="either"), peers=PEERS),
    "peer_projection, lora": Case(PeerProjection(rank=1, sides="either"), moved_adapter, PEERS),
    "plateau_schedule": Case(
        PlateauSchedule(patience=1, factor=0.5, reductions=2), options={"probe": STEADY, "peers": PEERS[:1]}
    ),
    "shared_lora_a": Case(
        SharedLoraA(seed=7), fresh_adapter, before_wrapping=lambda model: share_lora_a(model, seed=7)
    ),
    "sharpness_aware": Case(SharpnessAware(radius=0.1)),
    "sharpness_aware, lora": Case(SharpnessAware(radius=0.1), moved_adapter),
    "sharpness_aware, adaptive": Case(SharpnessAware(radius=0.5, adaptive=True, every=2)),
    "simulated_merge": Case(SimulatedMerge(every=2, noise=0.05)),
    "simulated_merge, lora": Case(SimulatedMerge(every=2), moved_adapter, PEERS),
    "sparse_mask": Case(
        SparseMask(batches=[examples(1, 0, 16)[0]], share=0.3, rounds=1),
        refused_sharded="pass them as `masks`",
    ),
    "sparse_mask, given": Case(SparseMask(masks=masks())),
    "train_only": Case(TrainOnly(keep="last:1"), before_wrapping=lambda model: train_only(model, "last:1")),
    "weight_average": Case(WeightAverage(decay=0.5)),
    "weight_average, last": Case(WeightAverage(kind="last", count=2, every=2, mix=0.5)),
    "weight_average, lora": Case(WeightAverage(decay=0.5, mix=0.5), moved_adapter),
}
OFF: list[Technique] = [
    DriftPenalty(strength=0),
    JacobianPenalty(inputs=[INPUTS], strength=0),
    KroneckerFilter(factors=[factors()], strength=0),
    KroneckerPenalty(factors=[factors()], strength=0),
    LoraOverlap(strength=0),
    SimulatedMerge(every=0),
    SharpnessAware(radius=0),
    WeightAverage(kind="none"),
]
