from __future__ import annotations

from dataclasses import dataclass

from mergeready.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How long and how carefully the demo runs.

    Attributes:
        steps: Training steps of each expert, and of the joint model for each task.
        batch_size: Examples a step.
        learning_rate: Learning rate of AdamW, constant: a schedule that decays to zero would itself end training.
        probe_first: First step that is probed.
        probe_every: Steps between probes after the geometric start.
        patience: Probes without improvement of the merged metric before a run is stopped.
        examples: Most examples of each split that are used; None for all.
        probe_examples: Validation examples of each task that probes use; all of them tune the final scales.
        methods: Merge methods that are probed and compared.
        joint: Whether to train one model on all tasks as an upper bound.
        seed: Seed of everything.
    """

    steps: int = 160
    batch_size: int = 16
    learning_rate: float = 3e-4
    probe_first: int = 40
    probe_every: int = 40
    patience: int = 3
    examples: int | None = None
    probe_examples: int = 120
    methods: tuple[str, ...] = ("task_arithmetic", "ties")
    joint: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise OptionError(f"`steps` must be at least 2, not {self.steps}.")

    @classmethod
    def quick(cls, *, joint: bool = False, seed: int = 0) -> DemoSettings:
        """A smoke run: everything happens, nothing is learned."""
        return cls(steps=4, probe_first=1, probe_every=2, patience=1, examples=8, joint=joint, seed=seed)
