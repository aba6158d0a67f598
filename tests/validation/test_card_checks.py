"""What cards and other texts of strangers say, and what they should not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeready.validation import Verdict, validate
from tests.validation.experts import CARD, write_adapter


@pytest.fixture
def law(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "law")


def verdict(folder: Path, name: str) -> Verdict:
    return next(v for v in validate(folder, level="file").verdicts if v.id == name)


@pytest.mark.parametrize("before", ["\n", "\ufeff", "   \n"])
def test_metadata_that_the_hub_sees_is_seen(law: Path, before: str) -> None:
    (law / "README.md").write_text(before + CARD, encoding="utf-8")
    assert verdict(law, "P501").message == "base_model org/base, license apache-2.0"


def test_scores_of_many_tasks_do_not_hide_what_follows(law: Path) -> None:
    scores = "".join(f"- {{name: task-{i}, type: sts, value: {i}.5}}\n" for i in range(5000))
    (law / "README.md").write_text(CARD.replace("base_model:", f"scores:\n{scores}base_model:"))
    assert verdict(law, "P501").status == "passed"


def test_metadata_that_cannot_be_read_is_said_to_be_there(law: Path) -> None:
    (law / "README.md").write_text("---\nlicense: [mit\n---\n")
    found = verdict(law, "P501")
    assert found.status == "failed"
    assert "is not YAML" in found.message


def test_a_tokenizers_configuration_is_looked_through(law: Path) -> None:
    """It often holds the cache that the tokenizer came from."""
    (law / "tokenizer_config.json").write_text('{"special_tokens_map_file": "/root/.cache/x/special.json"}')
    assert verdict(law, "F007").where == ("a local path in tokenizer_config.json",)


def test_what_is_too_large_or_damaged_is_not_called_clean(law: Path) -> None:
    (law / "trainer_state.json").write_text('{"log": "' + "x " * 1_000_001 + '"}')
    found = verdict(law, "F007")
    assert (found.status, found.message) == (
        "not checked",
        "nothing found, but trainer_state.json could not be looked through",
    )
    (law / "stray.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (law / "notes.txt").write_text("from /home/me/run")
    assert verdict(law, "F007").where == ("a local path in notes.txt",)


@pytest.mark.parametrize(
    "path", ["/content/drive/MyDrive/llama", "/kaggle/input/llama", "/fsx/me/llama", "/Volumes/disk/llama"]
)
def test_paths_of_notebooks_and_clusters(law: Path, path: str) -> None:
    (law / "notes.txt").write_text(f"trained from {path}")
    assert verdict(law, "F007").where == ("a local path in notes.txt",)


@pytest.mark.parametrize(
    "name", ["/opt/models/llama", "../base", "./base", "C:\\models\\base", "https://x.example/b"]
)
def test_a_path_names_no_base(law: Path, name: str) -> None:
    """PEFT writes the path that a model was loaded from."""
    (law / "README.md").write_text(CARD.replace("org/base", name), encoding="utf-8")
    assert verdict(law, "P501").where == ("base_model",)


@pytest.mark.parametrize("name", ["gpt2", "org/base-1.5_x", "[org/base, org/other]"])
def test_hub_ids_name_a_base(law: Path, name: str) -> None:
    (law / "README.md").write_text(CARD.replace("org/base", name), encoding="utf-8")
    assert verdict(law, "P501").status == "passed"
