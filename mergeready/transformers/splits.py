from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from mergeready.errors import OptionError

UNREADABLE = (OSError, ValueError, TypeError, KeyError, DatasetsError)
"""What ``datasets`` raises where there is nothing that it can read; its own files of facts are not checked by it."""

_SAVED = ("dataset_dict.json", "state.json")


def read_splits(
    place: str, what: str, *, subset: str | None = None, revision: str | None = None
) -> dict[str, Dataset]:
    r"""The splits of a dataset: of a folder of ``save_to_disk``, a folder of csv, json or parquet files, or a hub id.

    Args:
        place: The folder or hub id.
        what: What names it, for messages: a setting or an option.
        subset: Configuration of a hub dataset.
        revision: Commit, tag or branch of a hub dataset.

    Returns:
        Datasets by split; one that was saved without splits is ``train``.

    Raises:
        OptionError: If there is no such dataset, or it cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "test.csv").write_text("text,label\na,1\n")
        ...     sorted(read_splits(folder, "`data`"))
        ['test']
    """
    folder = Path(place)
    saved = any((folder / name).is_file() for name in _SAVED)
    try:
        found: Any = load_from_disk(place) if saved else load_dataset(place, subset, revision=revision)
    except UNREADABLE as error:
        kind = "a folder that" if folder.is_dir() else "no folder or file here, and as a hub id it"
        raise OptionError(f"{what} names {place}, which is {kind} cannot be loaded: {error}") from error
    return by_split(found, f"{what}: {place}")


def by_split(found: Any, what: str) -> dict[str, Dataset]:
    """A dataset, or datasets by split, as datasets by split.

    Raises:
        OptionError: If it is anything else.
    """
    if isinstance(found, Dataset):
        return {"train": found}
    if isinstance(found, DatasetDict | Mapping) and all(isinstance(part, Dataset) for part in found.values()):
        return dict(found)
    kind = "a streamed dataset" if isinstance(found, IterableDataset) else f"a {type(found).__name__}"
    raise OptionError(f"{what} gave {kind} instead of a dataset or datasets by split.")
