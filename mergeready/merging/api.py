from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from mergeready.errors import OptionError, listing
from mergeready.experts.base import Base
from mergeready.experts.open import ExpertLike, open_experts, require_experts
from mergeready.merging.double import Arithmetic
from mergeready.merging.evaluation import Evaluate
from mergeready.merging.folders import Progress, merge_folders
from mergeready.merging.memory import merge_state, with_state
from mergeready.merging.parameter import check_dtype
from mergeready.merging.plan import merge_plan
from mergeready.merging.registry import MethodLike
from mergeready.merging.settings import MergeSettings
from mergeready.merging.statistics import Statistics, check_statistics
from mergeready.merging.tune import tune_scale
from mergeready.weights.atomic import require_free

logger = logging.getLogger("mergeready")


@overload
def merge(
    base: str | Path,
    experts: Sequence[ExpertLike],
    method: MethodLike = ...,
    *,
    output: str | Path,
    **options: Any,
) -> Path: ...
@overload
def merge(
    base: Mapping[str, Tensor], experts: Sequence[ExpertLike], method: MethodLike = ..., **options: Any
) -> dict[str, Tensor]: ...
@overload
def merge(
    base: nn.Module, experts: Sequence[ExpertLike], method: MethodLike = ..., **options: Any
) -> nn.Module: ...


