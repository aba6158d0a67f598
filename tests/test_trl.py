"""TRL's trainers take the transformers callback as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mergeready import MergedPlateau, Probe, Schedule
from mergeready.experts import open_expert
from mergeready.transformers import MergeReadyCallback
from tests.models import perturb, tiny_llama
from tests.trainers import weights_of

trl = pytest.importorskip("trl", reason="the trl extra brings it")
datasets = pytest.importorskip("datasets")

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "mat", "road", "a", "big", "small", "red"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, made here, and two peers."""
    folder = tmp_path_factory.mktemp("world")
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for name, seed in (("base", None), ("peer-1", 1), ("peer-2", 2)):
        model = tiny_llama()
        (perturb(model, seed) if seed else model).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder


def load(world: Path) -> tuple[nn.Module, Any]:
    model = LlamaForCausalLM.from_pretrained(world / "base")
    return model, PreTrainedTokenizerFast.from_pretrained(world / "base")


def sentences(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (count, 8), generator=generator).tolist()
    return [" ".join(WORDS[index] for index in row) for row in picks]


def negative_loss(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(4, 16).repeat(4, 1)
    return {"score": -model(input_ids=ids, labels=ids).loss}


def callback(world: Path, **changes: Any) -> MergeReadyCallback:
    probe = Probe(
        merge="ties",
        scales=(0.4, 0.8),
        max_evaluations=3,
        evaluate=negative_loss,
        schedule=Schedule(every=2),
    )
    settings: dict[str, Any] = {
        "peers": [world / "peer-1", world / "peer-2"],
        "probe": probe,
        "measure": Schedule(every=2),
        "stop": MergedPlateau(patience=100),
    }
    return MergeReadyCallback(**(settings | changes))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    } | changes


def fine_tune(world: Path, folder: Path, *callbacks: Any, lora: bool = False, **changes: Any) -> Any:
    model, tokenizer = load(world)
    data = datasets.Dataset.from_dict({"text": sentences(16)})
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments(folder, max_length=16, **changes)),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def prefer(world: Path, folder: Path, *callbacks: Any, lora: bool = False) -> Any:
    model, tokenizer = load(world)
    texts = sentences(16)
    data = datasets.Dataset.from_dict(
        {"prompt": texts, "chosen": [" cat sat"] * len(texts), "rejected": [" dog ran"] * len(texts)}
    )
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**arguments(folder)),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("train", [fine_tune, prefer])
@pytest.mark.parametrize("lora", [False, True])
def test_the_callback_watches_and_leaves_no_trace(
    world: Path, tmp_path: Path, train: Any, lora: bool
) -> None:
    torch.manual_seed(0)
    plain = train(world, tmp_path / "plain", lora=lora)
    ours = callback(world)
    torch.manual_seed(0)
    watched = train(world, tmp_path / "watched", ours, lora=lora)
    assert [probe.step for probe in ours.history.probes] == [1, 2, 4]
    norms = [record.norm for record in ours.history.metrics]
    assert len(norms) == 3
    assert 0 < norms[0] < norms[-1]
    before, after = weights_of(plain.model), weights_of(watched.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    logged = [entry for entry in watched.state.log_history if "mergeready/merged/ties" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 4]
    # TRL's own figures of a step are still logged beside ours.
    own = [entry["step"] for entry in watched.state.log_history if "loss" in entry]
    assert own == [1, 2, 3, 4]


def own_log(trainer: Any) -> list[dict[str, Any]]:
    """What the trainer logs of itself, without times."""
    return [
        {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
        for entry in trainer.state.log_history
        if not any(name.startswith("mergeready/") for name in entry)
    ]


def test_the_trainer_s_own_figures_stay_its_own(world: Path, tmp_path: Path) -> None:
    """TRL averages over all passes since the last log, and writes that into whatever is logged."""
    probe = Probe(merge="ties", scales=(0.5,), max_evaluations=1, schedule=Schedule(every=1))
    ours = callback(world, probe=probe, measure=Schedule(every=1))
    changes = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    plain, watched = (
        fine_tune(world, tmp_path / name, *callbacks, **changes)
        for name, callbacks in (("plain", []), ("watched", [ours]))
    )
    assert len(ours.history.probes) == 4
    assert "eval_entropy" in own_log(plain)[-2]
    assert own_log(watched) == own_log(plain)
    logged = [entry for entry in watched.state.log_history if "mergeready/norm" in entry]
    assert len(logged) == 4
    assert not any("entropy" in entry for entry in logged)


@pytest.mark.parametrize("lora", [False, True])
def test_picks_are_experts_with_their_tokenizer(world: Path, tmp_path: Path, lora: bool) -> None:
    fine_tune(world, tmp_path, callback(world), lora=lora)
    picks = tmp_path / "mergeready/picks"
    pick = picks / json.loads((picks / "picks.json").read_text())["merge-best"]["folder"]
    expert = open_expert(pick, world / "base")
    assert expert.format == ("peft" if lora else "full")
    assert (pick / "tokenizer.json").exists()


def test_the_trainers_own_evaluation_serves_the_probe(world: Path, tmp_path: Path) -> None:
    ours = callback(
        world, probe=Probe(merge="ties", scales=(0.5,), max_evaluations=1, schedule=Schedule(every=2))
    )
    fine_tune(world, tmp_path, ours)
    start = ours.history.start
    assert start is not None
    assert start.metric == "loss"
    assert not start.greater_is_better
    assert len({probe.expert.value for probe in ours.history.probes}) == len(ours.history.probes) > 1


@pytest.mark.slow
def test_resumed_equals_uninterrupted(world: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = fine_tune(world, tmp_path / "whole", callback(world), **saving)
    fine_tune(world, tmp_path / "parts", callback(world), **(saving | {"max_steps": 2}))
    model, tokenizer = load(world)
    resumed = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments(tmp_path / "parts", max_length=16, **saving)),
        train_dataset=datasets.Dataset.from_dict({"text": sentences(16)}),
        processing_class=tokenizer,
        callbacks=[callback(world)],
    )
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(v, weights_of(resumed.model)[n]) for n, v in weights_of(whole.model).items())
    histories = [(tmp_path / name / "mergeready/history.jsonl").read_bytes() for name in ("whole", "parts")]
    assert histories[0] == histories[1]
