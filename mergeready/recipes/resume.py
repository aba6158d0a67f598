"""Going on with a run that was interrupted, and refusing to mix two runs in one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from mergeready.errors import OutputExistsError, listing
from mergeready.recipes.document import read_document
from mergeready.recipes.problems import dotted
from mergeready.recipes.recipe import Recipe, recipe_content
from mergeready.weights.atomic import is_partial, new_file
from mergeready.weights.ranks import is_first_process

RECIPE_NAME = "recipe.yaml"
DATA_NAME = "data.sha256.json"
STATE_NAME = "trainer_state.json"


def claim(recipe: Recipe) -> Path:
    """Make the run's folder, or find it again.

    Returns:
        The folder; it holds the recipe as it is run, and checksums of the files that its data are read from.

    Raises:
        OutputExistsError: If it holds a run of another recipe or of files that changed since, or something else.
    """
    folder = Path(recipe.output)
    written = folder / RECIPE_NAME
    content, sums = _content(recipe), _checksums(recipe)
    # Listed first: the other processes of a job claim the same folder in the same moment, and whatever they make there
    # later comes after the recipe.
    others = _others(folder)
    if written.is_file():
        changed = _differences(read_document(written).content, content)
        known = _known_checksums(folder)
        changed += [f"the file {name}" for name, value in sums.items() if known.get(name, value) != value]
        if not changed:
            return folder
        if others:
            raise OutputExistsError(
                f"{folder} holds another run: {listing(changed)} changed. Say where this one goes with "
                f"`--set output=...`, or delete {folder}."
            )
        # Otherwise that recipe was refused before it made anything: here is the corrected one.
    elif others:
        raise OutputExistsError(f"{folder} exists and holds no run of a recipe. Name another `output`.")
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(written) as temporary:
            temporary.write_text(
                yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
        if sums:
            with new_file(folder / DATA_NAME) as temporary:
                temporary.write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
    return folder


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; the Trainer writes its state last. Broken ones are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        if checkpoint_state(checkpoint) is not None:
            return checkpoint
        if is_first_process():
            shutil.rmtree(checkpoint)
    return None


def checkpoint_state(checkpoint: Path) -> dict[str, Any] | None:
    """The Trainer's state in a checkpoint; None if it is not whole."""
    try:
        state: Any = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def stop_reason(state: dict[str, Any]) -> str | None:
    """Why a run was stopped; None where it was not, also if it only noted when it would have been."""
    history = (
        state.get("stateful_callbacks", {}).get("mergeready", {}).get("attributes", {}).get("history", [])
    )
    acted = (record for record in history if record.get("kind") == "decision" and record.get("acted"))
    return next((str(record["reason"]) for record in acted), None)


def is_over(state: dict[str, Any]) -> bool:
    """Whether a run has taken its last step: all of them, or the one at which it was stopped."""
    return stop_reason(state) is not None or state["global_step"] >= state["max_steps"]


def _others(folder: Path) -> list[Path]:
    """What a folder holds beside a recipe, whole or half written."""
    if not folder.is_dir():
        return []
    own = (RECIPE_NAME, DATA_NAME)
    return [
        path
        for path in folder.iterdir()
        if path.name not in own and not any(is_partial(path, name) for name in own)
    ]


def _checksums(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each single file that the data are read from."""
    places: list[str] = []
    for part in (recipe.data.join or {"": recipe.data}).values():
        named = [] if part.name is None else [part.name]
        for paths in (part.files or {}).values():
            named += [paths] if isinstance(paths, str) else paths
        places += named
    found = {}
    for place in places:
        if Path(place).is_file():
            with Path(place).open("rb") as file:
                found[place] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _known_checksums(folder: Path) -> dict[str, str]:
    """Those that were written when the run began; none where nothing can be read."""
    try:
        found: Any = json.loads((folder / DATA_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(recipe: Recipe) -> dict[str, Any]:
    content = recipe_content(recipe)
    content.pop("quick", None)
    return content


def _differences(old: Any, new: Any, key: tuple[str | int, ...] = ()) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [part for name in names for part in _differences(old.get(name), new.get(name), (*key, name))]
    return [] if old == new else [f"`{dotted(key)}`"]


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
