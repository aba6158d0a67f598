from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mergeready.weights.shards import forget_pass, local, reshard


@contextmanager
def untouched(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Whatever happens inside, leave no trace: everything below is bit-identical afterwards.

    Kept and put back, also after an exception: the values of ``weights`` and of all buffers, the training flag
    of every module, ``requires_grad`` of every parameter, and the random state of Python, NumPy, torch and its
    accelerators. Gradients and optimizers are not touched by evaluation and not handled here.

    Yields:
        The kept values, on the CPU where the weights are on an accelerator, and of sharded ones what this rank
        holds; do not write to them.
    """
    reshard(model)
    weights = {name: local(tensor) for name, tensor in weights.items()}
    kept = {name: _copy(tensor) for name, tensor in weights.items()}
    # A module may put a new tensor in a buffer's place, so which tensor is whose is kept as well as the values.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    owners = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with random_state_kept():
        try:
            yield kept
        except BaseException:
            forget_pass(model)
            raise
        finally:
            reshard(model)
            with torch.no_grad():
                for name, tensor in weights.items():
                    tensor.copy_(kept[name])
                for buffer, value in buffers:
                    buffer.copy_(value)
            for current, original in owners:
                current.clear()
                current.update(original)
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give Python, NumPy, torch and its accelerators their random state back afterwards.

    Even reading a DataLoader draws from torch's global generator.
    """
    python, legacy = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator is not None else ()
    kind = accelerator.type if accelerator is not None else "cuda"
    try:
        with torch.random.fork_rng(devices=devices, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _copy(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    return value.clone() if value.device.type == "cpu" else value.cpu()
