"""How each name in the table of merge methods becomes a merge of the text suite's experts; some need data first.

Data are what a user would have: for ``fisher`` and ``regmean`` each expert's own training examples, for ``adamerging``
the validation examples without their labels, on which the scales of the other methods are tuned as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.suites.backbones import minilm_l6
from benchmarks.suites.heads import pooled, zero_shot_logits
from benchmarks.suites.text import TEXT_SUITE, TextTask, load_text_task
from benchmarks.text_experts import Batches, batches, encode, encoder, head
from mergeready import adamerging, fisher_information, input_grams, regmean_pp
from mergeready.merging import MergeMethod, make_method

EXAMPLES = 128  # training examples an expert that fisher and regmean look at
STEPS, RATE, BATCH = 60, 1e-2, 16  # of adamerging; the authors take 500 smaller steps
MAX_TOKENS = 32

UNTUNED = ("average", "adamerging")
"""Merged at scale 1: a mean is what the name says, and learned coefficients hold their scale."""


@dataclass(frozen=True)
class TextMerge:
    """A method as merges take it.

    Attributes:
        method: The method's name, or the method itself.
        options: Further arguments of the merge.
    """

    method: str | MergeMethod
    options: dict[str, Any] = field(default_factory=dict)


def text_merge(name: str, experts: Sequence[Path], tasks: Sequence[TextTask], seed: int) -> TextMerge:
    """What a name of the table stands for, with the data that it needs collected.

    Args:
        name: A registered method; or ``regmean_pp``, ``adamerging`` and ``svc``, which is around ``task_arithmetic``.
        experts: One file an expert.
        tasks: Their tasks, with the validation examples that were loaded.
        seed: Seed of the training examples.
    """
    maker = _MAKERS.get(name)
    return TextMerge(name) if maker is None else maker(list(experts), tasks, seed)


def _svc(experts: list[Path], tasks: Sequence[TextTask], seed: int) -> TextMerge:
    return TextMerge(make_method("svc", inner="task_arithmetic"))


def _fisher(experts: list[Path], tasks: Sequence[TextTask], seed: int) -> TextMerge:
    collected = [
        fisher_information(_expert(path), data.tokens, base=minilm_l6(), forward=_logits(task))
        for path, task, data in zip(experts, TEXT_SUITE, _training(seed), strict=True)
    ]
    return TextMerge("fisher", {"fisher": collected})


def _regmean(experts: list[Path], tasks: Sequence[TextTask], seed: int) -> TextMerge:
    collected = [
        input_grams(_expert(path), data.tokens, base=minilm_l6())
        for path, data in zip(experts, _training(seed), strict=True)
    ]
    return TextMerge("regmean", {"grams": collected})


def _regmean_pp(experts: list[Path], tasks: Sequence[TextTask], seed: int) -> TextMerge:
    data = [found.tokens for found in _training(seed)]
    return TextMerge("regmean", {"grams": regmean_pp(encoder(), minilm_l6(), experts, data)})


def _adamerging(experts: list[Path], tasks: Sequence[TextTask], seed: int) -> TextMerge:
    data = []
    for task in tasks:
        texts = task.validation[0]
        data.append([encode(texts[i : i + BATCH], MAX_TOKENS) for i in range(0, len(texts), BATCH)])
    learned = adamerging(
        encoder(), minilm_l6(), experts, data, forward=[_logits(t) for t in TEXT_SUITE], steps=STEPS, lr=RATE
    )
    return TextMerge("task_arithmetic", {"overrides": learned.overrides})


_MAKERS: dict[str, Callable[[list[Path], Sequence[TextTask], int], TextMerge]] = {
    "svc": _svc,
    "fisher": _fisher,
    "regmean": _regmean,
    "regmean_pp": _regmean_pp,
    "adamerging": _adamerging,
}


def _training(seed: int) -> list[Batches]:
    tasks = (load_text_task(name, train=EXAMPLES, seed=seed) for name in TEXT_SUITE)
    return [batches(task.train, MAX_TOKENS) for task in tasks]


def _expert(path: Path) -> nn.Module:
    model = encoder()
    model.load_state_dict(load_file(path), strict=False)
    return model.eval()


def _logits(task: str) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    return partial(_with_head, head(task))


def _with_head(weights: Tensor, model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    return zero_shot_logits(pooled(model, tokens), weights)  # type: ignore[arg-type]
