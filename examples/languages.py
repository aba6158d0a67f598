"""What the examples share: a tiny base, and two tasks on sentences that come with mergeready.

The base is a two-layer BERT that reads characters. It was trained to tell other languages apart. The task `north` tells
four languages apart, the task `south` four others; both share one head of eight classes, so that experts can be merged.
"""

from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertForSequenceClassification
from transformers.utils import logging

from mergeready.demo.samples import texts
from mergeready.recipes import tiny

disable_progress_bars()
logging.disable_progress_bar()
logging.set_verbosity_error()

RUNS = Path("example-runs")
QUIET = {
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
}
"""Arguments of a Trainer on the processor whose only output is what the scripts print."""
TASKS = {
    "north": ["Dutch", "English", "Finnish", "Polish"],
    "south": ["Basque", "French", "Swahili", "Turkish"],
}
CLASSES = TASKS["north"] + TASKS["south"]
OTHERS = ["Afrikaans", "Albanian", "Estonian", "Hungarian", "Indonesian", "Italian", "Latin", "Spanish"]
SENTENCES = texts("udhr")


def examples(task: str, split: str, classes: list[str] | None = None) -> Dataset:
    """Columns input_ids, attention_mask and labels."""
    classes = classes or CLASSES
    data = SENTENCES[split]
    name = [label.split()[1] for label in data.features["label"].names]
    wanted = OTHERS if task == "others" else TASKS[task]
    rows = [(row["text"], name[row["label"]]) for row in data if name[row["label"]] in wanted]
    tokens = AutoTokenizer.from_pretrained(tiny.text())(
        [text for text, _ in rows], padding="max_length", truncation=True, max_length=64
    )
    columns = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    labels = [classes.index(language) for _, language in rows]
    return Dataset.from_dict({**columns, "labels": labels}).with_format("torch")


def loader(task: str, split: str = "train", batch_size: int = 16) -> DataLoader:
    return DataLoader(examples(task, split), batch_size, shuffle=True)


def accuracy(task: str, split: str = "validation"):
    """An evaluation: 1.0 for each sentence whose language is found among the task's four."""
    batch = examples(task, split)[:]
    labels = batch.pop("labels")
    first = CLASSES.index(TASKS[task][0])

    def evaluate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        logits = model(**batch).logits[:, first : first + 4]
        return {"accuracy": (logits.argmax(1) + first == labels).float()}

    return evaluate


def loss(task: str, split: str = "validation"):
    """An evaluation: the loss of each sentence among the task's four languages; smoother than accuracy."""
    batch = examples(task, split)[:]
    first = CLASSES.index(TASKS[task][0])
    labels = batch.pop("labels") - first

    def evaluate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        logits = model(**batch).logits[:, first : first + 4]
        return {"loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none")}

    return evaluate


def fit(
    model: torch.nn.Module,
    data: Dataset,
    steps: int,
    learning_rate: float = 3e-3,
    first: int = 0,
    count: int = 8,
) -> None:
    """Train on a loss among ``count`` classes from the ``first`` one on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        batch = dict(data[torch.randint(len(data), (16,))])
        labels = batch.pop("labels") - first
        logits = model(**batch).logits[:, first : first + count]
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_base() -> Path:
    """The folder of the base; made once."""
    folder = RUNS / "base"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(tiny.text(), num_labels=len(OTHERS))
        fit(model, examples("others", "train", OTHERS), steps=200)
        fresh = BertForSequenceClassification.from_pretrained(tiny.text(), num_labels=len(CLASSES))
        fresh.bert.load_state_dict(model.bert.state_dict())
        fresh.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny.text()).save_pretrained(folder)
    return folder


def load_model() -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(make_base()).train()


def make_expert(task: str, steps: int = 60) -> Path:
    """The folder of an expert that somebody else trained; made once.

    Its loss leaves the other task's classes alone: pushing them down is what would harm a merge most.
    """
    folder = RUNS / task
    if not (folder / "model.safetensors").exists():
        model = load_model()
        torch.manual_seed(1)
        fit(model, examples(task, "train"), steps, 1e-3, CLASSES.index(TASKS[task][0]), len(TASKS[task]))
        model.save_pretrained(folder)
    return folder


def show(history) -> None:
    """The expert and the merged model side by side, probe by probe; > where the best scale may lie further out."""
    print("step  " + "expert".rjust(8) + "".join(f"{name:>18}  scale" for name in history.methods))
    for probe in history.probes:
        merges = "".join(
            f"{found.merged:18.3f} {' ' if found.inside else '>'}{found.scale:5.2f}"
            for found in probe.merges.values()
        )
        print(f"{probe.step:4}  {probe.expert.value:8.3f}{merges}")
