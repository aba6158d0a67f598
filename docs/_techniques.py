"""Writes the page of techniques from their docstrings."""

from __future__ import annotations

from pathlib import Path

import mkdocs_gen_files
from jinja2 import Template

from mergeready.training.techniques.registry import technique_class, technique_names

template = Template((Path("docs") / "_techniques.md.jinja").read_text(encoding="utf-8"))
classes = {name: technique_class(name) for name in technique_names()}
with mkdocs_gen_files.open("techniques.md", "w") as page:
    page.write(template.render(classes=classes))
