from __future__ import annotations

import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from mergeready import cli
from tests.cli.commands import Main
from tests.models import perturb, tiny_bert, tiny_encoder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two full experts, an adapter, one with a head of its own, and a stranger."""
    folder = tmp_path_factory.mktemp("world")
    tiny_bert().save_pretrained(folder / "base")
    perturb(tiny_bert(), 1).save_pretrained(folder / "law")
    perturb(tiny_bert(), 2, 0.03).save_pretrained(folder / "code[bold]")
    adapter = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"]))
    perturb(adapter, 3, 0.1).save_pretrained(folder / "adapter")
    tiny_bert(seed=9).save_pretrained(folder / "stranger")
    tiny_encoder().save_pretrained(folder / "encoder")
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths as users type them: relative."""
    monkeypatch.chdir(world)
    return world


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The entry point: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergeready", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
