from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import kl_div

from mergeready.errors import OptionError
from mergeready.training.batches import Batches, Forward, forward_logits, on_device_of, require_repeatable
from mergeready.training.confidence import class_rows, confidence
from mergeready.training.techniques.moving import moved
from mergeready.training.techniques.norms import scale_change, task_norm
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.weights.guard import untouched
from mergeready.weights.shards import is_sharded, local, reshard

logger = logging.getLogger("mergeready")


@register
@dataclass(frozen=True, kw_only=True)
class DistilledFinish(Technique):
    """At the end of training, bring ‖τ‖ to the peers' and teach the shortened expert what it said before (DisTaC).

    The student begins at ``θ₀ + κ τ`` with ``κ = min(1, norm / ‖τ‖)``, and takes ``steps`` steps of Adam, the learning
    rate falling as a cosine, on ``Tₜ Tₛ · KL(softmax(z / Tₜ) ‖ softmax(ẑ / Tₛ)) + anchor · ‖θ − (θ₀ + κ τ)‖²``, where z
    are the outputs of the expert as training left it and ẑ the student's, on unlabelled inputs. Equal temperatures give
    back the same outputs at the smaller norm; ``Tₛ > Tₜ`` makes the student surer, since it has to say at Tₛ what the
    expert said at Tₜ: its logits grow towards Tₛ / Tₜ times the expert's. Yoshida et al. (arXiv 2508.01148) and their
    code, which uses (10, 10) for norms and (1, 10) for low confidence, 500 steps at 1e-5 with 128 inputs each, anchor
    0.1, and clips gradients besides. Published on eight ViT-B/32 experts: with norms that differ 5 to 7 times, TSV-M
    falls from 83.3 to 72.2, and is mended to 82.9; with unsure experts it falls to 60.7, and is mended to 81.5.

    Task vectors that are too short are left so: to stretch them costs accuracy (see the paper, and ``norm_governor``).
    What the base lacks, such as the task's head, stays as it is. Nothing happens where the norm is small enough and the
    temperatures are equal. Probes and picks are of the expert before; save the model after training.

    Cost: each step is two passes forward and one backward over a batch; three passes over all inputs besides, for the
    figures. In memory: of the weights that train a copy, fp32 copies for Adam (four, with the anchor), and while the
    expert speaks another copy. All of it is freed at the end.

    Attributes:
        inputs: Batches of unlabelled inputs of the task, gone through in turn. Ranks may have shares of their own.
        norm: What ‖τ‖ is brought to; None for the median of the peers'.
        steps: Steps of distillation, at least 1.
        lr: Learning rate of the first step, positive.
        teacher_temperature: Tₜ, positive.
        student_temperature: Tₛ, positive.
        anchor: Weight of the distance to where the student begins, at least 0; a sum over the weights that train, and
            for LoRA over its factors.
        forward: Gives the logits of a batch.

    Example:
        >>> DistilledFinish(inputs=[torch.ones(8, 3)], norm=2.0, teacher_temperature=1.0).student_temperature
        10.0
    """

    name: ClassVar[str] = "distilled_finish"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.END})

    inputs: Batches
    norm: float | None = None
    steps: int = 500
    lr: float = 1e-5
    teacher_temperature: float = 10.0
    student_temperature: float = 10.0
    anchor: float = 0.1
    forward: Forward | None = None

    def __post_init__(self) -> None:
        positive: dict[str, float | None] = {
            "norm": self.norm,
            "lr": self.lr,
            "teacher_temperature": self.teacher_temperature,
            "student_temperature": self.student_temperature,
        }
        problems = [
            f"`{name}` must be positive, not {value}"
            for name, value in positive.items()
            if value is not None and not 0 < value < math.inf
        ]
        if self.steps < 1:
            problems.append(f"`steps` must be at least 1, not {self.steps}")
        if not 0 <= self.anchor < math.inf:
            problems.append(f"`anchor` must be a number of at least 0, not {self.anchor}")
        if problems:
            raise OptionError("; ".join(problems) + ".")
        if isinstance(self.inputs, Tensor | Mapping | str):
            raise OptionError("`inputs` must be a list of batches, or a DataLoader.")
        require_repeatable(self.inputs)

    @property
    def keeps_outputs(self) -> bool:
        """Whether the student is to say what the expert says, and no surer."""
        return self.teacher_temperature == self.student_temperature

    def conflict(self, other: Technique) -> str | None:
        if Touch.WEIGHTS in other.touches and other.name != "norm_governor":
            return "steps of distillation would undo what the other keeps the weights to"
        return None

    def begin(self, run: TechniqueRun) -> Running:
        norms = [peer.norm for peer in run.peers] + [peer.fingerprint.norm for peer in run.sketched]
        if self.norm is None and not norms and self.keeps_outputs:
            raise OptionError(
                "distilled_finish needs `norm`, or peers whose norms to keep to, or two different temperatures."
            )
        target = self.norm if self.norm is not None else statistics.median(norms) if norms else math.inf
        return _Distillation(self, run, target)


