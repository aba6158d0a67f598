"""What the demo tells its display while it runs."""

from __future__ import annotations

from typing import Protocol

from mergeready.demo.tasks import DemoTask
from mergeready.training.records import ProbeRecord


class Listener(Protocol):
    """Shows the progress of a demo."""

    def expert_started(self, task: DemoTask, steps: int, peers: list[str]) -> None:
        """Training of an expert begins; without peers, its probes use surrogates."""

    def stepped(self, task: DemoTask, step: int) -> None:
        """An optimizer step was taken."""

    def probed(self, task: DemoTask, probe: ProbeRecord) -> None:
        """The expert was probed."""

    def stopped(self, task: DemoTask, step: int, reason: str) -> None:
        """The callback stopped the run; for comparison it goes on from there without being stopped."""

    def expert_finished(self, task: DemoTask) -> None:
        """Training of an expert has ended."""

    def working_on(self, what: str) -> None:
        """Another part of the demo begins."""


class Silent:
    """Shows nothing."""

    def expert_started(self, task: DemoTask, steps: int, peers: list[str]) -> None: ...
    def stepped(self, task: DemoTask, step: int) -> None: ...
    def probed(self, task: DemoTask, probe: ProbeRecord) -> None: ...
    def stopped(self, task: DemoTask, step: int, reason: str) -> None: ...
    def expert_finished(self, task: DemoTask) -> None: ...
    def working_on(self, what: str) -> None: ...
