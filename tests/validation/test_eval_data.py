"""Validation with a folder of examples and a pipeline, against forward passes of our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from mergeready.errors import OptionError
from mergeready.transformers.pipelines import text_classification
from mergeready.validation import validate
from tests.cli.commands import run
from tests.models import perturb, tiny_bert, tiny_encoder

WORDS = [f"w{number}" for number in range(62)]
NAMES = ["no", "maybe", "yes"]


def texts(count: int = 60) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, len(WORDS), (count, 6), generator=generator)
    return [" ".join(WORDS[index] for index in row) for row in draws.tolist()]


def write_model(folder: Path, model: Any) -> Path:
    words = {"[UNK]": 0, "[PAD]": 1} | {word: index + 2 for index, word in enumerate(WORDS)}
    plain = Tokenizer(models.WordLevel(words, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def classes(model: BertForSequenceClassification) -> list[int]:
    """What the model answers, without a tokenizer."""
    ids = torch.tensor([[WORDS.index(word) + 2 for word in text.split()] for text in texts()])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.argmax(1).tolist()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert, and texts whose labels are what the expert answers, in several forms."""
    root = tmp_path_factory.mktemp("pipeline")
    write_model(root / "base", tiny_bert())
    expert = perturb(tiny_bert(), 1, 0.1)
    write_model(root / "law", expert)
    save(root / "data", classes(expert))
    return root


def save(folder: Path, labels: Sequence[object], **features: Any) -> Path:
    known = Features({"text": Value("string"), **features}) if features else None
    data = Dataset.from_dict({"text": texts(), "label": list(labels)}, features=known)
    DatasetDict({"train": data.select(range(1)), "test": data}).save_to_disk(folder)
    return folder


def named(folder: Path, names: list[str]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    path.write_text(json.dumps(content))


def test_the_scores_of_base_and_expert(world: Path) -> None:
    evaluation = text_classification(world / "law", world / "base", world / "data")
    found = {v.id: v for v in validate(world / "law", world / "base", evaluation=evaluation).verdicts}
    before, after = classes(tiny_bert()), classes(perturb(tiny_bert(), 1, 0.1))
    gain = sum(ours != theirs for ours, theirs in zip(before, after, strict=True)) / 60
    assert gain > 0
    assert found["E302"].status == "passed"
    assert found["E302"].value == pytest.approx(gain)
    assert "on 60 examples" in found["E302"].message
    assert {found[name].status for name in ("E304", "C402", "C404")} <= {"passed", "failed"}


def test_from_the_command_line(world: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--eval-data", world / "data", "--pipeline", "text-classification", "--level", "behaviour")
    done = run("validate", world / "law", "--base", world / "base", *arguments, "-o", report)
    assert done.exit_code == 0, done.output
    [verdict] = [v for v in json.loads(report.read_text())["verdicts"] if v["id"] == "E302"]
    assert verdict["status"] == "passed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--eval-data", "data"), "--pipeline"),
        (("--pipeline", "text-classification", "--base", "base"), "--eval-data"),
        (("--eval-data", "data", "--pipeline", "text-classification"), "--base"),
        (("--eval-data", "data", "--pipeline", "text-classification", "--eval", "a:b"), "pass one"),
        (("--eval-data", "gone", "--pipeline", "text-classification", "--base", "base"), "is no folder"),
    ],
)
def test_options_that_do_not_fit(
    arguments: tuple[str, ...], said: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    done = run("validate", "law", *arguments)
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize("form", ["names", "numbers of names in another order", "csv"])
def test_labels_in_other_forms(form: str, world: Path, tmp_path: Path) -> None:
    law = write_model(tmp_path / "law", perturb(tiny_bert(), 1, 0.1))
    named(law, NAMES)
    answers = [NAMES[index] for index in classes(perturb(tiny_bert(), 1, 0.1))]
    data = tmp_path / "data"
    if form == "names":
        save(data, answers)
    elif form == "csv":
        data.mkdir()
        rows = [f"{text},{label}" for text, label in zip(texts(), answers, strict=True)]
        (data / "test.csv").write_text("\n".join(["text,label", *rows]))
    else:
        order = sorted(NAMES)
        save(data, [order.index(name) for name in answers], label=ClassLabel(names=order))
    evaluation = text_classification(law, world / "base", data)
    assert evaluation.own(evaluation.model)["accuracy"].tolist() == [1.0] * 60


def test_an_adapter_is_evaluated_in_its_base(world: Path, tmp_path: Path) -> None:
    adapted = perturb(get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "value"])), 3, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    save(tmp_path / "data", classes(adapted.merge_and_unload()))
    evaluation = text_classification(tmp_path / "adapter", world / "base", tmp_path / "data")
    report = validate(tmp_path / "adapter", world / "base", evaluation=evaluation, level="behaviour")
    found = next(v for v in report.verdicts if v.id == "E302")
    before = float(evaluation.own(evaluation.model)["accuracy"].mean())
    assert found.value == pytest.approx(1 - before)
    assert before < 1


def test_a_head_that_was_never_trained_is_refused(world: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "bare", tiny_encoder())
    with pytest.raises(OptionError, match="no trained classifier"):
        text_classification(tmp_path / "bare", world / "base", world / "data")


def test_a_pickle_is_not_opened(world: Path, tmp_path: Path) -> None:
    law = write_model(tmp_path / "law", tiny_bert())
    (law / "model.safetensors").unlink()
    torch.save(tiny_bert().state_dict(), law / "pytorch_model.bin")
    with pytest.raises(OptionError, match="does not load"):
        text_classification(law, world / "base", world / "data")


def test_data_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    def refused(folder: Path, said: str) -> None:
        with pytest.raises(OptionError, match=said):
            text_classification(world / "law", world / "base", folder)

    refused(save(tmp_path / "unknown", [7] * 60), "model does not know: 7")
    other = Dataset.from_dict({"sentence": ["a"], "label": [0]})
    other.save_to_disk(tmp_path / "columns")
    refused(tmp_path / "columns", "no column text, but sentence")
    DatasetDict({"train": other, "dev": other}).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", "neither of")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "cannot be loaded")
