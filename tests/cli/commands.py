"""Calls commands, and reads what they write."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from mergeready import cli
from mergeready.experts import Base

Main = Callable[..., tuple[int, str, str]]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output or done.exception
    return done.stdout


def read(folder: Path) -> dict[str, Tensor]:
    source = Base.open(folder).source
    return {name: source.read(name) for name in source.infos}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", text)]