class _Distillation(Running):
    def __init__(self, settings: DistilledFinish, run: TechniqueRun, target: float) -> None:
        self._settings, self._run, self._target = settings, run, target
        self._forward = settings.forward or forward_logits
        _ = run.weights  # says at the start what cannot be served
        self._figures: dict[str, float] = {}

    def scalars(self) -> Mapping[str, float]:
        return self._figures

    def finish(self) -> None:
        run, settings = self._run, self._settings
        before = task_norm(run)
        factor = min(1.0, self._target / before) if before > 0 else 1.0
        if factor == 1 and settings.keeps_outputs:
            logger.info("distilled_finish: ‖τ‖ is %.4g, which needs no shortening.", before)
            return
        parameters = list({id(p): p for weight in run.weights.values() for p in weight.parameters}.values())
        expert = [(local(p), local(p).clone()) for p in parameters]
        figures = {"norm_before": before, "confidence_before": self._confidence()}
        try:
            scale_change(run.weights.values(), factor)
            self._distil(parameters, expert)
        except BaseException:
            reshard(run.live.model)
            with torch.no_grad():
                for target, own in expert:
                    target.copy_(own)
            raise
        figures |= {
            "norm": task_norm(run),
            "confidence": self._confidence(),
            "agreement": self._agreement(expert),
        }
        self._figures = figures
        logger.info(
            "distilled_finish: ‖τ‖ %(norm_before).4g → %(norm).4g, confidence %(confidence_before).3f → "
            "%(confidence).3f, %(agreement).1f%% of predictions as before.",
            figures | {"agreement": 100 * figures["agreement"]},
        )

    def _distil(self, parameters: list[nn.Parameter], expert: list[tuple[Tensor, Tensor]]) -> None:
        settings, model = self._settings, self._run.live.model
        # Adam works on fp32 copies of this rank's shards: 16-bit weights would swallow its steps.
        finer = [local(p).float().clone().requires_grad_() for p in parameters]
        start = [value.detach().clone() for value in finer]
        optimizer = torch.optim.AdamW(finer, lr=settings.lr, weight_decay=0.0)
        batches = self._batches()
        with untouched(model, {}), torch.enable_grad():
            model.eval()
            for step in range(settings.steps):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
                self._backward(next(batches), expert)
                for parameter, value, origin in zip(parameters, finer, start, strict=True):
                    gradient = self._gradient(parameter)
                    value.grad = gradient.add_(value.detach() - origin, alpha=2 * settings.anchor)
                _clear(model)
                optimizer.step()
                with torch.no_grad():
                    for parameter, value in zip(parameters, finer, strict=True):
                        local(parameter).copy_(value)
        reshard(model)

    def _backward(self, batch: Any, expert: list[tuple[Tensor, Tensor]]) -> None:
        settings, model = self._settings, self._run.live.model
        with torch.no_grad(), moved(model, expert):
            said = class_rows(self._forward(model, batch), batch) / settings.teacher_temperature
        _clear(model)
        says = class_rows(self._forward(model, batch), batch) / settings.student_temperature
        distance = kl_div(says.log_softmax(-1), said.log_softmax(-1), reduction="batchmean", log_target=True)
        (distance * settings.teacher_temperature * settings.student_temperature).backward()  # type: ignore[no-untyped-call]

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of the gradient, averaged over ranks, fp32; FSDP2 has averaged that of shards."""
        own = parameter.grad
        gradient = torch.zeros_like(local(parameter)) if own is None else local(own)
        gradient = gradient.float()
        if self._run.ranks.size > 1 and not is_sharded(parameter):
            dist.all_reduce(gradient)
            gradient /= self._run.ranks.size
        return gradient

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from on_device_of(self._run.live.model, self._settings.inputs)

    def _confidence(self) -> float:
        found = confidence(self._run.live.model, self._settings.inputs, forward=self._settings.forward).mean
        return _mean(self._run.ranks.each(found))

    @torch.no_grad()
    def _agreement(self, expert: list[tuple[Tensor, Tensor]]) -> float:
        """The share of predictions that are those of the expert."""
        model, same, count = self._run.live.model, 0, 0
        with untouched(model, {}):
            model.eval()
            for batch in on_device_of(model, self._settings.inputs):
                says = class_rows(self._forward(model, batch), batch).argmax(-1)
                with moved(model, expert):
                    said = class_rows(self._forward(model, batch), batch).argmax(-1)
                same, count = same + int((says == said).sum()), count + len(said)
        return _mean(self._run.ranks.each(same / max(count, 1)))


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
