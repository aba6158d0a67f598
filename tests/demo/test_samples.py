from __future__ import annotations

import pytest

from mergeready.demo.samples import definitions, letters, texts
from mergeready.errors import OptionError


def test_both_tasks_on_letters_show_the_same_pictures_and_ask_for_other_classes() -> None:
    letter, face = letters("letter", count=24), letters("face", count=24)
    assert {split: len(data) for split, data in letter.items()} == {"train": 24, "validation": 6, "test": 6}
    for split in letter:
        pairs = zip(letter[split], face[split], strict=True)
        assert all(one["image"].tobytes() == two["image"].tobytes() for one, two in pairs)
    labels = list(zip(letter["train"]["label"], face["train"]["label"], strict=True))
    assert len(set(labels)) > len({one for one, _ in labels}) > 8
    assert {two for _, two in labels} <= set(range(face["train"].features["label"].num_classes))
    assert letter["train"][0]["image"].tobytes() != letter["test"][0]["image"].tobytes()


def test_a_definition_asks_with_the_text_and_answers_with_the_name_of_its_class() -> None:
    asked, given = definitions()["test"], texts("wordnet_noun")["test"]
    name = given.features["label"].int2str
    for one, two in zip(asked.select(range(20)), given.select(range(20)), strict=True):
        assert one["prompt"].startswith(two["text"])
        assert one["completion"] == f" {name(two['label'])}."


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(OptionError, match="no task 'verbs', only "):
        texts("verbs")
    with pytest.raises(OptionError, match="letter and face, not 'digit'"):
        letters("digit")
