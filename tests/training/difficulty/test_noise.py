from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import OptionError
from mergeready.training.difficulty.noise import noisy_labels, with_label_noise
from tests.trainers import Tokens


@given(
    n=st.integers(1, 200),
    classes=st.integers(2, 6),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_exactly_the_named_ones_are_wrong(n: int, classes: int, share: float, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, classes, n)
    noisy, wrong = noisy_labels(labels.tolist(), classes, share, seed)
    assert wrong.tolist() == np.flatnonzero(noisy != labels).tolist()
    assert len(wrong) == round(share * n)
    assert 0 <= noisy.min() <= noisy.max() < classes
    again, _ = noisy_labels(labels.tolist(), classes, share, seed)
    assert again.tolist() == noisy.tolist()


def test_each_other_class_is_as_likely() -> None:
    noisy, _ = noisy_labels([1] * 30_000, 4, 1.0)
    counts = np.bincount(noisy, minlength=4)
    assert counts[1] == 0
    assert np.abs(counts[[0, 2, 3]] - 10_000).max() < 400  # five standard deviations


@pytest.mark.parametrize("kind", ["datasets", "mappings", "tuples", "tensors", "arrays"])
def test_every_kind_of_dataset(kind: str) -> None:
    labels = [i % 3 for i in range(30)]
    data = {
        "datasets": lambda: Dataset.from_dict({"text": [str(i) for i in range(30)], "label": labels}),
        "mappings": lambda: [{"text": str(i), "label": label} for i, label in enumerate(labels)],
        "tuples": lambda: [(str(i), label) for i, label in enumerate(labels)],
        "tensors": lambda: [
            {"text": str(i), "labels": torch.tensor(label)} for i, label in enumerate(labels)
        ],
        "arrays": lambda: list(zip(map(str, range(30)), np.array(labels), strict=True)),
    }[kind]()
    key = {"tuples": 1, "arrays": 1, "tensors": "labels"}.get(kind, "label")
    noisy, wrong = with_label_noise(data, 0.2, seed=3)
    assert isinstance(noisy, Dataset) == (kind == "datasets")
    changed = [i for i in range(30) if int(noisy[i][key]) != labels[i]]
    assert changed == wrong.tolist()
    assert len(changed) == 6
    assert type(noisy[0][key]) is type(data[0][key])
    assert [int(data[i][key]) for i in range(30)] == labels, "the given dataset changed"
    assert noisy[4]["text" if isinstance(data[0], dict) else 0] == "4"


def test_a_dataset_of_tensors_keeps_its_other_fields() -> None:
    data = Tokens(20)
    noisy, wrong = with_label_noise(data, 0.3)
    assert len(noisy) == 20
    assert torch.equal(noisy[5]["input_ids"], data[5]["input_ids"])
    assert [int(noisy[i]["labels"]) for i in wrong] == [1 - int(data[int(i)]["labels"]) for i in wrong]


def test_arguments_are_checked() -> None:
    with pytest.raises(OptionError, match=r"`share` must be in \[0, 1\], not 2"):
        noisy_labels([0, 1], 2, 2)
    with pytest.raises(OptionError, match="at least 2 classes, not 1"):
        noisy_labels([0, 0], 1, 0.5)
    with pytest.raises(OptionError, match="labels must be in 0 … 1, not 0 … 3"):
        noisy_labels([0, 3], 2, 0.5)
    with pytest.raises(OptionError, match="needs a dataset with a length"):
        with_label_noise(iter([]), 0.5)
    with pytest.raises(OptionError, match=r"no label 'target': name it with `label`; they have \['x'\]"):
        with_label_noise([{"x": 1}], 0.5, label="target")
    with pytest.raises(OptionError, match="the dataset is empty"):
        with_label_noise([], 0.5)
