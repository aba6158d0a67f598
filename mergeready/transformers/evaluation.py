from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers import ProgressCallback, Seq2SeqTrainer, Trainer

from mergeready.merging.evaluation import Values


def evaluate_with(trainer: Trainer, metric: str | None = None) -> Mapping[str, Values]:
    """The Trainer's evaluation without its events and logging, and one metric of it if the choice is clear.

    Args:
        trainer: The Trainer.
        metric: The metric that is wanted; by default the one that chooses its best model, or the only one beside the
            loss.
    """
    if isinstance(trainer, Seq2SeqTrainer):
        _generate_as_configured(trainer)
    # `evaluate` would fire on_evaluate again and log the merged model as if it were the expert.
    with _own_figures_kept(trainer):
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(),
            description="Probe",
            prediction_loss_only=trainer.compute_metrics is None or None,
            metric_key_prefix="eval",
        )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):  # it opened a bar that only on_evaluate would close
            callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    if not output.num_samples:
        return {"loss": []}
    metrics = {name.removeprefix("eval_"): value for name, value in (output.metrics or {}).items()}
    metrics.pop("model_preparation_time", None)
    wanted = metric or (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    others = [name for name in metrics if name != "loss"]
    if wanted in metrics:
        metrics = {wanted: metrics[wanted]}
    elif metric is None and len(others) <= 1:
        metrics = {name: metrics[name] for name in others or ["loss"]}
    return {name: _by_example(value, output) for name, value in metrics.items()}


def _generate_as_configured(trainer: Seq2SeqTrainer) -> None:
    """What its ``evaluate`` does before it calls the one that it inherits."""
    args = trainer.args
    given = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
    trainer._gen_kwargs = {name: value for name, value in given.items() if value is not None}
    trainer.gather_function = (
        trainer.accelerator.gather
    )  # generated sequences are not cut to the dataset's end


@contextmanager
def _own_figures_kept(trainer: Trainer) -> Iterator[None]:
    """What TRL's trainers note of passes inside, for their next log, is of merged models: it is dropped afterwards."""
    figures = getattr(trainer, "_metrics", None)
    if not (isinstance(figures, dict) and "eval" in figures):
        yield
        return
    kept = copy.deepcopy(figures["eval"])
    try:
        yield
    finally:
        figures["eval"] = kept


def _by_example(value: float, output: Any) -> Values:
    """The accuracy of each example, where that is what the metric turns out to be; else the metric as it is."""
    predictions, labels = output.predictions, output.label_ids
    if not (isinstance(predictions, np.ndarray) and isinstance(labels, np.ndarray)):
        return value
    if predictions.ndim != 2 or labels.shape != predictions.shape[:1]:
        return value
    right = (predictions.argmax(1) == labels).astype(np.float64)
    return right if abs(float(right.mean()) - value) < 1e-9 else value
