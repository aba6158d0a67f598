"""`mergeready factors`, from the command line to the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mergeready import KroneckerFactors, kronecker_factors
from mergeready.cli import app
from mergeready.errors import OptionError
from tests.models import perturb, tiny_bert, token_batch


def law(base: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """A model whose weights are not the base's, which the command puts there."""
    assert Path(base).is_dir()
    return perturb(tiny_bert(), 9, 0.05), [token_batch(i) for i in range(3)]


def nothing(base: str) -> None:
    return None


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    tiny_bert().save_pretrained(tmp_path / "base")
    perturb(tiny_bert(), 1, 0.05).save_pretrained(tmp_path / "law")
    return tmp_path / "base", tmp_path / "law"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["factors", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("at", ["base", "expert"])
def test_factors_are_those_of_the_library(folders: tuple[Path, Path], tmp_path: Path, at: str) -> None:
    base, expert = folders
    output = tmp_path / "x.factors.safetensors"
    said = run(expert, "-b", base, "--data", f"{__name__}:law", "-o", output, "--at", at, "--memory", "20kB")
    assert "law: " in said
    assert "12 examples" in said
    assert "give those away" in said
    made = KroneckerFactors.load(output)
    model = tiny_bert() if at == "base" else perturb(tiny_bert(), 1, 0.05)
    exact = kronecker_factors(model, [token_batch(i) for i in range(3)], base=tiny_bert())
    assert (made.label, made.layers) == ("law", exact.layers)
    for name in exact.layers:
        for ours, theirs in zip(made.read(name), exact.read(name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_what_does_not_serve_is_refused(folders: tuple[Path, Path]) -> None:
    base, expert = folders
    for data, message in (
        ("law", "module:function"),
        ("no_such_module:law", "No module named"),
        (f"{__name__}:nothing", "must return a model and batches"),
    ):
        with pytest.raises(OptionError, match=message):
            run(expert, "-b", base, "--data", data)
