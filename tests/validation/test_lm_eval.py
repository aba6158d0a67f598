"""Validation with tasks of lm-eval, against forward passes of our own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mergeready.errors import OptionError
from mergeready.validation import validate
from tests.cli.commands import run
from tests.models import perturb, tiny_bert, tiny_llama

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

from mergeready.transformers.lm_eval_tasks import lm_eval_tasks

WORDS = [f"w{number}" for number in range(61)]
IDS = {"[UNK]": 0, "[PAD]": 1, "[END]": 2} | {word: index + 3 for index, word in enumerate(WORDS)}
CHOICES = ["w1", "w2", "w3"]
COUNT = 24


def contexts() -> list[list[str]]:
    rng = random.Random(0)
    return [rng.sample(WORDS, 5) for _ in range(COUNT)]


def write_model(folder: Path, model: LlamaForCausalLM) -> Path:
    plain = Tokenizer(models.WordLevel(IDS, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]", model_max_length=32
    ).save_pretrained(folder)
    return folder


def log_probabilities(model: LlamaForCausalLM, words: Sequence[str]) -> torch.Tensor:
    """Of every next token, after each word."""
    ids = torch.tensor([[IDS[word] for word in words]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
    return found


def answers(model: LlamaForCausalLM) -> list[int]:
    """What the model chooses, without lm-eval."""
    picked = [IDS[choice] for choice in CHOICES]
    return [int(log_probabilities(model, words)[-1, picked].argmax()) for words in contexts()]


def write_task(root: Path, name: str, labels: Sequence[int], **changes: Any) -> None:
    """A task file and its data."""
    data = root / f"{name}.jsonl"
    rows = [
        {"text": " ".join(words), "label": label} for words, label in zip(contexts(), labels, strict=True)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert and a peer, and a task that each expert solves wholly."""
    root = tmp_path_factory.mktemp("lm-eval")
    (root / "tasks").mkdir()
    write_model(root / "base", tiny_llama())
    for seed, name in ((1, "law"), (2, "code")):
        expert = perturb(tiny_llama(), seed, 0.1)
        write_model(root / name, expert)
        write_task(root / "tasks", f"{name}_questions", answers(expert))
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity", "higher_is_better": False}],
    }
    write_task(root / "tasks", "plain_text", [0] * COUNT, **rolling)
    (root / "tasks" / "both.yaml").write_text(
        yaml.safe_dump(
            {
                "group": "both",
                "task": ["law_questions", "code_questions"],
                "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
            }
        )
    )
    return root


def accuracy(model: LlamaForCausalLM, task: str) -> list[float]:
    expected = answers(perturb(tiny_llama(), {"law_questions": 1, "code_questions": 2}[task], 0.1))
    return [float(a == b) for a, b in zip(answers(model), expected, strict=True)]


def test_the_scores_of_base_and_expert(world: Path) -> None:
    evaluation = lm_eval_tasks(world / "law", world / "base", ["law_questions"], folder=world / "tasks")
    report = validate(world / "law", world / "base", evaluation=evaluation, level="behaviour")
    found = {v.id: v for v in report.verdicts}
    gain = 1 - sum(accuracy(tiny_llama(), "law_questions")) / COUNT
    assert gain > 0
    assert found["E302"].value == pytest.approx(gain)
    assert found["E302"].status == "passed"
    assert f"on {COUNT} examples" in found["E302"].message


@pytest.mark.slow
def test_merges_are_judged_by_all_tasks(world: Path) -> None:
    evaluation = lm_eval_tasks(
        world / "law", world / "base", ["law_questions", "code_questions"], folder=world / "tasks"
    )
    report = validate(world / "law", world / "base", peers=[world / "code"], evaluation=evaluation)
    found = {v.id: v for v in report.verdicts}
    assert "merged with 1 peers" in found["C402"].message
    assert {found[name].status for name in ("E304", "C402", "C403", "C404")} <= {"passed", "failed"}


