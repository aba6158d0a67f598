"""Splits and draws that depend on the examples and a seed, and on nothing else."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "validation", "test"]

TEST_SHARE = 0.2  # of all examples or groups
VALIDATION_SHARE = 0.15  # of what is not test
MAX_CHARACTERS = 2000  # far more than any benchmark tokenizes


@dataclass(frozen=True, slots=True)
class Example(Generic[T]):
    """One labelled example.

    Attributes:
        key: identifies the content; equal keys are duplicates. It also fixes the order, so it must not
            depend on the machine.
        value: what the model reads, or what is needed to make it.
        label: class index.
        group: the document or font family it belongs to; "" makes the example its own group.
    """

    key: str
    value: T
    label: int
    group: str = ""


@dataclass(frozen=True, slots=True)
class Pools(Generic[T]):
    """Where the examples of each split may be drawn from; the three share no key."""

    train: tuple[Example[T], ...]
    validation: tuple[Example[T], ...]
    test: tuple[Example[T], ...]


@dataclass(frozen=True, slots=True)
class Draw(Generic[T]):
    """The examples drawn for each split."""

    train: tuple[Example[T], ...]
    validation: tuple[Example[T], ...]
    test: tuple[Example[T], ...]


def fraction(text: str) -> float:
    """A number in [0, 1) that looks random and is always the same for the same text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def distinct(examples: Iterable[Example[T]], *, without: Iterable[Example[T]] = ()) -> list[Example[T]]:
    """One example a key, in key order; keys with two different labels and keys of ``without`` left out."""
    labels: dict[str, set[int]] = {}
    first: dict[str, Example[T]] = {}
    for example in examples:
        labels.setdefault(example.key, set()).add(example.label)
        first.setdefault(example.key, example)
    banned = {example.key for example in without}
    return [first[key] for key in sorted(first) if len(labels[key]) == 1 and key not in banned]


def tidy(text: str) -> str:
    """The text in one line with single spaces, at most ``MAX_CHARACTERS`` long."""
    return " ".join(text.split())[:MAX_CHARACTERS].rstrip()


def text_example(text: str, label: int, group: str = "") -> Example[str]:
    """A tidy text; texts that differ in case only are duplicates."""
    text = tidy(text)
    return Example(text.lower(), text, label, group)


def rank_groups(groups_by_class: Mapping[str, Iterable[str]]) -> dict[str, Split]:
    """Assign the groups of each class to splits by rank, so that even a class of few groups is in all three.

    >>> rank_groups({"serif": ["a", "b", "c"], "sans": ["d", "e", "f"]})
    {'c': 'test', 'b': 'validation', 'a': 'train', 'd': 'test', 'f': 'validation', 'e': 'train'}
    """
    assigned: dict[str, Split] = {}
    for groups in groups_by_class.values():
        ranked = sorted(set(groups), key=fraction)
        test = max(1, round(TEST_SHARE * len(ranked)))
        validation = max(1, round(VALIDATION_SHARE * (len(ranked) - test)))
        for rank, group in enumerate(ranked):
            assigned[group] = "test" if rank < test else "validation" if rank < test + validation else "train"
    return assigned


def split_pools(
    examples: Iterable[Example[T]],
    *,
    test_examples: Iterable[Example[T]] | None = None,
    assigned: Mapping[str, Split] | None = None,
    test_share: float = TEST_SHARE,
    validation_share: float = VALIDATION_SHARE,
) -> Pools[T]:
    """Separate examples into train, validation and test pools by a hash, never by a seed.

    Args:
        examples: all examples, or those of the source's own training split.
        test_examples: the source's own test split; None takes a share of ``examples``.
        assigned: group → split. None assigns groups by their hash. A group is never cut.
        test_share: share of the groups that go to the test pool, in (0, 1).
        validation_share: share of the remaining groups that go to the validation pool, in (0, 1).
    """
    pools: dict[Split, list[Example[T]]] = {"train": [], "validation": [], "test": []}
    pools["test"] += distinct(test_examples or ())
    for example in distinct(examples, without=pools["test"]):
        group = example.group or example.key
        if assigned is not None:
            split = assigned[group]
        elif test_examples is None and fraction(f"test {group}") < test_share:
            split = "test"
        else:
            split = "validation" if fraction(f"validation {group}") < validation_share else "train"
        pools[split].append(example)
    return Pools(tuple(pools["train"]), tuple(pools["validation"]), tuple(pools["test"]))


def draw(pools: Pools[T], *, train: int, validation: int, test: int, seed: int) -> Draw[T]:
    """Draw examples at random; ``seed`` moves training and validation, the test examples never move.

    Each number is an upper bound: a pool that holds fewer examples is used whole.
    """
    return Draw(
        train=_sample(pools.train, train, random.Random(f"train {seed}")),
        validation=_sample(pools.validation, validation, random.Random(f"validation {seed}")),
        test=_sample(pools.test, test, random.Random("test")),
    )


def _sample(pool: Sequence[Example[T]], count: int, rng: random.Random) -> tuple[Example[T], ...]:
    """A plain random sample, in which a class of the pool that was missed replaces one frequent example."""
    if count < 1:
        raise ValueError(f"`count` of examples must be at least 1, got {count}")
    order = list(pool)
    rng.shuffle(order)
    chosen, spare = order[:count], order[count:]
    counts: dict[int, int] = {}
    for example in chosen:
        counts[example.label] = counts.get(example.label, 0) + 1
    for example in spare:
        if example.label in counts or len(counts) >= count:
            continue
        crowded = max(counts, key=lambda label: (counts[label], -label))
        place = max(i for i, other in enumerate(chosen) if other.label == crowded)
        chosen[place] = example
        counts[crowded] -= 1
        counts[example.label] = 1
    return tuple(chosen)
