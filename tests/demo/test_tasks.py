from __future__ import annotations

import pytest

from mergeready.demo.tasks import SPLITS, DemoTask, Split, load_tasks


@pytest.fixture(scope="module")
def tasks() -> dict[str, DemoTask]:
    return {task.name: task for task in load_tasks()}


CLASSES = {"wordnet_noun": 25, "wordnet_topic": 19, "emoji_name": 9, "udhr": 38}


def test_the_four_in_order(tasks: dict[str, DemoTask]) -> None:
    assert {name: len(task.label_texts) for name, task in tasks.items()} == CLASSES
    assert list(tasks) == list(CLASSES)
    assert all(task.title for task in tasks.values())


@pytest.mark.parametrize("name", CLASSES)
def test_sizes_and_labels(name: str, tasks: dict[str, DemoTask]) -> None:
    """Test splits are of one size, so that the mean over tasks is the mean over examples."""
    splits = tasks[name].splits
    assert {split: len(splits[split]) for split in SPLITS} == {"train": 1000, "validation": 240, "test": 400}
    for split in splits.values():
        assert len(split.texts) == len(split.labels)
        assert set(split.labels) == set(range(CLASSES[name]))
        assert all(type(label) is int for label in split.labels)
        assert all(text.strip() for text in split.texts)


@pytest.mark.parametrize("name", CLASSES)
def test_no_text_is_in_two_splits_or_twice_in_one(name: str, tasks: dict[str, DemoTask]) -> None:
    texts = [text for split in tasks[name].splits.values() for text in split.texts]
    assert len(set(texts)) == len(texts)


def test_label_texts_are_distinct_phrases(tasks: dict[str, DemoTask]) -> None:
    for task in tasks.values():
        assert len(set(task.label_texts)) == len(task.label_texts)
        assert all(" " in text for text in task.label_texts)


def test_loading_twice_gives_the_same(tasks: dict[str, DemoTask]) -> None:
    assert load_tasks() == list(tasks.values())


def test_the_head_of_a_split() -> None:
    split = Split(["a", "b", "c"], [0, 1, 0])
    assert split.head(2) == Split(["a", "b"], [0, 1])
    assert split.head(None) == split
    assert split.head(9) == split
