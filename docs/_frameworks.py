"""Writes the page of frameworks, strategies and precisions from _frameworks.yaml: ``python docs/_frameworks.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).with_name("_frameworks.yaml")
PAGE = Path(__file__).with_name("frameworks.md")
INTRODUCTION = """# Frameworks, strategies, precisions

One monitor serves every framework, so a run has the same history whichever trains it. This table says where that was
tried. It is written by `docs/_frameworks.py` from `docs/_frameworks.yaml`; a test checks that the tests it names exist.

- **tested**: a test of this combination runs on CPU and gloo, with the test's number below.
- supported: the same code as in combinations that are tested; not tried in this one.
- not run here: nothing known stands against it, but it needs an accelerator or a package that the tests do not have.
"""


def load() -> Any:
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def test_ids(data: Any) -> list[str]:
    """Every test that the page names, each once, in order."""
    cells = [cell for row in data["rows"] for cell in row["cells"] if cell.startswith("tests/")]
    refused = [row["test"] for row in data["refused"]]
    return list(dict.fromkeys([*cells, *refused, *(test for _, test in data["pitfalls"])]))


def page(data: Any) -> str:
    """The page as Markdown."""
    tests = test_ids(data)
    number = {test: index for index, test in enumerate(tests, 1)}
    words = {"supported": "supported", "elsewhere": "not run here"}

    def shown(cell: str) -> str:
        return f"**tested** ({number[cell]})" if cell.startswith("tests/") else words[cell]

    columns = ["framework", "strategy", *data["precisions"]]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in data["rows"]:
        if len(row["cells"]) != len(data["precisions"]):
            raise ValueError(f"{row['framework']}, {row['strategy']} needs {len(data['precisions'])} cells")
        cells = [row["framework"], row["strategy"], *map(shown, row["cells"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "With 16-bit weights, fp32 copies that an optimizer keeps are found by their values and measured in their"
        " place; where there are none, each measurement says how much of it is rounding (`resolution`, `unchanged`).",
        "",
        "## Refused with an error",
        "",
        "| what | use instead | test |",
        "|---|---|---|",
        *(f"| {row['what']} | {row['instead']} | {number[row['test']]} |" for row in data["refused"]),
        "",
        "## Pitfalls",
        "",
        "What frameworks do that would make figures or trainings wrong, and the test that it does not. What concerns"
        " techniques and recipes alone says so.",
        "",
        "| pitfall | test |",
        "|---|---|",
        *(f"| {what} | {number[test]} |" for what, test in data["pitfalls"]),
        "",
        "## Tests",
        "",
        *(f"{index}. `{test}`" for test, index in number.items()),
    ]
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(load()), encoding="utf-8")
