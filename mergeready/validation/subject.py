"""What is validated, opened step by step; each step is tried once, and checks that need a failed one are not run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from mergeready.errors import (
    FormatError,
    MergeReadyError,
    NonFiniteError,
    NotTrainedError,
    OptionError,
    listing,
)
from mergeready.experts.adapter_folder import (
    AdapterConfig,
    AdapterFormat,
    adapter_format,
    explain_missing_weights,
    open_adapter_weights,
    read_adapter_config,
)
from mergeready.experts.base import Base
from mergeready.experts.fingerprint import Fingerprint, is_fingerprint, open_fingerprint
from mergeready.experts.open import Expert, ExpertLike, open_expert
from mergeready.experts.peft_config import CONFIG_NAME
from mergeready.experts.task_vector import squared_norms
from mergeready.merging.evaluation import (
    Score,
    Values,
    call_evaluation,
    choose_metric,
    is_greater_better,
    run_evaluation,
    take_score,
)
from mergeready.merging.in_place import MergedInPlace
from mergeready.merging.provenance import public_name
from mergeready.merging.tune import TunedScale
from mergeready.metrics.all_pairs import EstimatedComparison, compare_fingerprints
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.validation.check import NotCheckedError
from mergeready.validation.evaluation import OWN, Evaluation
from mergeready.weights.json_file import read_json_object
from mergeready.weights.open import WeightsLike, open_weights, resolve_folder
from mergeready.weights.source import WeightSource

T = TypeVar("T")


class once(Generic[T]):  # noqa: N801 - used like a property
    """A property that is computed at the first access; what it raised is raised again at the next."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        functools.update_wrapper(self, compute)  # type: ignore[arg-type]

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_once_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> once[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> once[T] | T:
        if instance is None:
            return self
        if self._name not in vars(instance):
            try:
                vars(instance)[self._name] = (self._compute(instance), None)
            except (MergeReadyError, NotCheckedError) as failure:
                vars(instance)[self._name] = (None, failure)
        value, problem = vars(instance)[self._name]
        if problem is not None:
            raise problem
        result: T = value
        return result


def _is_same(peer: str | Path, folder: Path) -> bool:
    path = Path(peer).expanduser()
    return path.exists() and path.samefile(folder)


class Subject:
    """An expert under validation.

    Args:
        expert: Its folder or hub id.
        base: Its base; without one, only its files are checked.
        peers: Other experts on the base, or their fingerprints.
        evaluation: How to look at its behaviour.
        revision: Commit, tag or branch of a hub id.

    Raises:
        FormatError: If there is nothing to validate.
        OptionError: If it is one of its own peers, beside which it would keep more than beside others.
    """

    def __init__(
        self,
        expert: str | Path,
        base: WeightsLike | Base | None = None,
        peers: Sequence[ExpertLike | Fingerprint] = (),
        *,
        evaluation: Evaluation | None = None,
        revision: str | None = None,
    ) -> None:
        self.label = str(expert)
        self.revision = revision
        self.folder = resolve_folder(expert, revision=revision)
        self.is_local = Path(expert).expanduser().exists()
        if not self.folder.is_dir():
            raise FormatError(f"{expert} is a file. Name the folder of the expert.")
        itself = [str(peer) for peer in peers if isinstance(peer, str | Path) and _is_same(peer, self.folder)]
        if itself:
            raise OptionError(f"{listing(itself)} is the expert itself. Leave it out of its peers.")
        self.given_base, self.given_peers = base, list(peers)
        self._evaluation = evaluation
        self.tuned: dict[str, TunedScale] = {}

    @once
    def adapter_fields(self) -> Mapping[str, Any] | None:
        """The content of ``adapter_config.json``; None for a full model."""
        return read_json_object(self.folder / CONFIG_NAME) if (self.folder / CONFIG_NAME).is_file() else None

    @once
    def model_fields(self) -> Mapping[str, Any]:
        """The content of ``config.json``; empty where there is none."""
        path = self.folder / "config.json"
        return read_json_object(path) if path.is_file() else {}

    @once
    def adapter_kind(self) -> AdapterFormat | None:
        """The library whose adapter this is; None for a full model."""
        if self.adapter_fields is None:
            return None
        kind = adapter_format(self.adapter_fields)
        if kind is None:
            raise FormatError(f"{CONFIG_NAME} is of no known library: neither PEFT, nor AdapterHub, nor MLX.")
        return kind

    @once
    def adapter_config(self) -> AdapterConfig | None:
        """The adapter's checked configuration; None for a full model."""
        return None if self.adapter_kind is None else read_adapter_config(self.folder)

    @once
    def source(self) -> WeightSource:
        """The expert's own tensors, as its files hold them."""
        if self.adapter_kind is not None:
            return open_adapter_weights(self.folder, self.adapter_kind, self.label, allow_pickle=False)
        if not (self.folder / "config.json").is_file():
            explain_missing_weights(self.folder, self.label)
        return open_weights(self.folder)

    @once
    def base(self) -> Base:
        """The base."""
        if self.given_base is None:
            raise NotCheckedError("no base was given")
        return Base.open(self.given_base)

    @once
    def expert(self) -> Expert:
        """The expert relative to its base; parameters that only one of them has are left out."""
        return open_expert(self.folder, self.base, strict=False)

    @once
    def squares(self) -> Mapping[str, float]:
        """‖τ‖² by base parameter name."""
        return squared_norms(self.expert.vector)

    @once
    def changed(self) -> Mapping[str, float]:
        """‖τ‖² by name of the parameters that it changed; not known where D200 fails."""
        try:
            found = {name: square for name, square in self.squares.items() if square > 0}
        except (NonFiniteError, NotTrainedError) as error:
            raise NotCheckedError("D200 failed") from error
        if not found:
            raise NotCheckedError("D200 failed")
        return found

    @once
    def pairs(self) -> EstimatedComparison:
        """The expert, first, beside its peers, from fingerprints of all of them."""
        if not self.given_peers:
            raise NotCheckedError("no peers were given")
        own = take_fingerprint(self.expert.vector, self.base, label=public_name(self.label), subspaces=False)
        return compare_fingerprints([own, *(self._fingerprint(peer) for peer in self.given_peers)])

    def _fingerprint(self, peer: ExpertLike | Fingerprint) -> Fingerprint:
        if isinstance(peer, Fingerprint) or is_fingerprint(peer):
            return open_fingerprint(peer, self.base)
        opened = open_expert(peer, self.base, strict=False)
        return take_fingerprint(opened.vector, self.base, label=public_name(opened.label), subspaces=False)

    @property
    def evaluation(self) -> Evaluation:
        """How to look at its behaviour."""
        if self._evaluation is None:
            raise NotCheckedError("no evaluation was given")
        return self._evaluation

    @once
    def metric(self) -> str:
        """The metric that counts: as given, or the only one that the own evaluation returns."""
        return choose_metric(self._base_result, self.evaluation.metric, OWN)

    @property
    def greater_is_better(self) -> bool:
        """Its direction."""
        return is_greater_better(self.metric, self.evaluation.greater_is_better)

    def gain(self, base: float, value: float) -> float:
        """What a value of the metric is above the base's, in the metric's own sign; not there where it is no better.

        Of a loss of quality, shares that are kept would mean the opposite of what they say.
        """
        found = value - base
        if not (found > 0 if self.greater_is_better else found < 0):
            raise NotCheckedError("the expert is no better than its base")
        return found

    @once
    def own_scores(self) -> tuple[Score, Score]:
        """The own task's score of base and expert."""
        with MergedInPlace(self.evaluation.model, self.base, [self.expert], include_model=False) as merged:
            expert = run_evaluation(self.evaluation.own, merged.live.model, self.metric, OWN)
        return take_score(self._base_result, self.metric, OWN), expert

    @once
    def _base_result(self) -> Mapping[str, Values]:
        with MergedInPlace(self.evaluation.model, self.base, [], include_model=False) as merged:
            return call_evaluation(self.evaluation.own, merged.live.model, OWN)

    @once
    def card(self) -> str:
        """The text of ``README.md``; empty where there is none."""
        path = self.folder / "README.md"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
