from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mergeready.demo.encoder import ZeroShotClassifier, embed_labels, load_classifier, tokenize
from mergeready.demo.evaluate import Accuracy, pad
from mergeready.demo.events import Listener
from mergeready.demo.settings import DemoSettings
from mergeready.demo.tasks import DemoTask
from mergeready.training.history import History, read_history
from mergeready.training.peers import Peer
from mergeready.training.picks import MERGE_BEST
from mergeready.training.policies import MergedPlateau
from mergeready.training.probe import Probe
from mergeready.training.save import save_expert
from mergeready.training.schedule import Schedule
from mergeready.transformers import FOLDER_NAME, MergeReadyCallback


@dataclass(frozen=True)
class PreparedTask:
    """A task with its tokens, its head and its evaluations, ready for training.

    Attributes:
        task: The task.
        head: Label embeddings from the base, shape (classes, hidden).
        train: Columns ``input_ids`` and ``labels``.
        probe: Accuracy on the first part of the validation split, for probes.
        validation: Accuracy on the validation split, for the final scales.
        test: Accuracy on the test split; only the final table uses it.
    """

    task: DemoTask
    head: Tensor
    train: Dataset
    probe: Accuracy
    validation: Accuracy
    test: Accuracy


@dataclass(frozen=True)
class TrainedExpert:
    """What came out of one expert's run.

    Attributes:
        task: Its task.
        end: Folder of the weights after all steps.
        picks: Merge method to the folder of its merge-best checkpoint, as it was when the run was stopped.
        pick_steps: Merge method to the step of that checkpoint.
        stopped_at: Step at which the callback stopped the run, or None.
        history: Everything that was measured, beyond the stop as well.
    """

    task: DemoTask
    end: Path
    picks: Mapping[str, Path]
    pick_steps: Mapping[str, int]
    stopped_at: int | None
    history: History


