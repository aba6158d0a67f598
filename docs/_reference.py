"""Writes the reference: every public name, grouped by what it is for, from its docstring."""

from __future__ import annotations

import importlib
import inspect

import mkdocs_gen_files

import mergeready

GROUPS = {
    "mergeready.training": "Watch and steer a run",
    "mergeready.merging": "Merge",
    "mergeready.metrics": "Measure",
    "mergeready.experts": "Experts",
    "mergeready.validation": "Validate and share",
    "mergeready.errors": "Errors",
}
SHELLS = ("mergeready.transformers", "mergeready.lightning", "mergeready.fabric", "mergeready.accelerate")


def group_of(place: str) -> str:
    return next(title for prefix, title in GROUPS.items() if place.startswith(prefix))


found: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS.values()}
for name in mergeready.__all__:
    thing = getattr(mergeready, name)
    place = inspect.getmodule(thing)
    home = place.__name__ if place and place.__name__.startswith("mergeready") else mergeready._PLACE_OF[name]
    found[group_of(mergeready._PLACE_OF[name])].append((name, f"{home}.{name}"))

with mkdocs_gen_files.open("reference.md", "w") as page:
    page.write("# Reference\n\nEvery name below is imported from `mergeready` itself.\n")
    for title, names in found.items():
        page.write(f"\n## {title}\n")
        for _, path in sorted(names):
            page.write(f"\n::: {path}\n")
    page.write("\n## Shells\n\nOne module a framework.\n")
    for shell in SHELLS:
        module = importlib.import_module(shell)
        public = [n for n, v in vars(module).items() if n.startswith("MergeReady") and inspect.isclass(v)]
        for name in public:
            home = getattr(module, name).__module__
            page.write(f"\n### `{shell}`\n\n::: {home}.{name}\n    options:\n      heading_level: 4\n")
