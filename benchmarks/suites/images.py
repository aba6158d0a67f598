"""How each vision backbone wants its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class ImageInput:
    """Input normalisation of a vision backbone: ``(pixel - mean) / std`` on pixel values 0..255.

    Attributes:
        size: side length in pixels that the weights were trained with; other sizes work.
        mean: per channel, in the backbone's channel order.
        std: per channel, in the backbone's channel order.
        bgr: whether the backbone expects blue, green, red.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool

    def prepare(self, images: Tensor, *, size: int | None = None) -> Tensor:
        """Normalise RGB uint8 images ``(n, 3, h, w)``; ``size`` resizes them first."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`images` must be uint8 of shape (n, 3, h, w), got {images.dtype} of shape {tuple(images.shape)}"
            )
        pixels = images.flip(1).float() if self.bgr else images.float()
        if size is not None and pixels.shape[-2:] != (size, size):
            pixels = functional.interpolate(
                pixels, (size, size), mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std
