"""Rounds of tuning and merging: every round starts all experts from the merge of the last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import save_file
from torch import Tensor

from mergeready.errors import HistoryError, NotTrainedError, OptionError, listing
from mergeready.experts.base import Base
from mergeready.experts.open import open_expert
from mergeready.experts.task_vector import squared_norms
from mergeready.merging.folders import merge_folders
from mergeready.merging.registry import MethodLike, make_method
from mergeready.weights.atomic import new_file, new_folder
from mergeready.weights.json_file import read_json_object
from mergeready.weights.ranks import Ranks
from mergeready.weights.safetensors_folder import SINGLE_NAME
from mergeready.weights.writer import copy_companions

Train: TypeAlias = Callable[[str, Path, int], str | Path | Mapping[str, Tensor]]
"""Trains an expert in one round, a normal run: its name, the folder to start from, the round counted from 1. Returns
the folder of the result, a full model or an adapter, or a state dict."""

_STATE, _SCHEMA = "many_shot.json", 1


@dataclass(frozen=True)
class ManyShot:
    """What rounds have led to.

    Attributes:
        merged: Folder of the merged model of the last round.
        experts: Folder of each expert of the last round, by name.
        rounds: How many rounds there were.
    """

    merged: Path
    experts: Mapping[str, Path]
    rounds: int


def many_shot(
    base: str | Path,
    experts: Sequence[str],
    train: Train,
    folder: str | Path,
    *,
    rounds: int = 5,
    method: MethodLike = "task_arithmetic",
    scale: float | None = None,
    weights: Sequence[float] | None = None,
    **parameters: Any,
) -> ManyShot:
    """Alternate tuning and merging: each round trains all experts from one start, and their merge is the next start.

    ``θ⁽ʳ⁺¹⁾ = θ⁽ʳ⁾ + merge(θ₁⁽ʳ⁾ − θ⁽ʳ⁾, …, θ_K⁽ʳ⁾ − θ⁽ʳ⁾)``, ATM (arXiv 2411.03055). METIS (arXiv 2606.16501)
    reports for Llama-3.2-3B and five rounds a rise of normalised accuracy from 0.71 to 0.86 (task arithmetic) and from
    0.88 to 0.94 (TIES) over merging once. All teams have to wait for each other in every round.

    Each training is a normal run of yours, with any trainer, callbacks and ranks; give it a ``1/rounds`` of the steps.
    One expert with the default scale is not merged: its rounds are plain training in pieces.

    Finished trainings and merges are kept; the same call goes on behind the last one that was finished. A training that
    was interrupted is called again with the same arguments, and may resume from its own checkpoints. In a job of
    several ranks all make the same call, and ``train`` runs on all; the first rank keeps the results. The start of a
    round is the base of its experts and of its merge, and their records say so.

    Args:
        base: Folder or hub id of the base.
        experts: Their names, which become names of folders.
        train: See :data:`Train`.
        folder: Where everything goes: ``round-1/<expert>``, ``round-1/merged``, ….
        rounds: How many.
        method: How to merge.
        scale: Factor on the merged delta; 1/K for ``task_arithmetic`` by default, which is their mean, else 1.
        weights: One factor an expert.
        **parameters: The method's parameters.

    Raises:
        OptionError: If an argument is not usable.
        HistoryError: If the folder is of rounds with other settings.
        NotTrainedError: If a training changed nothing.
        MergeReadyError: As ``open_expert`` and ``merge_folders`` do.

    Example:
        >>> import torch
        >>> from tempfile import mkdtemp
        >>> from mergeready.weights.open import open_weights
        >>> base = Path(mkdtemp())
        >>> save_file({"w": torch.zeros(2, 1)}, base / "model.safetensors")
        >>> goals = {"law": torch.tensor([[1.0], [0.0]]), "code": torch.tensor([[0.0], [1.0]])}
        >>> def train(expert, start, round):
        ...     w = open_weights(start).read("w")
        ...     return {"w": w + 0.5 * (goals[expert] - w)}
        >>> done = many_shot(base, ["law", "code"], train, mkdtemp(), rounds=2)
        >>> open_weights(done.merged).read("w").T
        tensor([[0.3750, 0.3750]])
    """
    names = list(experts)
    _require_usable(names, rounds, weights)
    if scale is None:
        scale = 1 / len(names) if make_method(method, **parameters).name == "task_arithmetic" else 1.0
        plain = len(names) == 1 and weights is None
    else:
        plain = False
    ranks = Ranks.world()
    folder = Path(folder)
    opened = Base.open(base)
    settings = {
        "schema": _SCHEMA,
        "base": opened.identity.fingerprint,
        "experts": names,
        "method": make_method(method, **parameters).describe(),
        "scale": scale,
        "weights": None if weights is None else list(weights),
    }
    ranks.on_first(lambda: _record(folder, settings))
    start = opened.folder
    if start is None:
        raise OptionError("`base` must be a folder or a hub id, which trainings can start from.")
    trained: dict[str, Path] = {}
    for number in range(1, rounds + 1):
        place = folder / f"round-{number}"
        current = Base.open(start)
        for name in names:
            trained[name] = _train_once(train, name, current, start, number, place, ranks)
        start = trained[names[0]] if plain else place / "merged"
        if not plain and not ranks.same(start.exists()):
            merge_folders(
                current,
                [trained[name] for name in names],
                start,
                method,
                scale=scale,
                weights=weights,
                strict=False,
                **parameters,
            )
    return ManyShot(start, trained, rounds)


def _train_once(
    train: Train, name: str, base: Base, start: Path, number: int, place: Path, ranks: Ranks
) -> Path:
    """The folder of an expert of a round; trained now, if it is not there."""
    output = place / name
    if ranks.same(output.exists()):
        return output
    result = train(name, start, number)
    given: Any = Path(result) if isinstance(result, str | Path) else result
    ranks.on_first(lambda: _keep(given, name, number, base, start, output))
    return output


def _keep(given: Any, name: str, number: int, base: Base, start: Path, output: Path) -> None:
    """Check a result and copy it to its place, complete or not at all."""
    if not isinstance(given, Path | Mapping):
        raise OptionError(
            f"`train` returned a {type(given).__name__} for {name}, not a folder or a state dict."
        )
    vector = open_expert(given, base, strict=False).vector
    if not sum(squared_norms(vector).values()) > 0:
        raise NotTrainedError(
            f"round {number} of {name} changed nothing: `train` returned what it started from."
        )
    with new_folder(output) as temporary:
        if isinstance(given, Path):
            shutil.copytree(
                given, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*")
            )
        else:
            tensors = {key: value.detach().cpu().contiguous().clone() for key, value in given.items()}
            save_file(tensors, temporary / SINGLE_NAME, {"format": "pt"})
            copy_companions(start, temporary)


def _record(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings of the rounds, or check that they are still the same."""
    path = folder / _STATE
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    known = read_json_object(path, "Name another folder.")
    now = json.loads(json.dumps(settings))
    changed = [key for key in now if known.get(key) != now[key]]
    if changed:
        raise HistoryError(
            f"{folder} holds rounds with other settings: {listing(changed)} changed. Use those, or another folder."
        )


def _require_usable(names: Sequence[str], rounds: int, weights: Sequence[float] | None) -> None:
    problems = []
    if not names:
        problems.append("`experts` is empty")
    strange = [
        n for n in names if not n or n in (".", "..", "merged") or Path(n).name != n or n.startswith(".")
    ]
    if strange:
        problems.append(f"names that cannot be those of folders, or are taken: {listing(strange)}")
    if len(set(names)) < len(names):
        problems.append("two experts have one name")
    if rounds < 1:
        problems.append(f"`rounds` must be at least 1, not {rounds}")
    if weights is not None and len(weights) != len(names):
        problems.append(f"`weights` has {len(weights)} numbers for {len(names)} experts")
    if problems:
        raise OptionError("; ".join(problems) + ".")
