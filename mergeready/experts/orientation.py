"""Which way round layers store their weight: (out, in) like ``Linear``, or (in, out) like GPT-2's ``Conv1D``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergeready.weights.source import TensorInfo


def orientations(infos: Mapping[str, TensorInfo]) -> dict[str, bool | None]:
    """For each module that layers lie in: whether they store their weight (in, out); None where they differ.

    A bias is as long as a layer has outputs, so that it tells for every weight that is not square. The whole model is
    no such module, since its head may be of another kind than its body.

    >>> import torch
    >>> shapes = {"h.0.c_attn.weight": (4, 12), "h.0.c_attn.bias": (12,), "h.0.c_proj.weight": (4, 4)}
    >>> orientations({name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()})
    {'h.0': True, 'h': True}
    """
    found: dict[str, bool | None] = {}
    for name, info in infos.items():
        bias = infos.get(f"{name.removesuffix('.weight')}.bias")
        if bias is None or len(info.shape) != 2 or info.shape[0] == info.shape[1]:
            continue
        if bias.shape in (info.shape[:1], info.shape[1:]):
            swapped = bias.shape == info.shape[1:]
            for module in _around(name):
                found[module] = swapped if found.get(module, swapped) == swapped else None
    return found


def is_swapped(name: str, found: Mapping[str, bool | None]) -> bool | None:
    """Whether a weight is stored (in, out), as the layers nearest to it are; None if they do not tell.

    >>> is_swapped("h.0.c_proj.weight", {"h.0": True, "h": None}), is_swapped("score.weight", {"h": True})
    (True, None)
    """
    return next((found[module] for module in _around(name) if module in found), None)


def _around(name: str) -> Iterator[str]:
    """The modules that a parameter's layer lies in, innermost first, without the model itself."""
    parts = name.split(".")[:-2]
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])
