"""Every reader of files that others made, with a healthy file to start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mergeready import MergeReadyLoop, Probe, Schedule, merge, open_expert, read_history
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import open_fingerprint
from mergeready.merging.recipe import read_recipe
from mergeready.metrics.inspection import inspect_vector
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.weights.model_card import update_card


@dataclass(frozen=True)
class Target:
    """A file and what reads it.

    Attributes:
        name: What results call it.
        file: The healthy file.
        read: Reads it as a user of the library would.
    """

    name: str
    file: Path
    read: Callable[[], object]


class Net(nn.Module):
    """Two layers; big enough for every reader, small enough to be read thousands of times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def make_targets(folder: Path) -> list[Target]:
    """Write one healthy file of each kind."""
    torch.manual_seed(0)
    base, expert = Net(), Net()
    expert.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in base.state_dict().items()})
    opened = Base.open({k: v.clone() for k, v in base.state_dict().items()})
    full = _save_full(folder / "full", expert)
    sharded = _save_sharded(folder / "sharded", expert)
    adapter = _save_adapter(folder / "adapter", base)
    fingerprint = folder / "net.fingerprint.safetensors"
    take_fingerprint(open_expert(full, opened).vector, opened, budget=64).save(fingerprint)
    history = _save_history(folder / "run", base)
    merged = merge(full, [sharded], output=folder / "merged")
    card = folder / "card"
    card.mkdir()
    (card / "README.md").write_text("---\ntags: [a]\nbase_model: x/y\n---\n# Title\n", encoding="utf-8")

    def merge_as_bf16(base: Path, expert: Path) -> Path:
        return merge(base, [expert], output=folder / "again", overwrite=True, dtype=torch.bfloat16)

    def expert_in(place: Path) -> Callable[[], object]:
        return lambda: inspect_vector(open_expert(place, opened).vector, opened.source)

    return [
        Target("safetensors", full / "model.safetensors", expert_in(full)),
        Target("config", full / "config.json", lambda: merge_as_bf16(full, sharded)),
        Target("index", sharded / "model.safetensors.index.json", expert_in(sharded)),
        Target("adapter weights", adapter / "adapter_model.safetensors", expert_in(adapter)),
        Target("adapter config", adapter / "adapter_config.json", expert_in(adapter)),
        Target("fingerprint", fingerprint, lambda: open_fingerprint(fingerprint, opened)),
        Target("history", history, lambda: read_history(history)),
        Target(
            "merge recipe",
            merged / "mergeready_merge.yaml",
            lambda: read_recipe(merged / "mergeready_merge.yaml"),
        ),
        Target("model card", card / "README.md", lambda: update_card(card, {"tags": ["merge"]}, "ours")),
    ]


def _save_full(folder: Path, model: nn.Module) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "net", "architectures": ["Net"]}', encoding="utf-8")
    return folder


def _save_sharded(folder: Path, model: nn.Module) -> Path:
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=128)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def _save_adapter(folder: Path, base: nn.Module) -> Path:
    import copy

    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["first", "second"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def _save_history(folder: Path, base: nn.Module) -> Path:
    model = Net()
    model.load_state_dict(base.state_dict())
    probe = Probe(merge="ties", evaluate=lambda m: {"accuracy": 0.5}, schedule=Schedule(every=1))
    monitor = MergeReadyLoop(
        folder, base=base.state_dict(), probe=probe, measure=Schedule(every=1), picks=None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.prepare(model, total_steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        monitor.step()
    monitor.finish()
    return folder / "history.jsonl"
