"""Writes the page of recipes and examples: what each costs, as benchmarks/walkthrough.py measured it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mkdocs_gen_files
from jinja2 import Template

DOCS, RESULTS = Path("docs"), Path("benchmarks/results")


def cells(page: str) -> dict[str, str]:
    """Of a table in a page of the repository: a script's name to the situation that it shows."""
    rows = re.findall(
        r"^\| \[(\w+\.py)\]\(\S+\) \| (.+?) \|", Path(page).read_text(encoding="utf-8"), re.MULTILINE
    )
    return dict(rows)


def purpose(recipe: str) -> str:
    """For whom a recipe is, from its page."""
    text = (Path(recipe).parent / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^\*\*For whom\.\*\* Who (.+?)[.:]?$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the page of {recipe} does not say for whom it is")
    return re.sub(r"[:,].*|\s*\(.*?\)", "", found[1])


content = json.loads((RESULTS / "walkthrough.json").read_text(encoding="utf-8"))
runs = content["runs"]
situations = cells("examples/README.md")
template = Template((DOCS / "_walkthrough.md.jinja").read_text(encoding="utf-8"))
recipes = [name.removesuffix(" --quick") for name in runs if name.endswith(" --quick")]
with mkdocs_gen_files.open("walkthrough.md", "w") as file:
    file.write(
        template.render(
            machine=content["machine"],
            recipes=[(path, purpose(path), runs[f"{path} --quick"], runs.get(path)) for path in recipes],
            examples=[
                (name, situations[Path(name).name], cell)
                for name, cell in runs.items()
                if name.startswith("examples/")
            ],
        )
    )
