"""Supervised fine-tuning of a causal model with TRL; the probe merges by the loss of both tasks.

The task of this run: say what kind of thing a definition is of. The peer's: say which field it belongs to.
"""

import argparse

import torch
from languages import QUIET, RUNS, show
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from mergeready import Peer, Probe, Schedule
from mergeready.demo.samples import definitions
from mergeready.recipes import tiny
from mergeready.transformers import MergeReadyCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="fewer steps")
steps = 24 if parser.parse_args().quick else 200

tokenizer = AutoTokenizer.from_pretrained(tiny.llama())


def loss(task):
    """The loss of each of 24 held-out answers, per token."""
    rows = definitions(task)["validation"].select(range(24))
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    batch = tokenizer([row["prompt"] + row["completion"] for row in rows], padding=True, return_tensors="pt")
    answer = batch["attention_mask"].bool()
    for row, length in enumerate(prompts):
        answer[row, :length] = False
    labels = batch["input_ids"].masked_fill(~answer, -100)[:, 1:]

    def evaluate(model):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1].transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses.sum(1) / (labels != -100).sum(1)}

    return evaluate


def tune(task, callbacks):
    config = SFTConfig(
        str(RUNS / f"trl-{task}"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_length=160,
        bf16=False,
        **QUIET,
    )
    model = AutoModelForCausalLM.from_pretrained(tiny.llama())
    data = definitions(task)["train"]
    trainer = SFTTrainer(
        model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


tune("wordnet_topic", []).save_model(str(RUNS / "trl-peer"))
callback = MergeReadyCallback(
    base=tiny.llama(),
    peers=[Peer(RUNS / "trl-peer", evaluate=loss("wordnet_topic"), name="topic")],
    probe=Probe(merge="ties", evaluate=loss("wordnet_noun"), schedule=Schedule(every=steps // 4)),
)
tune("wordnet_noun", [callback])
print("loss, so smaller is better")
show(callback.history)
