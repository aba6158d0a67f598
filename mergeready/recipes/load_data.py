"""A recipe's datasets, from wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from datasets import Dataset, load_dataset

from mergeready.errors import OptionError, listing
from mergeready.recipes.sources import DataSettings, Split
from mergeready.targets import call_target, is_target
from mergeready.transformers.splits import UNREADABLE, by_split, read_splits

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_data(settings: DataSettings, seed: int) -> dict[Split, Dataset]:
    """Datasets by split: ``train`` always, ``validation`` always (held out if there is none), ``test`` if there is one.

    Raises:
        OptionError: If there is no such data, or no training split in it.
    """
    return chosen(read_data(settings), settings, seed)


def read_data(settings: DataSettings) -> dict[Split, Dataset]:
    """Datasets by split, whole.

    A split that was given another name's part keeps it to itself: with ``validation: test`` there is no test split,
    since results are not reported on what decisions were taken on.

    Raises:
        OptionError: If there is no such data, no training split in it, or two splits are one.
    """
    found = _load(settings)
    given = list(settings.splits.values())
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise OptionError(f"`data.splits` names {listing(twice)} for more than one split.")
    own = {split: split for split in SPLITS if split not in settings.splits and split not in given}
    named = {**own, **settings.splits}
    if "train" not in named:
        raise OptionError("`data.splits` gives the split train away: say which one is to be trained on.")
    missing = [name for name in given if name not in found]
    if missing or named["train"] not in found:
        raise OptionError(
            f"`data` has no split {listing(missing or [named['train']])}; it has {listing(found)}. Say which is which "
            "with `data.splits`, such as splits: {train: all}."
        )
    return {split: found[named[split]] for split in SPLITS if named.get(split) in found}


def chosen(splits: Mapping[Split, Dataset], settings: DataSettings, seed: int) -> dict[Split, Dataset]:
    """What a run takes of its data: with validation examples held out if there are none, and no more than allowed."""
    taken = dict(splits)
    if "validation" not in taken:
        parts = taken["train"].train_test_split(test_size=settings.holdout, seed=seed)
        taken |= {"train": parts["train"], "validation": parts["test"]}
    for split, most in settings.limit.items():
        if split in taken and len(taken[split]) > most:
            taken[split] = taken[split].shuffle(seed=seed).select(range(most))
    return taken


def _load(settings: DataSettings) -> Mapping[str, Dataset]:
    if settings.files is not None:
        return _from_files(settings.files)
    name = cast("str", settings.name)
    if is_target(name):
        return by_split(call_target(name, "data", settings.arguments), f"`data`: {name}")
    path = Path(name)
    if path.suffix in _READERS and not path.is_dir():
        return _from_files({"train": name})
    return read_splits(name, "`data`", subset=settings.subset, revision=settings.revision)


def _from_files(files: Mapping[Split, str | list[str]]) -> Mapping[str, Dataset]:
    named = {split: [paths] if isinstance(paths, str) else paths for split, paths in files.items()}
    every = [Path(path) for paths in named.values() for path in paths]
    absent = [str(path) for path in every if not path.is_file()]
    if absent:
        raise OptionError(f"`data.files` names what is not there: {listing(absent)}.")
    kinds = {(_READERS.get(path.suffix), path.suffix == ".tsv") for path in every}
    [(reader, tabs), *others] = kinds
    if others or reader is None:
        raise OptionError(
            f"`data.files` must all be csv, tsv, json, jsonl or parquet, not {listing(map(str, every))}."
        )
    options = {"delimiter": "\t"} if tabs else {}
    try:
        found = load_dataset(reader, data_files=named, **options)
    except UNREADABLE as error:
        raise OptionError(f"{listing(map(str, every))} cannot be read as {reader}: {error}") from error
    return by_split(found, "`data.files`")


def require_columns(splits: Mapping[Split, Dataset], columns: list[str], key: str) -> None:
    """Raise if a split lacks a column.

    Raises:
        OptionError: If so.
    """
    for split, data in splits.items():
        missing = [column for column in columns if column not in data.column_names]
        if missing:
            raise OptionError(
                f"`{key}` names {listing(missing)}, but the {split} data has the columns {listing(data.column_names)}."
            )
