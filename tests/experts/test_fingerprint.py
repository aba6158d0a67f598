from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergeready.errors import BaseMismatchError, FormatError
from mergeready.experts import Base, open_expert
from mergeready.experts.fingerprint import Fingerprint, is_fingerprint
from mergeready.metrics.take_fingerprint import take_fingerprint
from tests.models import perturb, tiny_bert


@pytest.fixture
def made() -> Fingerprint:
    base = tiny_bert()
    expert = perturb(tiny_bert(), 1, 0.02)
    opened = Base.open(base)
    return take_fingerprint(open_expert(expert, opened).vector, opened, label="law", facts={"steps": 3})


def test_it_comes_back_as_it_was(made: Fingerprint, tmp_path: Path) -> None:
    back = Fingerprint.load(made.save(tmp_path / "law.fingerprint.safetensors"))
    assert (back.label, back.shapes, back.norms, back.total) == (
        made.label,
        made.shapes,
        made.norms,
        made.total,
    )
    assert (back.budget, back.facts, back.base) == (made.budget, {"steps": 3}, made.base)
    assert all(torch.equal(back.samples[name], value) for name, value in made.samples.items())
    assert back.subspaces.keys() == made.subspaces.keys()
    assert all(torch.equal(back.subspaces[name], value) for name, value in made.subspaces.items())


def test_the_library_reads_it_too(made: Fingerprint, tmp_path: Path) -> None:
    path = made.save(tmp_path / "x.fingerprint.safetensors")
    assert load_file(path)["samples"].dtype == torch.bfloat16
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["mergeready.about"])["label"] == "law"


def test_endings() -> None:
    assert is_fingerprint("a/b.fingerprint.safetensors")
    assert is_fingerprint(Path("b.fingerprint.safetensors"))
    assert not is_fingerprint("b.safetensors")
    assert not is_fingerprint({"weight": torch.ones(1)})


def altered(path: Path, tensors: dict[str, Any] | None = None, **metadata: str) -> None:
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file({**load_file(path), **(tensors or {})}, path, metadata={**old, **metadata})


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"mergeready.fingerprint": "99"}, "schema '99'"),
        ({}, {"mergeready.about": "{}"}, "does not describe itself"),
        ({}, {"mergeready.about": "["}, "does not describe itself"),
        ({}, {"mergeready.about": "[]"}, "does not describe itself"),
        ({}, {"mergeready.about": "[" * 100_000}, "does not describe itself"),
        ({"norms": torch.ones(2, dtype=torch.float64)}, {}, "contradicts itself: norms"),
        ({"samples": torch.ones(5)}, {}, "contradicts itself: samples"),
        ({"subspaces": torch.ones(1, 4, 64)}, {}, "subspaces"),
    ],
)
def test_damaged_files_are_refused(
    made: Fingerprint, tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str], message: str
) -> None:
    path = made.save(tmp_path / "x.fingerprint.safetensors")
    altered(path, tensors, **metadata)
    with pytest.raises(FormatError, match=message):
        Fingerprint.load(path)


def described(path: Path, **changes: object) -> None:
    """The file with other words about itself."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mergeready.about"])
    altered(path, {}, **{"mergeready.about": json.dumps(about | changes)})


def test_a_size_without_bounds_is_refused(made: Fingerprint, tmp_path: Path) -> None:
    path = made.save(tmp_path / "x.fingerprint.safetensors")
    described(path, total=float("inf"))
    with pytest.raises(FormatError, match="does not describe itself"):
        Fingerprint.load(path)


def test_shapes_below_zero_are_refused(made: Fingerprint, tmp_path: Path) -> None:
    path = made.save(tmp_path / "x.fingerprint.safetensors")
    described(path, shapes={"a": [8], "b": [-3]}, subspaces=[])
    tensors = {"norms": torch.ones(2, dtype=torch.float64), "samples": torch.ones(5)}
    altered(path, tensors | {"subspaces": torch.ones(0, 4, 64)})
    with pytest.raises(FormatError, match="gives b shapes"):
        Fingerprint.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_impossible_norms_are_refused(made: Fingerprint, tmp_path: Path, value: float) -> None:
    path = made.save(tmp_path / "x.fingerprint.safetensors")
    norms = load_file(path)["norms"]
    norms[0] = value
    altered(path, {"norms": norms})
    with pytest.raises(FormatError, match="norms"):
        Fingerprint.load(path)


def test_an_altered_base_is_refused(made: Fingerprint, tmp_path: Path) -> None:
    path = made.save(tmp_path / "x.fingerprint.safetensors")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["mergeready.about"])
    about["base"]["digests"][next(iter(about["base"]["digests"]))] = "0" * 16
    altered(path, {}, **{"mergeready.about": json.dumps(about)})
    with pytest.raises(BaseMismatchError, match="contradicts itself"):
        Fingerprint.load(path)


def test_other_safetensors_are_no_fingerprints(tmp_path: Path) -> None:
    save_file({"norms": torch.ones(1)}, tmp_path / "x.fingerprint.safetensors")
    with pytest.raises(FormatError, match="is no fingerprint"):
        Fingerprint.load(tmp_path / "x.fingerprint.safetensors")
