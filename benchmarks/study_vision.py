"""The vision suite of the published studies: ImageNet backbones with frozen linear heads, images of 64 pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.suites.backbones import EFFICIENTNET_INPUT, SQUEEZENET_INPUT, efficientnet_lite0, squeezenet
from benchmarks.suites.efficientnet import EfficientNetLite0
from benchmarks.suites.heads import linear_probe
from benchmarks.suites.images import ImageInput
from benchmarks.suites.squeezenet import SqueezeNet
from benchmarks.suites.vision import Images, load_vision_task
from mergeready.study.suite import StudySuite, StudyTask

Backbone = EfficientNetLite0 | SqueezeNet
BACKBONES: dict[str, tuple[Callable[[], Backbone], ImageInput]] = {
    "efficientnet_lite0": (efficientnet_lite0, EFFICIENTNET_INPUT),
    "squeezenet": (squeezenet, SQUEEZENET_INPUT),
}
EVALUATION_BATCH = 100
SHARED_EXAMPLES, SHARED_BATCH = 128, 16
"""How many images a task lets others look at, and in which batches."""
TASKS = ("mnist", "fashion", "digits", "emoji_group", "font_letter", "font_style")
Row = tuple[Tensor, int]
"""An image as the backbone reads it, and its label."""
Inputs = tuple[Tensor, nn.Linear]
"""Images, and the head that reads what the backbone makes of them."""


def vision(
    seed: int,
    backbone: str = "squeezenet",
    train: int = 1000,
    validation: int = 100,
    test: int = 200,
    tasks: Sequence[str] = TASKS,
    head: int | None = None,
) -> StudySuite:
    """Image tasks on one backbone. Heads are fitted on the backbone's own features and stay as they are.

    BatchNorm keeps the backbone's statistics, which short fine-tuning would only leave behind.

    Args:
        seed: Chooses training and validation examples.
        backbone: ``squeezenet`` or ``efficientnet_lite0``.
        train: Training examples a task, at most.
        validation: Validation examples a task.
        test: Test examples a task, the same for every seed.
        tasks: Names of the tasks.
        head: How many training examples heads are fitted on; all by default. With few, there is more to learn.
    """
    make, images = BACKBONES[backbone]
    base, made = make().eval(), {}
    batches: dict[str, list[Inputs]] = {}
    for name in tasks:
        data = load_vision_task(name, train=train, validation=validation, test=test, seed=seed)
        training, held_out, reported = (
            (images.prepare(pixels), labels) for pixels, labels in (data.train, data.validation, data.test)
        )
        few = training[0][:head], training[1][:head]
        weights = _head(base, few, len(data.label_names))
        batches[name] = _inputs(training[0], weights)
        made[name] = StudyTask(
            train=list(zip(training[0], training[1].tolist(), strict=True)),
            collate=_collate,
            loss=partial(_loss, weights),
            validation=partial(_accuracy, weights, held_out),
            test=partial(_accuracy, weights, reported),
        )
    return StudySuite(model=partial(_model, backbone), tasks=made, given=_given(batches))


def _given(batches: dict[str, list[Inputs]]) -> dict[str, Callable[[str], Any]]:
    """What techniques ask for: images without labels, and how a model reads them."""
    return {
        "inputs": lambda task: batches[task],
        "inputs_of_others": lambda task: [own for name, own in batches.items() if name != task],
        "logits": lambda task: _logits,
    }


def _inputs(images: Tensor, head: nn.Linear) -> list[Inputs]:
    """Batches of images, each with the head of its task, so that one function gives the logits of any."""
    return [(part, head) for part in images[:SHARED_EXAMPLES].split(SHARED_BATCH)]


def _logits(model: nn.Module, batch: Inputs) -> Tensor:
    images, head = batch
    _still(model)
    logits: Tensor = head(cast("Backbone", model).features(images))
    return logits


@cache
def _weights(backbone: str) -> dict[str, Tensor]:
    return BACKBONES[backbone][0]().state_dict()


def _model(backbone: str) -> nn.Module:
    """A backbone whose ImageNet classifier does not train."""
    model = EfficientNetLite0() if backbone == "efficientnet_lite0" else SqueezeNet()
    model.load_state_dict(_weights(backbone))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("_fc.", "conv10.")))
    return model


def _head(base: Backbone, images: Images, classes: int) -> nn.Linear:
    with torch.no_grad():
        seen = torch.cat([base.features(part) for part in images[0].split(EVALUATION_BATCH)])
    return linear_probe(seen, images[1], classes)


def _collate(rows: list[Row]) -> Images:
    return torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])


def _loss(head: nn.Linear, model: Backbone, batch: Images) -> Tensor:
    _still(model)
    return functional.cross_entropy(head(model.features(batch[0])).float(), batch[1])


def _still(model: nn.Module) -> None:
    """BatchNorm as in evaluation."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def _accuracy(head: nn.Linear, images: Images, model: Backbone) -> dict[str, Tensor]:
    guesses = [head(model.features(part)).argmax(dim=1) for part in images[0].split(EVALUATION_BATCH)]
    return {"accuracy": (torch.cat(guesses) == images[1]).float()}
