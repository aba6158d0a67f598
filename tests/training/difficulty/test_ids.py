from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding

from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.difficulty.ids import collate_with_ids, content_id, take_ids, with_example_ids
from tests.demo.tiny import tiny_base
from tests.trainers import Tokens


class Stream(IterableDataset[dict[str, Any]]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, 20, step):
            yield {"x": torch.tensor([float(i)]), "labels": i % 2, "idx": 100 + i}


def seen(loader: Any) -> dict[int, float]:
    """The example behind each id, by what is in it."""
    found: dict[int, float] = {}
    for batch in loader:
        for example, x in zip(batch["example_id"].tolist(), batch["x"].reshape(-1).tolist(), strict=True):
            assert example not in found
            found[example] = x
    return found


def rows() -> list[dict[str, Any]]:
    return [{"x": float(i), "labels": i % 2} for i in range(20)]


@pytest.mark.parametrize("kind", ["mappings", "datasets"])
@pytest.mark.parametrize("workers", [0, 2])
def test_ids_survive_shuffling_and_workers(kind: str, workers: int) -> None:
    data = Dataset.from_list(rows()).with_format("torch") if kind == "datasets" else rows()
    made = with_example_ids(data)
    assert isinstance(made, Dataset) == (kind == "datasets")
    loader = DataLoader(made, batch_size=3, shuffle=True, num_workers=workers, collate_fn=collate_with_ids())
    for _ in range(2):
        assert seen(loader) == {i: float(i) for i in range(20)}


def test_ids_are_given_once_and_kept_by_shuffling_the_dataset() -> None:
    made = with_example_ids(Dataset.from_list(rows())).shuffle(seed=1)
    assert with_example_ids(made) is made
    assert [row["example_id"] for row in made] == [int(row["x"]) for row in made]
    assert made[0]["example_id"] != 0


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_known_by_content(workers: int) -> None:
    made = with_example_ids(Stream())
    loader = DataLoader(made, batch_size=3, num_workers=workers, collate_fn=collate_with_ids())
    first = seen(loader)
    assert len(first) == 20
    assert seen(DataLoader(made, batch_size=7, collate_fn=collate_with_ids())) == first
    made.set_epoch(3)
    assert made.epoch == 3
    keyed = with_example_ids(Stream(), key="idx")
    assert seen(DataLoader(keyed, batch_size=4, collate_fn=collate_with_ids())) == {
        100 + i: float(i) for i in range(20)
    }


def test_streams_of_datasets_keep_their_ids_when_shuffled_and_split() -> None:
    stream = Dataset.from_list(rows()).to_iterable_dataset(num_shards=4)
    made = with_example_ids(stream)
    straight = {row["example_id"]: row["x"] for row in made}
    assert sorted(straight.values()) == [float(i) for i in range(20)]
    assert {row["example_id"]: row["x"] for row in made.shuffle(seed=3, buffer_size=7)} == straight
    shards = [made.shard(num_shards=2, index=i) for i in range(2)]
    assert {row["example_id"]: row["x"] for shard in shards for row in shard} == straight


def test_content_is_what_counts() -> None:
    example = {"x": torch.tensor([1.0]), "text": "a", "n": [1, 2.5, None]}
    assert content_id(example) == content_id(dict(reversed(example.items())))
    assert content_id(example) == content_id({**example, "x": np.array([1.0], dtype=np.float32)})
    others = [
        {**example, "text": "b"},
        {**example, "x": torch.tensor([2.0])},
        {**example, "n": [1, 2.5]},
        {**example, "n": ["1", 2.5, None]},
    ]
    assert len({content_id(other) for other in [example, *others]}) == 5
    assert all(0 <= content_id(i) < 2**63 for i in range(100))


def test_arrays_of_objects_count_by_what_they_hold() -> None:
    """And not by where that lies in memory, which is another place in every process."""

    def words(*ends: str) -> Any:
        return np.array([" ".join(["law", end]) for end in ends], dtype=object)

    assert content_id({"x": words("of", "in")}) == content_id({"x": words("of", "in")})
    assert content_id({"x": words("of", "in")}) != content_id({"x": words("of", "on")})
    assert content_id(words("of", "in")) != content_id(words("of", "in").reshape(2, 1))


