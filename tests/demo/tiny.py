"""A demo in small: an encoder and tokenizer of a few words, and tasks that the first word of a text decides."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertModel, PreTrainedTokenizerFast

from mergeready.demo.encoder import ZeroShotClassifier, load_classifier
from mergeready.demo.tasks import DemoTask, Split
from mergeready.training.records import ProbeRecord
from tests.models import bert_config, tiny_encoder

WORDS = [f"word{i}" for i in range(60)]


def tiny_base(folder: Path) -> Path:
    """An encoder folder with weights, configuration and tokenizer."""
    tiny_encoder().save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    return folder


def tiny_task(name: str, seed: int, classes: int = 3, count: int = 30) -> DemoTask:
    """Texts of random length whose class is the rest of their first word's number."""
    generator = torch.Generator().manual_seed(seed)

    def split() -> Split:
        texts, labels = [], []
        for _ in range(count):
            length = int(torch.randint(1, 9, (), generator=generator))
            words = torch.randint(0, 60, (length,), generator=generator).tolist()
            texts.append(" ".join(WORDS[word] for word in words))
            labels.append(words[0] % classes)
        return Split(texts, labels)

    label_texts = [f"{WORDS[10 * seed + label]} {WORDS[label]}" for label in range(classes)]
    splits = {name: split() for name in ("train", "validation", "test")}
    return DemoTask(name, f"Task {name}", label_texts, splits)


def tiny_classifier(seed: int = 0) -> ZeroShotClassifier:
    torch.manual_seed(seed)
    model = ZeroShotClassifier(bert_config())
    model.bert = BertModel(bert_config())
    return model.eval()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load_classifier(folder).state_dict().items()}


class Listening:
    """Writes down what the demo tells."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self.probes: list[tuple[str, ProbeRecord]] = []

    def expert_started(self, task: DemoTask, steps: int, peers: list[str]) -> None:
        self.events.append(("started", task.name, steps, tuple(peers)))

    def stepped(self, task: DemoTask, step: int) -> None:
        self.events.append(("stepped", task.name, step))

    def probed(self, task: DemoTask, probe: ProbeRecord) -> None:
        self.events.append(("probed", task.name, probe.step))
        self.probes.append((task.name, probe))

    def stopped(self, task: DemoTask, step: int, reason: str) -> None:
        self.events.append(("stopped", task.name, step, reason))

    def expert_finished(self, task: DemoTask) -> None:
        self.events.append(("finished", task.name))

    def working_on(self, what: str) -> None:
        self.events.append(("working on", what))
