"""What all commands share: the application, its arguments, the console."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mergeready.experts import Base
    from mergeready.experts.open import Expert

app = typer.Typer(
    help="Fine-tune experts that merge well: measure, steer and verify composability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BaseArgument = Annotated[str, typer.Argument(help="Folder or hub id of the base.", show_default=False)]
ExpertsArgument = Annotated[
    list[str],
    typer.Argument(help="Folders or hub ids of experts: full models or LoRA adapters.", show_default=False),
]
BaseOption = Annotated[
    str, typer.Option("-b", "--base", help="Folder or hub id of its base.", show_default=False)
]
ExpertArgument = Annotated[str, typer.Argument(help="Folder or hub id of the expert.", show_default=False)]
StrictOption = Annotated[
    bool,
    typer.Option(
        help="Refuse experts whose parameter names differ from the base's; otherwise leave those out."
    ),
]


def console() -> Console:
    """Where commands print: as wide as the terminal, 120 columns into files. Of several ranks only the first prints."""
    quiet = os.environ.get("RANK", "0") != "0"
    return Console(width=None if sys.stdout.isatty() else 120, quiet=quiet)


def open_all(base: str, experts: list[str], strict: bool) -> tuple[Base, list[Expert]]:
    """Open a base and experts of it."""
    from mergeready.experts import Base, open_expert

    opened_base = Base.open(base)
    return opened_base, [open_expert(expert, opened_base, strict=strict) for expert in experts]