def test_images_count_by_their_pixels_and_addresses_not_at_all() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    one = content_id({"image": Image.fromarray(pixels)})
    assert content_id({"image": Image.fromarray(pixels.copy())}) == one
    assert content_id({"image": Image.fromarray(pixels.reshape(2, 8, 3))}) != one
    assert content_id({"image": Image.fromarray(255 - pixels)}) != one
    with pytest.raises(OptionError, match="a value of type object, which prints where it lies in memory"):
        content_id({"x": object()})
    assert content_id("a stone at 0x7f") != content_id("a stone at 0x80")


def test_content_in_bf16_and_keys_of_64_bits() -> None:
    one = {"x": torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "y": torch.tensor(3.0, dtype=torch.bfloat16)}
    assert content_id(one) == content_id({name: value.clone() for name, value in one.items()})
    assert content_id(one) != content_id(one | {"y": one["y"] + 1})
    data = with_example_ids([{"uid": 2**64 - 1}, {"uid": 7}], key="uid")
    batch = collate_with_ids(lambda examples: {"n": torch.tensor(len(examples))})([data[0], data[1]])
    assert batch["example_id"].tolist() == [content_id(2**64 - 1), 7]


def test_tuples_get_an_id_at_the_end() -> None:
    assert with_example_ids([("a", 1), ("b", 0)])[1] == ("b", 0, 1)
    assert with_example_ids([("a", 1), ("b", 0)])[-1] == ("b", 0, 1)


def test_the_collator_underneath_never_sees_ids() -> None:
    keys: list[set[str]] = []

    def collate(examples: Any) -> Any:
        keys.append({name for example in examples for name in example})
        return default_collate(examples)

    batch = collate_with_ids(collate)([with_example_ids(Tokens(4))[i] for i in (2, 0)])
    assert keys == [{"input_ids", "attention_mask", "labels"}]
    assert batch["example_id"].tolist() == [2, 0]
    assert torch.equal(batch["example_label"], batch["labels"])
    ids, labels = take_ids(batch)
    assert ids.tolist() == [2, 0]
    assert torch.equal(labels, batch["labels"])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert take_ids(batch) == (None, None)
    assert take_ids([torch.ones(2)]) == (None, None)


def test_other_batches_are_as_ever() -> None:
    collate = collate_with_ids()
    assert collate_with_ids(collate) is collate
    assert set(collate([Tokens(2)[0]])) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(OptionError, match="only 1 of the 2 examples of a batch carry an id"):
        collate([{"x": 1, "example_id": 1}, {"x": 1}])


def test_a_collator_s_settings_and_pickles(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoTokenizer

    padding = DataCollatorWithPadding(
        AutoTokenizer.from_pretrained(tiny_base(tmp_path_factory.mktemp("tiny")))
    )
    wrapped = collate_with_ids(padding)
    assert wrapped.tokenizer is padding.tokenizer  # type: ignore[attr-defined]
    batch = wrapped(
        [
            {"input_ids": [1, 2], "labels": 0, "example_id": 9},
            {"input_ids": [1], "labels": 1, "example_id": 4},
        ]
    )
    assert batch["example_id"].tolist() == [9, 4]
    assert batch["input_ids"].shape == (2, 2)
    assert pickle.loads(pickle.dumps(collate_with_ids()))([{"x": 1, "example_id": 3}])[
        "example_id"
    ].tolist() == [3]


def test_packed_data_are_refused() -> None:
    packed = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2, 1]}])
    with pytest.raises(UnsupportedError, match="the dataset has seq_lengths: its examples are packed"):
        with_example_ids(packed)
    flat = collate_with_ids(DataCollatorWithFlattening(return_tensors="pt"))
    examples = [{"input_ids": [1, 2], "labels": [1, 2], "example_id": i} for i in range(3)]
    with pytest.raises(UnsupportedError, match="it packs several into one row"):
        flat(examples)


def test_what_cannot_carry_an_id_is_refused() -> None:
    with pytest.raises(OptionError, match="int can be neither indexed nor iterated"):
        with_example_ids(3)
    with pytest.raises(OptionError, match="type int cannot carry an id"):
        with_example_ids([1, 2])[0]
    with pytest.raises(OptionError, match="no field 'uid'"):
        with_example_ids([{"x": 1}], key="uid")[0]
    with pytest.raises(UnsupportedError, match="makes a list of mappings"):
        collate_with_ids(lambda examples: list(examples))([{"x": 1, "example_id": 0}])
