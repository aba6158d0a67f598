"""Pairs of licences: known to fit, known to contradict, or unknown, which is not passed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeready.experts import open_expert
from mergeready.validation import validate
from tests.validation.corpus import write_card
from tests.validation.experts import write_base, write_full


@pytest.mark.parametrize(
    ("own", "base", "peer", "status"),
    [
        ("apache-2.0", "mit", None, "passed"),
        ("cc-by-nc-4.0", "apache-2.0", None, "passed"),
        ("llama3.1", "llama3.1", None, "passed"),
        ("mit", "llama3.1", None, "failed"),
        ("apache-2.0", "cc-by-nc-sa-4.0", None, "failed"),
        ("mit", "gpl-3.0", None, "failed"),
        ("cc-by-nd-4.0", "cc-by-nd-4.0", None, "failed"),
        ("openrail", "bigscience-bloom-rail-1.0", None, "not checked"),
        ("llama3", "gemma", None, "not checked"),
        ("other", "mit", None, "not checked"),
        ("mit", None, None, "not checked"),
        ("gpl-3.0", "mit", "cc-by-nc-4.0", "failed"),
        ("mit", "mit", "gemma", "passed"),
        ("gemma", "mit", "openrail", "not checked"),
        ("mit", "mit", "cc-by-nd-4.0", "failed"),
        ("cc-by-nc-nd-4.0", "mit", "cc-by-nc-nd-4.0", "failed"),
    ],
)
def test_pairs(own: str, base: str | None, peer: str | None, status: str, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    if base is not None:
        write_card(tmp_path / "base", license=base)
    write_card(write_full(tmp_path / "law"), license=own)
    peers = []
    if peer is not None:
        peers = [write_full(tmp_path / "peer", seed=2)]
        write_card(peers[0], license=peer)
    for given in (peers, [open_expert(path, tmp_path / "base") for path in peers]):
        report = validate(tmp_path / "law", tmp_path / "base", peers=given, level="base")
        assert {v.id: v.status for v in report.verdicts}["P502"] == status


def test_a_peer_of_the_hub_has_a_licence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, snapshot = write_base(tmp_path / "base"), write_full(tmp_path / "0123abcd", seed=2)
    write_card(snapshot, license="cc-by-nc-4.0")
    write_card(write_full(tmp_path / "law"), license="gpl-3.0")
    monkeypatch.setattr("mergeready.validation.licence_checks.resolve_folder", lambda peer: snapshot)
    report = validate(tmp_path / "law", base, peers=["org/code"], level="base")
    assert {v.id: v.status for v in report.verdicts}["P502"] == "failed"
