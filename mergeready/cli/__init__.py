"""The command line: parse, call, print. One file a command; heavy imports wait until a command needs them."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

from mergeready.cli import compare, demo, factors, fingerprint, inspect, merge, study, train, validate  # noqa: F401 - each registers its command
from mergeready.cli.app import app
from mergeready.errors import MergeReadyError

__all__ = ["app", "main"]


def main() -> None:
    """Entry point: errors that we raise on purpose become one line and exit code 1."""
    try:
        app()
    except MergeReadyError as error:
        message = escape(" ".join(str(error).splitlines()))
        Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
        sys.exit(1)
