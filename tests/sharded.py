"""The small model of ``tests/training/small.py``, spread over ranks in every way that is supported."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.training.small import Net

ON_TWO = ("ddp", "fsdp2", "columns", "tensor_parallel")
ON_FOUR = (*ON_TWO, "hsdp", "fsdp2_and_tensor_parallel", "subset")


def spread(model: nn.Module, layout: str) -> nn.Module:
    """The model under a layout, ready to train; it keeps its values."""
    size = dist.get_world_size()
    if layout == "ddp":
        return DistributedDataParallel(model)
    net: Any = model
    if layout == "tensor_parallel":
        return _tensor_parallel(net, init_device_mesh("cpu", (size,)))
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (size,))}
    if layout == "columns":
        options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % size == 0 else None
    if layout == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
    if layout == "fsdp2_and_tensor_parallel":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
        options["mesh"] = mesh["data"]
        _tensor_parallel(net, mesh["tensor"])
    if layout == "subset":  # some parameters stay whole on every rank
        options["ignored_params"] = {net.norm.weight, net.head.weight}
    inner = net.get_base_model() if hasattr(net, "get_base_model") else net
    for layer in inner.layers:
        fully_shard(layer, **{k: v for k, v in options.items() if k != "ignored_params"})
    return fully_shard(net, **options)


def _tensor_parallel(net: Any, mesh: Any) -> Any:
    whole = {"use_local_output": True}
    plan = {
        "layers.0": ColwiseParallel(output_layouts=Replicate(), **whole),
        "layers.1": RowwiseParallel(input_layouts=Replicate(), **whole),
    }
    return parallelize_module(net, mesh, plan)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole values of a spread model's parameters; a collective."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def local_bits(model: nn.Module) -> dict[str, bytes]:
    """What this rank holds, bit for bit."""
    found = {}
    for name, p in model.named_parameters():
        value = p.to_local() if isinstance(p, DTensor) else p
        found[name] = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found


def net_like(state: dict[str, Tensor]) -> Net:
    net = Net()
    net.load_state_dict(state)
    return net


def adapter(net: nn.Module, seed: int = 3) -> nn.Module:
    """A LoRA adapter on a net, moved away from where it starts; DoRA on one of its layers would be another kind."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["embed", "layers.0", "layers.1"], modules_to_save=["head"]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(net, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def force_fsdp_on_cpu() -> None:
    """accelerate ignores FSDP on CPU, where its only use is to be tested."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