def prepare(tasks: Sequence[DemoTask], base: Path, settings: DemoSettings) -> list[PreparedTask]:
    """Tokenize every task and make its head with the base encoder."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_classifier(base)
    prepared = []
    for task in tasks:
        splits = {name: split.head(settings.examples) for name, split in task.splits.items()}
        ids = {name: tokenize(tokenizer, split.texts) for name, split in splits.items()}
        head = embed_labels(model, tokenizer, task.label_texts)
        train = Dataset.from_dict({"input_ids": ids["train"], "labels": list(splits["train"].labels)})
        scores = {name: Accuracy(ids[name], splits[name].labels, head) for name in ("validation", "test")}
        part = splits["validation"].head(settings.probe_examples)
        probe = Accuracy(ids["validation"][: len(part)], part.labels, head)
        prepared.append(PreparedTask(task, head, train, probe, scores["validation"], scores["test"]))
    return prepared


def train_expert(
    prepared: PreparedTask,
    peers: Sequence[tuple[PreparedTask, Path]],
    base: Path,
    folder: Path,
    settings: DemoSettings,
    listener: Listener,
) -> TrainedExpert:
    """Fine-tune one expert with the callback until it stops, then, for comparison, on to the end.

    Args:
        prepared: The expert's task.
        peers: The experts that exist already, with their tasks; none means surrogates.
        base: The encoder's folder.
        folder: Where the run goes.
        settings: The demo's settings.
        listener: Is told what happens.
    """
    task = prepared.task
    listener.expert_started(task, settings.steps, [other.task.name for other, _ in peers])
    model = load_classifier(base)
    model.set_head(prepared.head)
    options: dict[str, Any] = {
        "base": base,
        "peers": [Peer(path, evaluate=other.probe, name=other.task.name) for other, path in peers],
        "probe": Probe(
            merge=settings.methods,
            evaluate=prepared.probe,
            max_evaluations=5,
            schedule=Schedule(every=settings.probe_every, first=settings.probe_first),
        ),
        "measure": Schedule(every=settings.probe_every),
    }
    callback = MergeReadyCallback(stop=MergedPlateau(patience=settings.patience), **options)
    trainer = _trainer(model, prepared, folder, settings, callback, _Progress(task, callback, listener))
    trainer.train()
    stopped_at = trainer.state.global_step if callback.history.decisions else None
    picks, pick_steps = _merge_picks(folder / FOLDER_NAME / "picks", settings.methods)
    if stopped_at is not None and stopped_at < settings.steps:
        # Not at the last step: a Trainer that is resumed there takes one more.
        listener.stopped(task, stopped_at, callback.history.decisions[-1].reason)
        trainer.remove_callback(_Progress)
        trainer.remove_callback(callback)
        callback = MergeReadyCallback(picks=None, **options)
        trainer.add_callback(callback)
        trainer.add_callback(_Progress(task, callback, listener))
        trainer.train(resume_from_checkpoint=True)
    save_expert(model, _fresh(folder / "end"), AutoTokenizer.from_pretrained(base))
    _drop_checkpoints(folder)
    listener.expert_finished(task)
    history = read_history(folder / FOLDER_NAME / "history.jsonl")
    return TrainedExpert(task, folder / "end", picks, pick_steps, stopped_at, history)


def train_joint(tasks: Sequence[PreparedTask], base: Path, folder: Path, settings: DemoSettings) -> Path:
    """Fine-tune one model on all tasks together; classes compete within the task of each example only."""
    model = load_classifier(base)
    sizes = [len(prepared.head) for prepared in tasks]
    groups = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor(sizes))
    model.set_head(torch.cat([prepared.head for prepared in tasks]), groups)
    first = [sum(sizes[:index]) for index in range(len(tasks))]
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for offset, prepared in zip(first, tasks, strict=True):
        rows["input_ids"] += list(prepared.train["input_ids"])
        rows["labels"] += [offset + label for label in prepared.train["labels"]]
    arguments = _arguments(folder, settings, steps=settings.steps * len(tasks))
    _plain(Trainer(model, arguments, train_dataset=Dataset.from_dict(rows), data_collator=_collate)).train()
    save_expert(model, _fresh(folder / "end"), AutoTokenizer.from_pretrained(base))
    _drop_checkpoints(folder)
    return folder / "end"


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Passes the Trainer's steps and our probes on to the display."""

    def __init__(self, task: DemoTask, callback: MergeReadyCallback, listener: Listener) -> None:
        self._task, self._callback, self._listener = task, callback, listener

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._listener.stepped(self._task, state.global_step)
        probes = self._callback.history.probes
        if probes and probes[-1].step == state.global_step:
            self._listener.probed(self._task, probes[-1])


def _trainer(
    model: ZeroShotClassifier,
    prepared: PreparedTask,
    folder: Path,
    settings: DemoSettings,
    *callbacks: TrainerCallback,
) -> Trainer:
    trainer = Trainer(
        model,
        _arguments(folder, settings, settings.steps),
        train_dataset=prepared.train,
        data_collator=_collate,
        callbacks=list(callbacks),
    )
    return _plain(trainer)


def _plain(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)  # the demo has a display of its own
    return trainer


def _arguments(folder: Path, settings: DemoSettings, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=10**9,
        save_strategy="steps",
        save_steps=10**9,
        save_total_limit=1,
        seed=settings.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    ids, mask = pad([row["input_ids"] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def _merge_picks(folder: Path, methods: Sequence[str]) -> tuple[dict[str, Path], dict[str, int]]:
    index = json.loads((folder / "picks.json").read_text(encoding="utf-8"))
    labels = {method: MERGE_BEST if len(methods) == 1 else f"{MERGE_BEST}:{method}" for method in methods}
    picks = {method: folder / index[label]["folder"] for method, label in labels.items()}
    return picks, {method: index[label]["step"] for method, label in labels.items()}


def _drop_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # they hold optimizer states, twice the model's size


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
