from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import Main, succeed


def test_an_adapter_of_adapters(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = succeed("merge", "base", "adapter", "adapter", "--weights", "1,0.5", "--as", "adapter", "-o", out)
    assert "Merged 2 adapters with task_arithmetic" in text
    assert "modules of rank 4, exact." in text
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_compression_prints_the_energy(here: Path, tmp_path: Path) -> None:
    for rank, expected in (("2", "rank 2"), ("0.9", "rank")):
        out = tmp_path / rank
        text = succeed("merge", "base", "adapter", "--as", "adapterhub", "--rank", rank, "-o", out)
        assert expected in text
        assert "of the merged change's energy; least in" in text
        assert "config" in json.loads((out / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "lora"], "`--as` must be model, adapter or adapterhub"),
        (["--rank", "4"], "`--rank` is about adapters: add `--as adapter`"),
        (["--as", "adapter", "--rank", "many"], "`rank` must be"),
        (["--as", "adapter", "-m", "ties"], "ties gives changes of full rank: choose `rank`"),
        (["--as", "adapter", "--arithmetic", "float64"], "belong to merges into a model"),
        (["--as", "adapter", "--plan"], "--plan is for merges into a model"),
        (
            ["--rank", "4", "--memory", "1GB", "--threads", "2"],
            "--memory, --threads is for merges into a model",
        ),
    ],
)
def test_what_is_wrong_is_said(
    options: list[str],
    message: str,
    here: Path,
    tmp_path: Path,
    main: Main,
) -> None:
    code, _, error = main("merge", "base", "adapter", "-o", tmp_path / "out", *options)
    assert (code, message in error) == (1, True), error
    assert not (tmp_path / "out").exists()


def test_full_models_are_no_adapters(here: Path, tmp_path: Path, main: Main) -> None:
    code, _, error = main("merge", "base", "adapter", "law", "--as", "adapter", "-o", tmp_path / "out")
    assert (code, "are no adapters" in error) == (1, True)
