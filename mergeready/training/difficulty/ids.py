"""Stable ids for the examples of a dataset, and how they travel through collators."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from mergeready.errors import OptionError, UnsupportedError, listing
from mergeready.training.batches import LABELS

ID_FIELD = "example_id"
LABEL_FIELD = "example_label"
"""The labels beside the ids, since trainers take the others out of a batch before the model sees it."""

_PACKED = ("seq_lengths", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def with_example_ids(dataset: Any, *, key: str | None = None) -> Any:
    """A dataset whose examples carry a stable id, under ``example_id``.

    Of a dataset with a length, the id is an example's place in it, so give it in the order in which it is known,
    before shuffling. A stream has no places that survive sharding, workers and shuffling: there the id is a hash of
    the example's content, or of its field ``key``; equal examples share one. Datasets of ``datasets`` stay what they
    are. Examples that are tuples get the id as their last element.

    Args:
        dataset: A map-style or iterable dataset.
        key: Field that names an example, such as ``idx``, instead of its place or content.

    Raises:
        UnsupportedError: If its examples are packed, several to a row.
        OptionError: If it can be neither indexed nor iterated, has no field ``key``, or content that cannot be hashed.

    Example:
        >>> with_example_ids([{"x": 1.0}, {"x": 2.0}])[1]
        {'x': 2.0, 'example_id': 1}
    """
    columns = getattr(dataset, "column_names", None)
    if columns and ID_FIELD in columns:
        return dataset
    packed = [name for name in _PACKED if columns and name in columns]
    if packed:
        raise UnsupportedError(
            f"the dataset has {listing(packed)}: its examples are packed, several to a row, so a row's loss is "
            "of no single example. Turn packing off to track difficulty."
        )
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if sized and key is None and hasattr(dataset, "add_column"):
        return dataset.add_column(ID_FIELD, list(range(len(dataset))))
    if hasattr(dataset, "map") and (columns is not None or hasattr(dataset, "features")):
        return dataset.map(_AddId(key))
    if sized:
        return _Indexed(dataset, key)
    if hasattr(dataset, "__iter__"):
        return _Stream(dataset, key)
    raise OptionError(f"{type(dataset).__name__} can be neither indexed nor iterated: it is no dataset.")


def collate_with_ids(collate: Callable[[Sequence[Any]], Any] | None = None) -> Callable[[Sequence[Any]], Any]:
    """A collator that takes ids aside, lets another make the batch, and puts them into it as a tensor.

    Examples without ids, such as those of an evaluation, are collated as ever.

    Args:
        collate: The collator of the examples themselves; torch's own by default.

    Example:
        >>> batch = collate_with_ids()([{"x": 1.0, "example_id": 4}, {"x": 2.0, "example_id": 2}])
        >>> batch["example_id"]
        tensor([4, 2])
    """
    if isinstance(collate, _Collator):
        return collate
    return _Collator(_torch_s_own if collate is None else collate)


def carries_ids(collate: object) -> bool:
    """Whether a collator is one of :func:`collate_with_ids`."""
    return isinstance(collate, _Collator)


def _torch_s_own(examples: Sequence[Any]) -> Any:
    return default_collate(list(examples))


def take_ids(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Take ids and the labels beside them out of a batch, in place; None each where there are none.

    For training loops that give their model parts of a batch, not the batch.

    Example:
        >>> batch = {"x": torch.ones(2), "example_id": torch.tensor([4, 2])}
        >>> take_ids(batch), list(batch)
        ((tensor([4, 2]), None), ['x'])
    """
    if not hasattr(batch, "keys"):
        return None, None
    ids = batch.pop(ID_FIELD) if ID_FIELD in batch else None
    labels = batch.pop(LABEL_FIELD) if LABEL_FIELD in batch else None
    return ids, labels


