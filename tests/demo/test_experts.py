from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from mergeready.demo.encoder import embed_labels, load_classifier
from mergeready.demo.experts import PreparedTask, TrainedExpert, prepare, train_expert, train_joint
from mergeready.demo.settings import DemoSettings
from mergeready.experts import open_expert
from mergeready.training.history import History, read_history
from mergeready.training.picks import Picks
from tests.demo.tiny import WORDS, Listening, tiny_base, tiny_task, weights_in

SETTINGS = DemoSettings(
    steps=20, batch_size=8, learning_rate=1e-3, probe_first=2, probe_every=4, patience=1, seed=1
)
PATIENT = dataclasses.replace(SETTINGS, patience=99)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tasks(base: Path) -> list[PreparedTask]:
    return prepare([tiny_task("law", 0), tiny_task("code", 1, classes=4)], base, SETTINGS)


Run = tuple[TrainedExpert, Listening]


def train(
    tasks: Sequence[PreparedTask], base: Path, folder: Path, settings: DemoSettings, peer: Path | None = None
) -> Run:
    listening = Listening()
    peers = [] if peer is None else [(tasks[1], peer)]
    return train_expert(tasks[0], peers, base, folder, settings, listening), listening


@pytest.fixture(scope="module")
def peer(tasks: list[PreparedTask], base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer") / "code"
    return train_expert(tasks[1], [], base, folder, PATIENT, Listening()).end


@pytest.fixture(scope="module")
def stopped(
    tasks: list[PreparedTask], base: Path, peer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    return train(tasks, base, tmp_path_factory.mktemp("run") / "law", SETTINGS, peer)


@pytest.fixture(scope="module")
def patient(
    tasks: list[PreparedTask], base: Path, peer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    return train(tasks, base, tmp_path_factory.mktemp("run") / "law", PATIENT, peer)


class TestPrepare:
    def test_tokens_and_labels(self, tasks: list[PreparedTask]) -> None:
        prepared = tasks[0]
        split = prepared.task.splits["train"]
        wanted = [[WORDS.index(word) + 2 for word in text.split()] for text in split.texts]
        assert list(prepared.train["input_ids"]) == wanted
        assert list(prepared.train["labels"]) == list(split.labels)

    def test_the_head_is_made_by_the_base(self, tasks: list[PreparedTask], base: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        for prepared in tasks:
            exact = embed_labels(load_classifier(base), tokenizer, prepared.task.label_texts)
            assert torch.equal(prepared.head, exact)

    def test_validation_and_test_are_their_own_splits(self, tasks: list[PreparedTask], base: Path) -> None:
        model = load_classifier(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        prepared = tasks[1]
        for name, evaluate in (("validation", prepared.validation), ("test", prepared.test)):
            split = prepared.task.splits[name]
            guesses = embed_labels(model, tokenizer, split.texts) @ prepared.head.T
            right = (guesses.argmax(1) == torch.tensor(split.labels)).float()
            model.eval()
            assert torch.equal(evaluate(model)["accuracy"], right)

    def test_probes_use_the_first_part_of_validation(self, base: Path) -> None:
        settings = dataclasses.replace(SETTINGS, probe_examples=7)
        [prepared] = prepare([tiny_task("law", 0)], base, settings)
        model = load_classifier(base).eval()
        whole = prepared.validation(model)["accuracy"]
        assert torch.equal(prepared.probe(model)["accuracy"], whole[:7])
        assert len(whole) == 30

    def test_fewer_examples(self, base: Path) -> None:
        settings = dataclasses.replace(SETTINGS, examples=5)
        [prepared] = prepare([tiny_task("law", 0)], base, settings)
        assert len(prepared.train) == 5
        assert len(prepared.test(load_classifier(base).eval())["accuracy"]) == 5


class TestTrainExpert:
    def test_a_stopped_run_goes_on_to_where_an_unstopped_one_ends(self, stopped: Run, patient: Run) -> None:
        """Bit for bit, and with the same measurements: the stop changes the picks alone."""
        a, b = weights_in(stopped[0].end), weights_in(patient[0].end)
        assert all(torch.equal(a[name], b[name]) for name in b)
        assert stopped[0].stopped_at is not None
        assert stopped[0].stopped_at < SETTINGS.steps
        assert patient[0].stopped_at is None
        assert [p.step for p in stopped[0].history.probes] == [2, 4, 8, 12, 16, 20]
        assert stopped[0].history.probes == patient[0].history.probes

    def test_what_the_folder_holds(self, stopped: Run) -> None:
        expert, _ = stopped
        assert {path.name for path in expert.end.parent.iterdir()} == {"end", "mergeready"}
        assert expert.end.name == "end"
        AutoTokenizer.from_pretrained(expert.end)
        AutoModel.from_pretrained(expert.end)
        history = read_history(expert.end.parent / "mergeready" / "history.jsonl")
        assert list(history) == list(expert.history)

    def test_what_is_measured_after_the_stop_picks_nothing(self, stopped: Run) -> None:
        expert, _ = stopped
        at = expert.stopped_at
        assert at is not None
        known = History([record for record in expert.history if record.step <= at])
        index = json.loads((expert.end.parent / "mergeready" / "picks" / "picks.json").read_text())
        assert {label: pick["step"] for label, pick in index.items()} == Picks().select(known)

    def test_the_end_is_trained(self, patient: Run, base: Path) -> None:
        end, start = weights_in(patient[0].end), weights_in(base)
        moved = {name.split(".")[1] for name, value in end.items() if not torch.equal(value, start[name])}
        assert moved == {"encoder"}  # embeddings and pooler are frozen

    @pytest.mark.parametrize("method", SETTINGS.methods)
    def test_picks_are_those_of_the_stop(self, method: str, stopped: Run, base: Path) -> None:
        expert, _ = stopped
        assert expert.stopped_at is not None
        seen = [(step, value) for step, value in expert.history.merged(method) if step <= expert.stopped_at]
        best = max(value for _, value in seen)
        assert expert.pick_steps[method] == next(step for step, value in seen if value == best)
        assert expert.picks[method].name == f"step-{expert.pick_steps[method]:06}"
        assert open_expert(expert.picks[method], base).base_checked == "recorded"

    def test_what_the_listener_hears(self, stopped: Run, patient: Run) -> None:
        expert, listening = stopped
        at = expert.stopped_at
        names = [event[0] for event in listening.events]
        assert listening.events[0] == ("started", "law", 20, ("code",))
        assert names[-1] == "finished"
        assert [event[2] for event in listening.events if event[0] == "stepped"] == list(range(1, 21))
        assert [event[2] for event in listening.events if event[0] == "probed"] == [2, 4, 8, 12, 16, 20]
        [stop] = [event for event in listening.events if event[0] == "stopped"]
        assert stop[2] == at
        assert "has not improved" in str(stop[3])
        assert listening.events.index(stop) > listening.events.index(("stepped", "law", at))
        assert "stopped" not in [event[0] for event in patient[1].events]

    def test_peers_and_their_tasks_are_measured(self, stopped: Run) -> None:
        [start] = [record for record in stopped[0].history if record.kind == "start"]
        assert set(start.peers) == {"code"}
        assert set(start.references) == {"own", "code"}
        assert not start.surrogate

    def test_without_peers_probes_use_surrogates(
        self, tasks: list[PreparedTask], base: Path, tmp_path: Path
    ) -> None:
        expert, listening = train(tasks, base, tmp_path / "law", dataclasses.replace(PATIENT, steps=2))
        assert listening.events[0] == ("started", "law", 2, ())
        assert all(probe.surrogate for probe in expert.history.probes)

    def test_a_stop_at_the_last_step(
        self, tasks: list[PreparedTask], base: Path, peer: Path, tmp_path: Path
    ) -> None:
        """There is nothing to go on with then."""
        settings = dataclasses.replace(SETTINGS, steps=2, probe_first=1, learning_rate=1e-12)
        expert, listening = train(tasks, base, tmp_path / "law", settings, peer)
        assert expert.stopped_at == 2
        assert [event[2] for event in listening.events if event[0] == "stepped"] == [1, 2]
        assert [p.step for p in expert.history.probes] == [1, 2]
        assert "stopped" not in [event[0] for event in listening.events]
        assert (expert.end / "model.safetensors").is_file()


def loss(model_folder: Path, prepared: PreparedTask) -> float:
    """Mean cross-entropy over the training split, classes of the task among themselves, in float64."""
    model = load_classifier(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    split = prepared.task.splits["train"]
    logits = 20 * embed_labels(model, tokenizer, split.texts).double() @ prepared.head.double().T
    losses = [
        math.log(sum(math.exp(value) for value in row)) - row[label]
        for row, label in zip(logits.tolist(), split.labels, strict=True)
    ]
    return float(np.mean(losses))


def test_joint_training_learns_every_task(tasks: list[PreparedTask], base: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=30, learning_rate=3e-3)
    end = train_joint(tasks, base, tmp_path / "joint", settings)
    assert end == tmp_path / "joint" / "end"
    assert list((tmp_path / "joint").iterdir()) == [end]  # no optimizer states
    for prepared in tasks:
        assert loss(end, prepared) < 0.6 * loss(base, prepared), prepared.task.name
