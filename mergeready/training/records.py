"""What a run writes down, as frozen records that go to JSON and back without loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value, with the number of examples and a 95 % interval where they are known."""

    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task under one merge: the base, the task's own expert, and the merged model.

    ``retention`` is (merged − base) / (expert − base); ``normalised`` is merged / expert.
    """

    base: float
    expert: float
    merged: Estimate
    retention: Estimate | None
    normalised: float | None


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """One merge method at one step, at its best scale.

    Attributes:
        scale: The best scale that was found.
        inside: Whether the optimum lay inside the scales that were tried.
        tried: Pairs of scale and mean metric.
        merged: Mean of the merged metric over tasks.
        retention: Mean retention over tasks where it is defined.
        tasks: Results by task; the run's own task is called ``own``.
    """

    scale: float
    inside: bool
    tried: list[tuple[float, float]]
    merged: float
    retention: float | None
    tasks: dict[str, TaskResult]


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """The first line of a history: what was compared with what.

    Attributes:
        base: Fingerprint of the base.
        peers: Label of each peer to its norm ‖τ‖.
        fingerprints: Peers that are known by fingerprint only: they are measured by estimates, and not merged.
        surrogate: Whether probes use surrogates, since there are no peers that have weights.
        metric: The metric of all probes; None where nothing is probed.
        greater_is_better: Its direction.
        methods: Each probed merge method: its ``label``, its name and parameters. A list, as the first one leads and
            some frameworks sort the keys of what they save.
        references: By task: the base's value, and that of the task's own expert where that is a peer.
        unmerged: Parameters of the model that the base does not have.
        techniques: Name and settings of each technique.
    """

    kind: Literal["start"] = "start"
    step: int
    base: str
    peers: dict[str, float] = field(default_factory=dict)
    fingerprints: list[str] = field(default_factory=list)
    surrogate: bool = False
    metric: str | None = None
    greater_is_better: bool = True
    methods: list[dict[str, Any]] = field(default_factory=list)
    references: dict[str, dict[str, float]] = field(default_factory=dict)
    unmerged: list[str] = field(default_factory=list)
    techniques: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MetricsRecord:
    """How the task vector stands at one step.

    Attributes:
        norm: ‖τ‖ over trained parameters.
        relative_norm: ‖τ‖ / ‖θ₀‖ over trained parameters; None where these are all zero in the base.
        growth: Growth of ‖τ‖ per step since the measurement before.
        groups: ‖τ‖ by group of parameters.
        layers: ‖τ‖ by layer index.
        top_mass: Share of ‖τ‖² in the top 1 % and 10 % of entries.
        cosine: Cosine with each peer.
        sign_conflict: Share of conflicting signs with each peer; 0.5 by chance.
        cosine_error: Standard error of the cosine with each peer that is known by its fingerprint only.
        sign_conflict_error: The same of the sign conflict.
        norm_ratio: Largest over smallest norm among the run and its peers.
        resolution: Norm that rounding alone gives τ, over ‖τ‖, where some weights exist in less than fp32 only; at 1
            or more τ cannot be told from rounding. None where the finest copies are fp32, and while nothing changed.
        unchanged: Share of the entries of such weights that equal the base. None as before, and for adapters.
    """

    kind: Literal["metrics"] = "metrics"
    step: int
    norm: float
    relative_norm: float | None
    growth: float
    groups: dict[str, float]
    layers: dict[int, float]
    top_mass: dict[str, float | None]
    cosine: dict[str, float | None] = field(default_factory=dict)
    sign_conflict: dict[str, float | None] = field(default_factory=dict)
    norm_ratio: float | None = None
    cosine_error: dict[str, float | None] = field(default_factory=dict)
    sign_conflict_error: dict[str, float | None] = field(default_factory=dict)
    resolution: float | None = None
    unchanged: float | None = None


@dataclass(frozen=True, kw_only=True)
class SampledRecord:
    """How the task vector stands at one step, estimated from sampled coordinates.

    They are the same at each step, so the curve of such estimates is smoother than their errors: these are of how far
    the curve as a whole may lie from the exact one.

    Attributes:
        norm: ‖τ‖ over trained parameters.
        norm_error: Its standard error; those of the other figures are called likewise.
        growth: Growth of ``norm`` per step since the estimate before. In proportion off by as much as the norm is.
        cosine: Cosine with each peer; None while τ is zero.
        sign_conflict: Share of conflicting signs with each peer.
    """

    kind: Literal["sampled"] = "sampled"
    step: int
    norm: float
    norm_error: float
    growth: float
    cosine: dict[str, float | None] = field(default_factory=dict)
    cosine_error: dict[str, float | None] = field(default_factory=dict)
    sign_conflict: dict[str, float | None] = field(default_factory=dict)
    sign_conflict_error: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """One probe: the expert as it is, and merged by each method.

    Attributes:
        surrogate: Whether synthetic peers stood in for real ones.
        expert: The expert's own metric.
        merges: Results by label of the merge method.
        alone: Without peers: scale to the metric of the expert alone at that scale.
    """

    kind: Literal["probe"] = "probe"
    step: int
    surrogate: bool
    expert: Estimate
    merges: dict[str, MergeResult]
    alone: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DecisionRecord:
    """A policy's decision to stop."""

    kind: Literal["decision"] = "decision"
    step: int
    reason: str
    acted: bool


@dataclass(frozen=True, kw_only=True)
class ResumeRecord:
    """A run was resumed with other peers or merge methods than before."""

    kind: Literal["resume"] = "resume"
    step: int
    changed: list[str]


Record: TypeAlias = StartRecord | MetricsRecord | SampledRecord | ProbeRecord | DecisionRecord | ResumeRecord

ADAPTER: TypeAdapter[Record] = TypeAdapter(
    Annotated[Record, Field(discriminator="kind")],
)
"""Validates a record from JSON and writes it."""
