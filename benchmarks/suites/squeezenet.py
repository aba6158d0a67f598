"""SqueezeNet 1.1, read from arrays in the (height, width, in, out) layout."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# (input, squeezed, expanded) channels of the fire modules 2 to 9; each branch has `expanded` channels
_FIRES = (
    (64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128),
    (256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256),
)  # fmt: skip
_POOL_BEFORE = (2, 4, 6)


class _Fire(nn.Module):
    """Squeeze to few channels, then expand with 1 × 1 and 3 × 3 filters side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze1x1(x))
        return functional.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


class SqueezeNet(nn.Module):
    """ImageNet-1k classifier of 1.24 M parameters and no normalisation layers."""

    feature_dim = 512

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        for number, (inputs, squeezed, expanded) in enumerate(_FIRES, start=2):
            self.add_module(f"fire{number}", _Fire(inputs, squeezed, expanded))
        self.conv10 = nn.Conv2d(self.feature_dim, 1000, 1)

    def _maps(self, x: Tensor) -> Tensor:
        x = functional.relu(self.conv1(x))
        for number in range(2, 2 + len(_FIRES)):
            if number in _POOL_BEFORE:
                x = functional.max_pool2d(x, 3, stride=2)
            x = self.get_submodule(f"fire{number}")(x)
        return x

    def features(self, x: Tensor) -> Tensor:
        """Pooled features ``(n, 512)`` of images ``(n, 3, h, w)``."""
        return torch.mean(self._maps(x), dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits ``(n, 1000)``."""
        return torch.mean(functional.relu(self.conv10(self._maps(x))), dim=(2, 3))


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else, so that a pickle cannot run code."""

    _ALLOWED: Mapping[tuple[str, str], Any] = {
        # numpy 2 moved this function; the pickle names the old place.
        ("numpy.core.multiarray", "_reconstruct"): np.ones(1).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")
        return self._ALLOWED[module, name]


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of ``SqueezeNet`` from a pickle that maps a layer to its kernel and bias.

    Raises:
        pickle.UnpicklingError: the pickle needs anything but numpy arrays.
    """
    with path.open("rb") as file:
        layers: dict[str, list[np.ndarray[Any, Any]]] = _ArraysOnly(file).load()
    state: dict[str, Tensor] = {}
    for layer, (kernel, bias) in layers.items():
        name = layer.replace("/", ".")
        state[f"{name}.weight"] = torch.from_numpy(kernel.astype(np.float32)).permute(3, 2, 0, 1).contiguous()
        state[f"{name}.bias"] = torch.from_numpy(bias.astype(np.float32))
    return state
