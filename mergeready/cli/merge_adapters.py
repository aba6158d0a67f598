"""What `mergeready merge --as` does: experts become one adapter instead of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from mergeready.errors import OptionError

if TYPE_CHECKING:
    from mergeready.merging.adapters.merge import OutputFormat
    from mergeready.merging.recipe import MergeRecipe

FORMATS: dict[str, OutputFormat] = {"adapter": "peft", "adapterhub": "adapterhub"}


def merge_into_adapter(
    out: Console, recipe: MergeRecipe, output: Path, form: str, rank: str | None, **options: Any
) -> None:
    """Merge adapters into an adapter and print what it cost.

    Raises:
        OptionError: If the form or rank is unknown, or the recipe asks for what only models have.
    """
    from mergeready.merging import merge_adapters

    if form == "model":
        raise OptionError("`--rank` is about adapters: add `--as adapter`, or leave it out.")
    if form not in FORMATS:
        raise OptionError(f"`--as` must be model, {' or '.join(FORMATS)}, not {form!r}.")
    arguments = recipe.options()
    if arguments.pop("arithmetic") != "float32" or arguments.pop("statistics") != "base":
        raise OptionError("`arithmetic` and `statistics` belong to merges into a model.")
    made = merge_adapters(
        recipe.base,
        recipe.experts,
        output,
        output_format=FORMATS[form],
        rank=parse_rank(rank),
        **arguments,
        **options,
    )
    out.print(f"Merged {len(recipe.experts)} adapters with {recipe.method} into {escape(str(made.folder))}/")
    for line in made.summary():
        out.print(f"  {escape(line)}", highlight=False)


def parse_rank(text: str | None) -> Any:
    """A rank: a whole number, a share of energy, or `exact`.

    >>> parse_rank("16"), parse_rank("0.9"), parse_rank(None)
    (16, 0.9, 'exact')
    """
    if text is None:
        return "exact"
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text
