"""An evaluation and a model that recipes in tests name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, BertModel

from mergeready.recipes import tiny


def constant(data: Any, split: str, processor: Any, value: float) -> Callable[[Any], dict[str, float]]:
    return lambda model: {"score": value, "examples": float(len(data[split]))}


def distance(data: Any, split: str, processor: Any) -> Callable[[Any], dict[str, float]]:
    """How far an encoder is from the tiny one that it was made of, and what else somebody may want to know."""
    before = BertModel.from_pretrained(tiny.text()).encoder.layer[0].output.dense.weight.detach()

    def evaluate(model: Any) -> dict[str, float]:
        weight = model.bert.encoder.layer[0].output.dense.weight
        return {"distance": float((weight - before).norm()), "rows": float(len(data[split]))}

    return evaluate


def model() -> BertForSequenceClassification:
    """A model of which every weight is drawn."""
    config = BertConfig(
        vocab_size=110,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=38,
    )
    return BertForSequenceClassification(config)
