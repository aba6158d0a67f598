from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import transformers

from mergeready.demo.encoder import encoder_folder
from mergeready.demo.events import Listener
from mergeready.demo.experts import TrainedExpert, prepare, train_expert, train_joint
from mergeready.demo.figure import draw
from mergeready.demo.results import DemoResults, Scorer, compile_results
from mergeready.demo.settings import DemoSettings
from mergeready.demo.tasks import load_tasks
from mergeready.errors import OutputExistsError
from mergeready.weights.atomic import new_file

RESULTS_NAME = "results.json"


def run_demo(output: Path, settings: DemoSettings, listener: Listener) -> tuple[DemoResults, list[Path]]:
    """Train the experts one after the other, each with the earlier ones as peers; merge; compare; draw.

    Args:
        output: The run folder, made here: one folder an expert, ``results.json`` and the picture.
        settings: How long and how carefully.
        listener: Is told what happens.

    Returns:
        The final table, and the picture's files.

    Raises:
        OutputExistsError: If the run folder exists.
    """
    if output.exists():
        raise OutputExistsError(f"{output} exists. Name another output folder, or delete it.")
    _quieten_libraries()
    began = time.perf_counter()
    base = encoder_folder()
    tasks = prepare(load_tasks(), base, settings)
    experts: list[TrainedExpert] = []
    for prepared in tasks:
        # The peers of an expert are what others would have shared: the picks of those trained before.
        peers = [
            (other, expert.picks[settings.methods[0]])
            for other, expert in zip(tasks[: len(experts)], experts, strict=True)
        ]
        folder = output / prepared.task.name
        experts.append(train_expert(prepared, peers, base, folder, settings, listener))
    joint = None
    if settings.joint:
        listener.working_on("one model on all tasks")
        joint = train_joint(tasks, base, output / "joint", settings)
    listener.working_on("merging ends and picks")
    scorer = Scorer(base, tasks)
    results = compile_results(scorer, tasks, experts, joint, settings.methods, settings.steps, began)
    pictures = draw(experts, results, settings.methods[0], output)
    with new_file(output / RESULTS_NAME) as temporary:
        content = {"settings": asdict(settings), "results": results.to_json()}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return results, pictures


def _quieten_libraries() -> None:
    """The demo has a display of its own, which the libraries' bars and notes would tear apart."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