def test_examples_one_by_one_and_nothing_else_changes(world: Path) -> None:
    evaluation = lm_eval_tasks(world / "law", world / "base", ["code_questions"], folder=world / "tasks")
    before = {name: value.clone() for name, value in evaluation.model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = evaluation.own(evaluation.model)["acc"]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert first == accuracy(perturb(tiny_llama(), 1, 0.1), "code_questions")
    assert 0 < sum(first) < COUNT
    assert first == evaluation.own(evaluation.model)["acc"]
    assert all(torch.equal(value, before[name]) for name, value in evaluation.model.state_dict().items())


def test_another_model_than_the_one_it_was_made_with(world: Path) -> None:
    evaluation = lm_eval_tasks(world / "law", world / "base", ["law_questions"], folder=world / "tasks")
    assert sum(evaluation.own(evaluation.model)["acc"]) == COUNT
    assert evaluation.own(tiny_llama())["acc"] == accuracy(tiny_llama(), "law_questions")


def test_a_group_is_all_of_its_examples(world: Path) -> None:
    evaluation = lm_eval_tasks(world / "law", world / "base", ["both"], folder=world / "tasks")
    found = evaluation.own(evaluation.model)["acc"]
    expert = perturb(tiny_llama(), 1, 0.1)
    assert sorted(found) == sorted(accuracy(expert, "law_questions") + accuracy(expert, "code_questions"))


def test_a_figure_that_is_no_mean_stands_alone(world: Path) -> None:
    evaluation = lm_eval_tasks(world / "law", world / "base", ["plain_text"], folder=world / "tasks")
    assert (evaluation.metric, evaluation.greater_is_better) == ("word_perplexity", False)
    model, total = perturb(tiny_llama(), 1, 0.1), 0.0
    for words in contexts():
        after = log_probabilities(model, ["[END]", *words])  # what lm-eval puts before a text
        total += sum(float(after[i, IDS[word]]) for i, word in enumerate(words))
    found = evaluation.own(evaluation.model)["word_perplexity"]
    assert found == pytest.approx(math.exp(-total / (5 * COUNT)), rel=1e-4)


def test_few_shot_examples_are_the_same_each_time(world: Path, tmp_path: Path) -> None:
    labels = answers(perturb(tiny_llama(), 1, 0.1))
    few = {"num_fewshot": 1, "fewshot_split": "test", "doc_to_text": "{{text}}", "fewshot_delimiter": " "}
    write_task(tmp_path, "shots", labels, **few)
    evaluation = lm_eval_tasks(world / "law", world / "base", ["shots"], folder=tmp_path)
    first = evaluation.own(evaluation.model)["acc"]
    assert 0 < sum(first) < COUNT
    assert all(evaluation.own(evaluation.model)["acc"] == first for _ in range(3))


def test_a_limit(world: Path) -> None:
    folder = world / "tasks"
    evaluation = lm_eval_tasks(world / "law", world / "base", ["code_questions"], folder=folder, limit=7)
    assert (
        evaluation.own(evaluation.model)["acc"]
        == accuracy(perturb(tiny_llama(), 1, 0.1), "code_questions")[:7]
    )


def test_from_the_command_line(world: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--eval", "lm-eval:law_questions", "--eval-tasks", world / "tasks", "--eval-limit", 20)
    done = run(
        "validate", world / "law", "-b", world / "base", *arguments, "--level", "behaviour", "-o", report
    )
    assert done.exit_code == 0, done.output
    [verdict] = [v for v in json.loads(report.read_text())["verdicts"] if v["id"] == "E302"]
    assert "on 20 examples" in verdict["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--eval", "lm-eval:law_questions"), "lacks --base"),
        (("--eval-limit", 3), "--eval-limit is about --eval lm-eval:TASK"),
        (("--eval", "module:function", "--eval-tasks", "tasks"), "--eval-tasks is about"),
        (("--base", "base", "--eval", "lm-eval:"), "names no task"),
    ],
)
def test_options_that_do_not_fit(
    arguments: tuple[object, ...], said: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    done = run("validate", "law", *arguments)
    assert done.exit_code == 2
    assert said in done.output


def test_what_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    def refused(said: str, tasks: Sequence[str], folder: Path = world / "tasks", **options: Any) -> None:
        with pytest.raises(OptionError, match=said):
            lm_eval_tasks(world / "law", world / "base", tasks, folder=folder, **options)

    refused("names no task", [])
    refused("`limit` must be at least 1, not 0", ["law_questions"], limit=0)
    refused("`batch_size` must be at least 1", ["law_questions"], batch_size=0)
    refused("gone is no folder", ["law_questions"], world / "gone")
    refused(
        r"do not share a metric \(law_questions: acc, plain_text: word_perplexity",
        ["law_questions", "plain_text"],
    )
    refused("do not share a metric", ["law_questions"], metric="f1")
    write_task(tmp_path, "lost", [0] * COUNT)
    (tmp_path / "lost.jsonl").unlink()
    refused("the task lost does not load", ["lost"], tmp_path)


@pytest.mark.slow
def test_an_unknown_task_is_named(world: Path) -> None:
    """Slow, since lm-eval reads all of its task files to know that it has none of that name."""
    tasks = ["law_questions", "no_such_task"]
    with pytest.raises(OptionError, match=r"no tasks no_such_task, nor does .*tasks\. `lm-eval ls"):
        lm_eval_tasks(world / "law", world / "base", tasks, folder=world / "tasks")


def test_a_classifier_is_no_language_model(world: Path, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(OptionError, match="does not load as a causal language model"):
        lm_eval_tasks(tmp_path / "bert", world / "base", ["law_questions"], folder=world / "tasks")
