from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mergeready.errors import OptionError
from mergeready.training.batches import LABELS


def noisy_labels(
    labels: Sequence[int], classes: int, share: float, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Labels of which a known share is wrong.

    ``round(share · n)`` examples are drawn without replacement; each gets one of the other classes, all alike likely.
    So none keeps its label by chance, and the indices are exactly the wrong ones.

    Args:
        labels: The true classes, each in ``0 … classes − 1``.
        classes: How many there are, at least 2.
        share: Share of wrong labels, in [0, 1].
        seed: Of the draw.

    Returns:
        The labels, int64, and the indices of the wrong ones, in order.

    Raises:
        OptionError: If a number is out of range.

    Example:
        >>> noisy, wrong = noisy_labels([0, 1, 0, 1], classes=2, share=0.5, seed=1)
        >>> noisy.tolist(), wrong.tolist()
        ([0, 0, 1, 1], [1, 2])
    """
    made = np.array(labels, dtype=np.int64)
    if not 0 <= share <= 1:
        raise OptionError(f"`share` must be in [0, 1], not {share}.")
    if classes < 2:
        raise OptionError(f"labels can be wrong among at least 2 classes, not {classes}.")
    if made.size and not 0 <= made.min() <= made.max() < classes:
        raise OptionError(f"labels must be in 0 … {classes - 1}, not {made.min()} … {made.max()}.")
    generator = np.random.default_rng(seed)
    wrong = np.sort(generator.choice(len(made), round(share * len(made)), replace=False))
    made[wrong] = (made[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return made, wrong


def with_label_noise(
    dataset: Any, share: float, seed: int = 0, *, label: str | int | None = None, classes: int | None = None
) -> tuple[Any, NDArray[np.int64]]:
    """A dataset of which a known share of labels is wrong: an independent way to know which examples are hard.

    What a model learns of them it can only have memorised. Use a copy with noise for training, and evaluate on clean
    data.

    Args:
        dataset: A map-style dataset, or one of ``datasets``, which is returned as such. Examples are mappings or
            tuples.
        share: Share of wrong labels, in [0, 1].
        seed: Of the draw.
        label: Key, or place in the tuple, of the label; by default ``labels``, ``label`` or ``label_ids``, or the
            second place.
        classes: How many classes there are; by default one more than the greatest label.

    Returns:
        The dataset with noise, and the indices of the wrong labels, in order.

    Raises:
        OptionError: If the dataset has no length, no label, or a number is out of range.

    Example:
        >>> data = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
        >>> noisy, wrong = with_label_noise(data, share=0.5, seed=1)
        >>> [noisy[i]["label"] for i in range(2)], wrong.tolist()
        ([1, 1], [0])
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise OptionError(
            "noise needs a dataset with a length and examples by position; make it before streaming."
        )
    if len(dataset) == 0:
        raise OptionError("the dataset is empty: there are no labels to make wrong.")
    key = _label_of(dataset[0], label)
    columns = getattr(dataset, "column_names", None)
    known = list(dataset[key]) if columns is not None else [int(dataset[i][key]) for i in range(len(dataset))]
    made, wrong = noisy_labels(known, max(known) + 1 if classes is None else classes, share, seed)
    if columns is not None:
        return dataset.map(_Relabel(str(key), made), with_indices=True), wrong
    return _NoisyDataset(dataset, key, made), wrong


class _Relabel:
    """Gives an example of ``datasets`` its label."""

    def __init__(self, key: str, labels: NDArray[np.int64]) -> None:
        self._key, self._labels = key, labels

    def __call__(self, example: Mapping[str, Any], index: int) -> dict[str, int]:
        return {self._key: int(self._labels[index])}


class _NoisyDataset(Dataset[Any]):
    def __init__(self, dataset: Any, key: str | int, labels: NDArray[np.int64]) -> None:
        self._dataset, self._key, self._labels = dataset, key, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Any:
        example = self._dataset[index]
        old = example[self._key]
        # In the label's own type, so that collators make of it what they made before.
        label = int(self._labels[index])
        new = old.new_tensor(label) if isinstance(old, Tensor) else type(old)(label)
        if isinstance(example, Mapping):
            return {**example, self._key: new}
        parts = list(example)
        parts[int(self._key)] = new
        return tuple(parts)


def _label_of(example: Any, label: str | int | None) -> str | int:
    if label is None and isinstance(example, Mapping):
        label = next((name for name in LABELS if name in example), None)
    elif label is None and isinstance(example, tuple | list) and len(example) > 1:
        label = 1
    known: list[Any] = list(example) if isinstance(example, Mapping) else []
    if isinstance(example, tuple | list):
        known = list(range(len(example)))
    if label is None or label not in known:
        raise OptionError(f"examples have no label {label!r}: name it with `label`; they have {known}.")
    return label
