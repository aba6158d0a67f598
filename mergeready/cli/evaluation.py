"""Which evaluation the options of ``validate`` ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergeready.errors import OptionError, listing

if TYPE_CHECKING:
    from mergeready.validation import Evaluation

LM_EVAL = "lm-eval:"


def choose_evaluation(
    expert: str,
    base: str | None,
    target: str | None,
    *,
    data: Path | None,
    pipeline: str | None,
    tasks: Path | None,
    limit: int | None,
) -> Evaluation | None:
    """A user's function, tasks of lm-eval, or a pipeline on a folder of examples; None where none is asked for.

    Raises:
        OptionError: If options contradict each other, have no effect or lack another.
    """
    by_pipeline = data is not None or pipeline is not None
    harness = target is not None and target.startswith(LM_EVAL)
    if by_pipeline and target is not None:
        raise OptionError("--eval and --eval-data are two ways to say the same: pass one of them.")
    unused = [
        name for name, value in {"--eval-tasks": tasks, "--eval-limit": limit}.items() if value is not None
    ]
    if unused and not harness:
        raise OptionError(f"{listing(unused)} is about --eval {LM_EVAL}TASK, which is missing.")
    if by_pipeline:
        return _by_pipeline(expert, base, data, pipeline)
    if target is None:
        return None
    if base is None:
        raise OptionError("an evaluation lacks --base.")
    if not harness:
        from mergeready.validation.evaluation import load_evaluation

        return load_evaluation(target, base)
    from mergeready.transformers.lm_eval_tasks import lm_eval_tasks

    names = [name.strip() for name in target.removeprefix(LM_EVAL).split(",") if name.strip()]
    return lm_eval_tasks(expert, base, names, folder=tasks, limit=limit)


def _by_pipeline(expert: str, base: str | None, data: Path | None, pipeline: str | None) -> Evaluation:
    if data is None or pipeline is None or base is None:
        given = {"--eval-data": data, "--pipeline": pipeline, "--base": base}
        missing = [name for name, value in given.items() if value is None]
        raise OptionError(f"an evaluation by a pipeline lacks {listing(missing)}.")
    from mergeready.transformers.pipelines import text_classification

    return text_classification(expert, base, data)
