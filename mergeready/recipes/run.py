"""Running a recipe: a Trainer of transformers or TRL with our callback, from the start or from where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mergeready.merging.evaluation import Evaluate, call_evaluation, choose_metric, take_score
from mergeready.recipes.causal_lm import prepare_causal_lm
from mergeready.recipes.image_classification import prepare_image_classification
from mergeready.recipes.prepared import Prepared
from mergeready.recipes.recipe import Recipe
from mergeready.recipes.result import RESULT_NAME, RunResult, read_result, write_result
from mergeready.recipes.resume import checkpoint_state, claim, is_over, newest_checkpoint, stop_reason
from mergeready.recipes.tasks import CausalLM, ImageClassification
from mergeready.recipes.text_classification import prepare_text_classification
from mergeready.training.peers import PeerLike
from mergeready.training.save import save_expert
from mergeready.transformers import FOLDER_NAME, MergeReadyCallback
from mergeready.weights.atomic import new_folder
from mergeready.weights.ranks import is_first_process

EXPERT_NAME = "expert"


def run_recipe(recipe: Recipe) -> RunResult:
    """Train as a recipe says; go on where an earlier run of it was interrupted.

    The recipe's folder then holds ``expert/`` (the last weights), ``mergeready/`` (history and picks), ``result.json``
    and the recipe itself.

    Raises:
        MergeReadyError: If model, data, peers or evaluation are not as the recipe says, or the folder holds
            another run.
    """
    folder = claim(recipe)
    if (folder / RESULT_NAME).is_file():
        return read_result(folder)
    run = Run(recipe, prepare(recipe))
    run.train()
    return run.finish()


def prepare(recipe: Recipe) -> Prepared:
    """Load everything and build the Trainer.

    Raises:
        OptionError: If model or data are not as the recipe says.
    """
    task = recipe.task
    if isinstance(task, CausalLM):
        return prepare_causal_lm(recipe, task)
    if isinstance(task, ImageClassification):
        return prepare_image_classification(recipe, task)
    return prepare_text_classification(recipe, task)


class Run:
    """One expert's run, whole or in parts.

    Args:
        recipe: The recipe.
        prepared: Its Trainer and evaluations.
    """

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        self.recipe, self.prepared = recipe, prepared
        self.folder = Path(recipe.output)

    @property
    def base(self) -> Any:
        """The weights that training started from; None for adapters of language models, which hold them all.

        A classifier's new head is no part of them: members of a team have heads of different sizes.
        """
        if isinstance(self.recipe.task, CausalLM) and self.recipe.task.lora is not None:
            return self.recipe.mergeready.base
        return self.recipe.mergeready.base or self.prepared.base

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        arguments = self.prepared.trainer.args
        if arguments.max_steps > 0:
            return int(arguments.max_steps)
        # As the Trainer counts: parts of batches, and of accumulated steps, are whole ones.
        examples = len(self.prepared.trainer.train_dataset)
        batches = math.ceil(examples / (arguments.train_batch_size * arguments.world_size))
        steps = math.ceil(batches / arguments.gradient_accumulation_steps)
        total: int = math.ceil(arguments.num_train_epochs * steps)
        return total

    def train(self, until: int | None = None, peers: Sequence[PeerLike] = ()) -> None:
        """Train to the end, or until a step, from the newest checkpoint if there is one.

        Args:
            until: Save a checkpoint after this step and return.
            peers: Further peers, beside the recipe's.
        """
        checkpoint = newest_checkpoint(self.folder)
        state = None if checkpoint is None else checkpoint_state(checkpoint)
        if state is not None and (is_over(state) or (until is not None and state["global_step"] >= until)):
            # A Trainer that is resumed at its last step takes one more.
            self.prepared.trainer._load_from_checkpoint(str(checkpoint))
            return
        trainer = self.prepared.trainer
        trainer.add_callback(MergeReadyCallback(**self._options(peers)))
        if until is not None:
            trainer.add_callback(_Until(until))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def finish(self) -> RunResult:
        """Write the expert, evaluate it, and write the result."""
        trainer, model = self.prepared.trainer, self.prepared.trainer.model
        if not (self.folder / EXPERT_NAME).is_dir():
            if is_first_process():
                with new_folder(self.folder / EXPERT_NAME) as temporary:
                    save_expert(model, temporary, self.prepared.processor)
            else:
                save_expert(model, self.folder / EXPERT_NAME, self.prepared.processor)
        scores = {
            split: self._score(function, split) for split, function in self.prepared.evaluations.items()
        }
        metric = next(iter(scores.values()))[0] if scores else None
        # A run that was over before has no state in its Trainer.
        checkpoint = newest_checkpoint(self.folder)
        state = (None if checkpoint is None else checkpoint_state(checkpoint)) or {}
        result = RunResult(
            metric=metric,
            scores={split: value for split, (_, value) in scores.items()},
            expert=EXPERT_NAME,
            steps=max(trainer.state.global_step, state.get("global_step", 0)),
            stopped=stop_reason(state),
            picks=_picks(self.folder),
        )
        if is_first_process():
            write_result(self.folder, result)
        return result

    def _options(self, peers: Sequence[PeerLike]) -> dict[str, Any]:
        options: dict[str, Any] = dict(self.recipe.mergeready.options())
        probe = options.get("probe")
        if probe is not None and probe.evaluate is None:
            options["probe"] = replace(probe, evaluate=self.prepared.evaluations["validation"])
        options["peers"] = [*options["peers"], *peers]
        options["base"] = self.base
        return options

    def _score(self, function: Evaluate, split: str) -> tuple[str, float]:
        model = self.prepared.trainer.model
        found = call_evaluation(function, model, split)
        probe = self.recipe.mergeready.probe
        metric = choose_metric(found, probe.metric if probe else None, split)
        return metric, take_score(found, metric, split).value


class _Until(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Ends a part of a run with a checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= self._step:
            control.should_save = control.should_training_stop = True


def _picks(folder: Path) -> dict[str, str]:
    path = folder / FOLDER_NAME / "picks" / "picks.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {label: f"{FOLDER_NAME}/picks/{pick['folder']}" for label, pick in index.items() if pick["folder"]}
