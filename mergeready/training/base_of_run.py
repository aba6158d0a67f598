from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from mergeready.errors import FormatError, HistoryError, MergeReadyError, OptionError
from mergeready.experts.base import Base
from mergeready.experts.kinship import require_frozen_equal
from mergeready.experts.live import is_peft
from mergeready.experts.open import pair_with_base
from mergeready.weights.module import ModuleSource, unwrap
from mergeready.weights.open import WeightsLike
from mergeready.weights.ranks import Ranks
from mergeready.weights.source import WeightSource, chunk_ranges
from mergeready.weights.writer import FolderWriter

logger = logging.getLogger("mergeready")

SNAPSHOT_NAME = "base"


def base_of_run(
    model: nn.Module,
    base: WeightsLike | Base | None,
    folder: Path,
    *,
    step: int,
    recorded: str | None,
    ranks: Ranks | None = None,
) -> Base | None:
    """The base of a run: as given, else found out where that is certain.

    Without a given base, a run that starts now has the model's own weights as its base: the folder they were
    loaded from if they still equal it, or a snapshot that is written to ``<folder>/base``. A resumed run finds the
    same folder or snapshot again by the fingerprint in its history. A PEFT model carries its base.

    Args:
        model: The model.
        base: What the user gave.
        folder: The monitor's folder.
        step: Optimizer steps taken already.
        recorded: Fingerprint of the base in the run's history, if it has one.
        ranks: The run's ranks, which all call this; the first one writes.

    Returns:
        The base; None for a PEFT model without a given base.

    Raises:
        HistoryError: If a resumed run's base cannot be found.
        OptionError: If the model is sharded and does not equal the folder it was loaded from.
    """
    ranks = ranks or Ranks.alone()
    if base is not None:
        with ranks.together():
            return Base.open(base)
    if is_peft(unwrap(model)):
        return None
    source = ModuleSource(model)
    snapshot, origin = folder / SNAPSHOT_NAME, _origin(model)
    if step > 0:
        with ranks.together():
            return _find_again([path for path in (snapshot, origin) if path is not None], recorded)
    if origin is not None:
        with source.gathering():
            found = _if_equal(origin, source)
        if found is not None:
            return found
    if source.is_sharded:
        raise OptionError(
            "the model is sharded and does not equal a folder that it was loaded from, so its first weights cannot be "
            "its base. Pass `base`: the folder or hub id of the pretrained model."
        )
    logger.info("writing the base of this run to %s, since none was given", snapshot)
    ranks.on_first(lambda: _write_snapshot(source, snapshot))
    with ranks.together():
        return Base.open(snapshot)


def _find_again(candidates: list[Path], recorded: str | None) -> Base:
    for path in candidates:
        try:
            found = Base.open(path)
        except FormatError:
            continue  # deleted, or no weights that can be read there
        if found.identity.fingerprint == recorded:
            return found
    raise HistoryError(
        "the run is resumed, so the model no longer holds the weights it started from, and they were not recorded. "
        "Pass `base`: the folder or hub id of the pretrained model."
    )


def _origin(model: nn.Module) -> Path | None:
    """The local folder that a transformers model was loaded from."""
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def _if_equal(folder: Path, source: WeightSource) -> Base | None:
    try:
        base = Base.open(folder)
        names, _, _ = pair_with_base(source, base, strict=False)
        require_frozen_equal(source, base.source, names)
    except FormatError:
        return None  # no weights that can be read there, such as a GGUF file
    except MergeReadyError as error:
        logger.info("the model differs from %s, where it was loaded from: %s", folder, error)
        return None
    return base


def _write_snapshot(source: WeightSource, path: Path) -> None:
    # Under the names of files, as peers have them.
    names = {name: name for name in source.infos} | {own: name for name, own in source.stored_names.items()}
    with FolderWriter(
        path, {names[own]: info for own, info in source.infos.items()}, overwrite=True
    ) as writer:
        for own, info in source.infos.items():
            for start, stop in chunk_ranges(info):
                writer.write(names[own], source.read_flat(own, start, stop), start)
