from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeready.errors import BaseMismatchError
from mergeready.experts import Base, open_expert
from mergeready.experts.fingerprint import Fingerprint
from mergeready.metrics.compare import compare_vectors
from tests.cli.commands import run, succeed


def numbers(text: str, title: str) -> list[list[float]]:
    """The numbers of a printed table, a list a row."""
    table = text[text.index(title) :]
    rows = [line for line in table.splitlines() if line.startswith("│")]
    return [[float(n) for n in re.findall(r"-?\d\.\d+", row)] for row in rows]


def test_it_is_written_and_compared(here: Path, tmp_path: Path) -> None:
    text = succeed("fingerprint", "law", "--base", "base", "-o", tmp_path / "law.fingerprint.safetensors")
    made = Fingerprint.load(tmp_path / "law.fingerprint.safetensors")
    assert made.label == "law"
    assert f"norm {made.norm:.4g}" in text.replace("\n", " ")
    base = Base.open("base")
    exact = compare_vectors(
        [open_expert(name, base).vector for name in ("law", "code[bold]", "adapter")], base.source
    )
    shown = succeed("compare", "base", tmp_path / "law.fingerprint.safetensors", "code[bold]", "adapter")
    assert "Estimated from fingerprints" in shown
    # At the default budget a tiny model is sampled whole, so only rounding to bf16 is between the two.
    assert numbers(shown, "Cosine")[0] == pytest.approx(exact.cosine[0][1:], abs=3e-3)
    assert numbers(shown, "Sign conflict")[0] == pytest.approx(exact.sign_conflict[0][1:], abs=3e-3)


def test_the_name_is_the_folders_unless_given(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("fingerprint", here / "law", "--base", here / "base")
    assert Fingerprint.load(tmp_path / "law.fingerprint.safetensors").label == "law"
    succeed(
        "fingerprint",
        here / "law",
        "--base",
        here / "base",
        "--label",
        "org/law",
        "-o",
        "a.fingerprint.safetensors",
    )
    assert Fingerprint.load(tmp_path / "a.fingerprint.safetensors").label == "org/law"


def test_the_folder_one_is_in_has_a_name_too(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(here / "law", tmp_path / "law")
    monkeypatch.chdir(tmp_path / "law")
    succeed("fingerprint", ".", "--base", here / "base")
    assert Fingerprint.load("law.fingerprint.safetensors").label == "law"


def test_a_fingerprint_of_another_base_is_refused(here: Path, tmp_path: Path) -> None:
    succeed("fingerprint", "law", "--base", "base", "-o", tmp_path / "law.fingerprint.safetensors")
    done = run("compare", "stranger", tmp_path / "law.fingerprint.safetensors", "stranger")
    assert isinstance(done.exception, BaseMismatchError)
    assert "law" in str(done.exception)


def test_experts_in_16_bits_say_so(here: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    base, tuned = load_file("base/model.safetensors"), load_file("law/model.safetensors")
    tuned = {name: torch.lerp(base[name], value, 0.01).bfloat16() for name, value in tuned.items()}
    save_file(tuned, tmp_path / "half/model.safetensors", metadata={"format": "pt"})
    out = ("-o", tmp_path / "x.fingerprint.safetensors")
    assert "stored in 16 bits" in succeed("fingerprint", tmp_path / "half", "--base", "base", *out)
    assert "stored in 16 bits" not in succeed("fingerprint", "law", "--base", "base", *out)
