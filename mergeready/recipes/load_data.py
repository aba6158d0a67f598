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
    found = _load(settings)
    named = {split: settings.splits.get(split, split) for split in SPLITS}
    missing = [name for split, name in named.items() if name not in found and split in settings.splits]
    if missing or named["train"] not in found:
        raise OptionError(
            f"`data` has no split {listing(missing or [named['train']])}; it has {listing(found)}. Say which is which "
            "with `data.splits`, such as splits: {train: all}."
        )
    splits: dict[Split, Dataset] = {split: found[name] for split, name in named.items() if name in found}
    if "validation" not in splits:
        parts = splits["train"].train_test_split(test_size=settings.holdout, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    for split, most in settings.limit.items():
        if split in splits and len(splits[split]) > most:
            splits[split] = splits[split].shuffle(seed=seed).select(range(most))
    return splits


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