def merge(
    base: str | Path | Mapping[str, Tensor] | nn.Module,
    experts: Sequence[ExpertLike],
    method: MethodLike = "task_arithmetic",
    *,
    output: str | Path | None = None,
    scale: float | Literal["tune"] = 1.0,
    weights: Sequence[float] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
    statistics: Statistics = "base",
    strict: bool = True,
    overwrite: bool = False,
    arithmetic: Arithmetic = "float32",
    shard_bytes: int | None = None,
    memory: int | None = None,
    threads: int | None = None,
    distributed: bool | None = None,
    progress: Progress | None = None,
    evaluate: Evaluate | Mapping[str, Evaluate] | None = None,
    metric: str | None = None,
    model: nn.Module | None = None,
    **parameters: Any,
) -> Path | dict[str, Tensor] | nn.Module:
    """Merge experts of one base, and return what the base was given as.

    Args:
        base: A folder or hub id, a state dict, or a module. Decides what is returned.
        experts: Experts of any kind, mixed as you like: folders, hub ids, adapters, state dicts, modules.
        method: A merge method's name, or a method with its parameters.
        output: The folder to write; needed if and only if the base is a folder or hub id.
        scale: Factor on the merged delta: ``merged = base + scale · method(deltas)``. ``"tune"`` finds the best one
            with ``evaluate``, as :func:`tune_scale` does (call that to see what was tried), and warns where the
            optimum may lie beyond what was tried, or is the base itself.
        weights: One factor an expert; 1 each by default.
        overrides: What differs for groups of parameters: a regular expression on parameter names to ``method``,
            ``scale``, ``weights`` or method parameters, as in ``{"embed": {"scale": 0.3}}``. The first match counts;
            one that matches no parameter is an error, unless it says ``"required": False``.
        dtype: Floating dtype of the result; the base's own by default. Not for modules.
        statistics: Where running statistics come from: ``base`` or ``average``.
        strict: Refuse experts whose parameter names differ from the base's; see ``open_expert``.
        overwrite: Replace ``output`` if it exists.
        arithmetic: Dtype of sums. This and the next five are for folders; see ``merge_folders``.
        shard_bytes: Upper size of one file in bytes.
        memory: Most memory in bytes that tensors may take together.
        threads: Number of threads.
        distributed: Whether to share the work with other ranks.
        progress: Told how many bytes have been moved, and of how many.
        evaluate: For ``scale="tune"``: an evaluation on validation data, or one a task.
        metric: For ``scale="tune"``: which of the returned metrics, where there are several.
        model: For ``scale="tune"``: a model of the base's architecture to evaluate in, if the base is not one itself.
        **parameters: The method's parameters, such as ``density=0.2``.

    Returns:
        The output folder's path, a new state dict, or a new module.

    Raises:
        MergeReadyError: With the name of what is wrong and how to mend it; see ``merge_folders``.

    Example:
        >>> base = {"layer.weight": torch.zeros(2, 2)}
        >>> expert = {"layer.weight": torch.ones(2, 2)}
        >>> merge(base, [expert], scale=0.5)["layer.weight"]
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    require_experts(experts)
    if scale != "tune" and any(given is not None for given in (evaluate, metric, model)):
        raise OptionError('`evaluate`, `metric` and `model` belong to `scale="tune"`.')
    tune = partial(
        _tuned_scale, base, experts, method, evaluate, metric, model, weights=weights, overrides=overrides
    )
    for_folders: dict[str, Any] = {
        "shard_bytes": shard_bytes,
        "memory": memory,
        "threads": threads,
        "distributed": distributed,
        "progress": progress,
    }
    given = {name: value for name, value in for_folders.items() if value is not None}
    if isinstance(base, str | Path):
        if output is None:
            raise OptionError("`output` is needed to merge folders: name the folder to write.")
        options: dict[str, Any] = {
            "weights": weights,
            "overrides": overrides,
            "dtype": dtype,
            "statistics": statistics,
            "strict": strict,
            "arithmetic": arithmetic,
            **parameters,
        }
        if scale == "tune":  # what would stop the merge stops it before the search
            require_free(Path(output), overwrite)
            merge_plan(base, experts, method, **options, **_for_plans(given))
            scale = tune(**parameters)
        return merge_folders(
            base, experts, output, method, scale=scale, overwrite=overwrite, **options, **given
        )
    given |= {} if output is None else {"output": output}
    given |= {} if arithmetic == "float32" else {"arithmetic": arithmetic}
    if given:
        names = listing(f"`{name}`" for name in given)
        raise OptionError(f"only merges of folders have {names}; this one returns its result.")
    if isinstance(base, nn.Module) and dtype is not None:
        raise OptionError("`dtype` cannot be chosen for a module; convert the base first.")
    first = 1.0 if scale == "tune" else scale
    settings = MergeSettings.make(
        method, len(experts), scale=first, weights=weights, overrides=overrides, **parameters
    )
    check_dtype(dtype)
    check_statistics(statistics)
    opened_base = Base.open(base)
    opened = open_experts(experts, opened_base, strict=strict)
    if scale == "tune":
        settings = settings.with_scale(tune(**parameters))
    state = merge_state(opened_base, opened, settings, dtype=dtype, statistics=statistics)
    return with_state(base, state) if isinstance(base, nn.Module) else state


def _for_plans(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("distributed", "progress")}


def _tuned_scale(
    base: str | Path | Mapping[str, Tensor] | nn.Module,
    experts: Sequence[ExpertLike],
    method: MethodLike,
    evaluate: Evaluate | Mapping[str, Evaluate] | None,
    metric: str | None,
    model: nn.Module | None,
    **options: Any,
) -> float:
    if evaluate is None:
        raise OptionError('`scale="tune"` needs `evaluate`: a function from a model to metrics by name.')
    if model is None:
        if not isinstance(base, nn.Module):
            raise OptionError(
                '`scale="tune"` needs `model`: a model of the base\'s architecture to evaluate in.'
            )
        model = copy.deepcopy(base)
    tuned = tune_scale(model, base, experts, evaluate, method, metric=metric, **options)
    tried = ", ".join(f"{scale:g}" for scale in tuned.tried if scale)
    if not tuned.scale:
        logger.warning(
            "no merge at the scales that were tried (%s) is better than the base with its %s of %.4g: the result is "
            "the base itself",
            tried,
            tuned.metric,
            tuned.value,
        )
    elif not tuned.inside:
        logger.warning(
            "the best scale may lie beyond those tried (%s): %s %.4g is a bound",
            tried,
            tuned.metric,
            tuned.value,
        )
    return tuned.scale