def content_id(content: Any) -> int:
    """63 bits of a hash of an example, the same in every process.

    Tensors, arrays and images of PIL count by their values, others as they are printed.

    Raises:
        OptionError: If a value prints as its address, which would be another example in every process.

    Example:
        >>> content_id({"a": 1, "b": [2.0]}) == content_id({"b": [2.0], "a": 1})
        True
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, content)
    return int.from_bytes(digest.digest(), "little") >> 1


class _Collator:
    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self._collate = collate

    def __getattr__(self, name: str) -> Any:
        # Trainers ask their collator for its settings.
        if name.startswith("__") or name == "_collate":
            raise AttributeError(name)
        return getattr(self._collate, name)

    def __call__(self, examples: Sequence[Any]) -> Any:
        with_id = [isinstance(example, Mapping) and ID_FIELD in example for example in examples]
        if not any(with_id):
            return self._collate(examples)
        if not all(with_id):
            raise OptionError(f"only {sum(with_id)} of the {len(examples)} examples of a batch carry an id.")
        ids = torch.tensor([int(example[ID_FIELD]) for example in examples])
        batch = self._collate([{k: v for k, v in example.items() if k != ID_FIELD} for example in examples])
        if not hasattr(batch, "keys"):
            raise UnsupportedError(
                f"the collator makes a {type(batch).__name__} of mappings: ids need a batch with names."
            )
        _require_unpacked(batch, len(ids))
        labels = next((batch[name] for name in LABELS if name in batch), None)
        batch[ID_FIELD] = ids
        if isinstance(labels, Tensor):
            batch[LABEL_FIELD] = labels
        return batch


def _require_unpacked(batch: Any, count: int) -> None:
    lengths = {name: len(value) for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    marks = [name for name in _PACKED[2:] if name in batch]
    if marks or (lengths and count not in lengths.values()):
        raise UnsupportedError(
            f"the collator made rows of {lengths} from {count} examples{', with ' + listing(marks) if marks else ''}: "
            "it packs several into one row. Turn packing (padding-free batches) off to track difficulty."
        )


class _AddId:
    """Gives an example of ``datasets`` its id."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, example: Mapping[str, Any]) -> dict[str, int]:
        return {ID_FIELD: _id_of(example, self._key)}


class _Indexed(Dataset[Any]):
    def __init__(self, dataset: Any, key: str | None) -> None:
        self._dataset, self._key = dataset, key

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        example = self._dataset[index]
        return _marked(example, index % len(self) if self._key is None else _id_of(example, self._key))


class _Stream(IterableDataset[Any]):
    def __init__(self, dataset: Any, key: str | None) -> None:
        self._dataset, self._key = dataset, key

    def __iter__(self) -> Iterator[Any]:
        for example in self._dataset:
            yield _marked(example, _id_of(example, self._key))

    def __getattr__(self, name: str) -> Any:
        # Epochs and shards are told to the stream itself.
        if name.startswith("__") or name in ("_dataset", "_key"):
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _marked(example: Any, number: int) -> Any:
    if isinstance(example, Mapping):
        return {**example, ID_FIELD: number}
    if isinstance(example, tuple | list):
        return (*example, number)
    raise OptionError(
        f"an example of type {type(example).__name__} cannot carry an id: make it a mapping or a tuple."
    )


def _id_of(example: Any, key: str | None) -> int:
    if key is None:
        return content_id(example)
    if not isinstance(example, Mapping) or key not in example:
        raise OptionError(f"examples have no field {key!r} that could name them.")
    value = example[key]
    return value if isinstance(value, int) and 0 <= value < 2**63 else content_id(value)


def _feed(digest: Any, content: Any) -> None:
    if isinstance(content, Mapping):
        for name in sorted(content, key=str):
            digest.update(f"{{{name}:".encode())
            _feed(digest, content[name])
    elif isinstance(content, list | tuple):
        digest.update(f"[{len(content)}:".encode())
        for value in content:
            _feed(digest, value)
    elif isinstance(content, Tensor):
        plain = content.detach().cpu()
        _feed(digest, (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy())
    elif isinstance(content, np.ndarray) and content.dtype.hasobject:  # its bytes are addresses
        digest.update(f"<{content.dtype}{content.shape}:".encode())
        _feed(digest, content.tolist())
    elif isinstance(content, np.ndarray):
        digest.update(f"<{content.dtype}{content.shape}:".encode() + np.ascontiguousarray(content).tobytes())
    elif type(content).__module__.startswith("PIL."):
        digest.update(f"<{content.mode}{content.size}:".encode() + content.tobytes())
    else:
        text = repr(content)
        if " at 0x" in text and not isinstance(content, str | bytes):
            raise OptionError(
                f"an example holds a value of type {type(content).__name__}, which prints where it lies in memory and "
                "not what it is: name a field that tells examples apart with `key`."
            )
        digest.update(f"({type(content).__name__} {text})".encode())
