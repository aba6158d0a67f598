from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergeready.experts import Base, open_expert
from mergeready.metrics.inspection import inspect_vector
from tests.cli.commands import succeed


class TestInspect:
    @pytest.mark.parametrize(
        ("expert", "checked"),
        [("law", "plausible from the weights"), ("adapter", "not checked: an adapter without a record")],
    )
    def test_every_number(self, expert: str, checked: str, here: Path) -> None:
        text = succeed("inspect", expert, "--base", "base")
        base = Base.open(here / "base")
        opened = open_expert(here / expert, base)
        exact = inspect_vector(opened.vector, base.source)
        rows = [[cell.strip() for cell in line.strip("│").split("│")][:2] for line in text.splitlines()]
        facts = dict(row for row in rows[:8] if len(row) == 2)
        assert text.splitlines()[0].strip() == expert
        assert facts["format"] == opened.format
        assert facts["base"] == checked
        assert facts["norm"] == f"{exact.norm:.4g} ({exact.relative_norm:.2%} of the base)"
        assert facts["unchanged entries"] == f"{exact.sparsity:.1%}"
        assert facts["mass in top 1%"] == f"{exact.top_mass:.1%}"
        assert facts["rank"] == f"at most {exact.rank}; stable rank {exact.stable_rank:.1f} on average"
        for name, value in {**exact.groups, **exact.layers}.items():
            assert [str(name), f"{value:#.4g}"] in rows

    def test_a_recorded_base_is_verified(self, here: Path, tmp_path: Path) -> None:
        succeed("merge", "base", "law", "-o", tmp_path / "out")
        assert "verified against its record" in succeed("inspect", tmp_path / "out", "-b", "base")

    def test_a_head_of_its_own_is_listed(self, here: Path) -> None:
        text = succeed("inspect", "law", "--base", "encoder", "--no-strict")
        assert "not in the base" in text
        assert "classifier.weight" in text

    def test_layers_are_in_order_and_the_longest_bar_is_full(self, here: Path) -> None:
        text = succeed("inspect", "law", "-b", "base")
        rows = [line for line in text.splitlines() if re.match(r"│ [01] ", line)]
        assert [row[2] for row in rows] == ["0", "1"]
        assert max(row.count("█") for row in rows) == 30
