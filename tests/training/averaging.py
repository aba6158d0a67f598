"""An optimizer that trains other weights than it evaluates."""

from __future__ import annotations

from typing import Any

import torch


class Averaging(torch.optim.SGD):
    """As schedule-free ones: what trains is not what is to be evaluated, and two calls turn one into the other.

    Here, what is to be evaluated lies half way to where training began.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for group in self.param_groups:
            group["training"] = False

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if "start" not in self.state[parameter]:
                self.state[parameter]["start"] = parameter.detach().clone()
        return super().step(closure)

    def train(self) -> None:
        self._turn(training=True)

    def eval(self) -> None:
        self._turn(training=False)

    @torch.no_grad()
    def _turn(self, *, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                for parameter in group["params"]:
                    if "start" in self.state[parameter]:
                        parameter.lerp_(self.state[parameter]["start"], -1.0 if training else 0.5)
