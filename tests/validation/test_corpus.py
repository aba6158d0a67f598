"""Every broken expert is caught by the check that is meant to; healthy ones raise no alarm."""

from __future__ import annotations

import copy
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mergeready.experts import Base
from mergeready.experts.peft_config import _USED as PEFT_FIELDS
from mergeready.validation import CHECKS, Verdict, validate
from mergeready.validation.run import run_check
from mergeready.validation.subject import Subject
from tests.experts.test_peft_lora import VARIANTS, Variant
from tests.models import perturb, tiny_bert
from tests.validation.corpus import BROKEN, GOLDENS, write_healthy

LONGEST = 2.0
"""Seconds that one broken expert may take."""

HARMLESS = {"P503", "P501", "P502", "B107", "B106"}
"""What goldens and PEFT's own saves fail: cards, records and revisions are for their authors to add."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "healthy").mkdir()
    write_healthy(root / "healthy")
    return root


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "healthy" not in path.parts}


@pytest.mark.parametrize("name", BROKEN)
def test_it_is_caught(name: str, world: Path, tmp_path: Path) -> None:
    broken = BROKEN[name]
    folder = world / "broken" / "expert"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(world / "healthy" / broken.kind, folder)
    base = world / "healthy" / broken.base
    if not name.startswith("tied embeddings adapted"):
        found = {v.id: v.status for v in validate(folder, base, level="base").verdicts}
        assert found[broken.check] != "failed", "the healthy expert fails already"
    broken.change(folder)
    before = files(world / "broken")
    start = time.process_time()
    report = validate(folder, base, level="base")
    spent = time.process_time() - start
    found = {verdict.id: verdict for verdict in report.verdicts}
    assert found[broken.check].status == "failed", [
        (v.id, v.status, v.message) for v in report.verdicts if v.status != "passed"
    ]
    assert found[broken.check].fix
    assert files(world / "broken") == before
    assert spent < LONGEST


def test_another_base_by_name(world: Path) -> None:
    """Two hub ids are needed, and a folder has none: the base is told what it was opened by."""
    base = Base.open(world / "healthy" / "base")
    found = {}
    for name in ("org/base", "org/base-bnb-4bit", "org/another"):
        verdicts = validate(world / "healthy" / "adapter", replace(base, name=name), level="base").verdicts
        found[name] = next(v for v in verdicts if v.id == "B101")
    assert found["org/base"].status == found["org/base-bnb-4bit"].status == "passed"
    assert found["org/another"].status == "failed"
    assert found["org/another"].where == ("org/base",)


def test_every_check_of_files_and_base_has_its_broken_expert() -> None:
    caught = {broken.check for broken in BROKEN.values()}
    others = {"B101", "P503", "D203"}  # tested above, as it needs a name; information only
    assert {c.id for c in CHECKS if c.level in ("file", "base")} - others == caught
    assert len(BROKEN) >= 60


def alarms(folder: Path, base: object) -> dict[str, str]:
    report = validate(folder, base, level="base")
    return {v.id: v.message for v in report.verdicts if v.status == "failed" and v.severity != "info"}


@pytest.mark.parametrize("kind", ["full", "adapter", "dora", "sharded", "mlx", "tied-full"])
def test_healthy_experts(kind: str, world: Path) -> None:
    folder = world / "healthy" / kind
    found = alarms(folder, world / "healthy" / ("tied-base" if "tied" in kind else "base"))
    documented = {"mlx": {"B107"}, "tied-full": {"P501"}}  # no field for a revision; a bare save has no card
    assert found.keys() == documented.get(kind, set()), found


@pytest.mark.parametrize("kind", ["full", "adapter", "dora", "sharded", "mlx"])
def test_the_directions_of_healthy_experts(kind: str, world: Path) -> None:
    report = validate(world / "healthy" / kind, world / "healthy" / "base", level="base")
    found = {v.id: v for v in report.verdicts if v.id in ("D202", "D205")}
    assert {v.status for v in found.values()} == {"passed"}, found


def test_a_healthy_expert_in_16_bits(world: Path, tmp_path: Path) -> None:
    perturb(tiny_bert(), 1, 0.02).to(torch.bfloat16).save_pretrained(tmp_path)
    assert alarms(tmp_path, world / "healthy" / "base").keys() <= HARMLESS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_lora_variant(variant: Variant, tmp_path: Path) -> None:
    base = variant.make()
    model = perturb(get_peft_model(copy.deepcopy(base), LoraConfig(r=4, **variant.options)), 1, 0.03)
    model.save_pretrained(tmp_path)
    found = alarms(tmp_path, base)
    assert found.keys() <= HARMLESS, found


@pytest.mark.parametrize(
    "folder",
    [
        folder
        for kind in ("bert", "gpt2", "llama")
        for folder in sorted((GOLDENS / kind).iterdir())
        if folder.is_dir() and folder.name != "base"
    ],
    ids=lambda p: f"{p.parent.name}-{p.name}",
)
def test_every_adapterhub_golden(folder: Path) -> None:
    found = alarms(folder, folder.parent / "base")
    assert found.keys() <= HARMLESS, found


@pytest.mark.parametrize("kind", sorted(p.name for p in (GOLDENS / "refused").iterdir()))
def test_what_no_sum_can_express_is_refused(kind: str) -> None:
    report = validate(GOLDENS / "refused" / kind, GOLDENS / "bert" / "base", level="base")
    assert {v.id: v.status for v in report.verdicts}["F006"] == "failed"


ODD = [None, True, -1, 10**400, float("nan"), "", "x", [], [[1]], {}, {"a": {"b": 1}}, {"(": "["}]
"""What a stranger may write where something else belongs."""

FIELDS = {
    "adapter": [*sorted(PEFT_FIELDS), "r", "rank_pattern", "base_model_name_or_path", "peft_type"],
    "mlx": ["fine_tune_type", "lora_parameters", "model", "num_layers"],
    "adapterhub-plain": ["config", "model_name", "model_type", "name", "version"],
}


@pytest.mark.parametrize("kind", FIELDS)
def test_no_value_in_a_configuration_breaks_validation(kind: str, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "expert"
    shutil.copytree(world / "healthy" / kind, folder)
    base = Base.open(world / "healthy" / ("adapterhub-base" if "hub" in kind else "base"))
    content = json.loads((folder / "adapter_config.json").read_text())
    inner = [key for key, value in content.items() if isinstance(value, dict) and key in FIELDS[kind]]
    for place in (content, *(content[key] for key in inner)):
        for name in list(place) if place is not content else FIELDS[kind]:
            for odd in ODD:
                kept = place.get(name)
                place[name] = odd
                (folder / "adapter_config.json").write_text(json.dumps(content))
                place[name] = kept
                verdicts = run_all(folder, base)
                assert all(v.message for v in verdicts), (name, odd)


def run_all(folder: Path, base: Base) -> list[Verdict]:
    subject = Subject(folder, base)
    cheap = [c for c in CHECKS if c.level in ("file", "base") and c.cost == "headers" and c.id != "F007"]
    return [run_check(c, subject, {}) for c in cheap]
