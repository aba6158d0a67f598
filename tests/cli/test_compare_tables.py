from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mergeready.cli.compare_tables import print_matrix
from mergeready.experts import Base, open_expert
from mergeready.metrics.compare import compare_vectors
from tests.cli.commands import Main, numbers, succeed


class TestCompare:
    def test_every_number(self, here: Path) -> None:
        text = succeed("compare", "base", "law", "code[bold]", "adapter")
        base = Base.open(here / "base")
        vectors = [open_expert(here / name, base).vector for name in ("law", "code[bold]", "adapter")]
        exact = compare_vectors(vectors, base.source)
        for index, label in enumerate(("law", "code[bold]", "adapter")):
            rows = [line for line in text.splitlines() if f" {label} " in line]
            assert len(rows) == 3
            norm, share = numbers(rows[0])
            assert norm == pytest.approx(exact.norms[index], rel=1e-3)
            assert share == pytest.approx(100 * exact.relative_norms[index], abs=0.01)
            for line, matrix in zip(rows[1:], (exact.cosine, exact.sign_conflict), strict=True):
                others = [value for other, value in enumerate(matrix[index]) if other != index]
                assert numbers(line) == pytest.approx(others, abs=1e-3)
        last = " ".join(text.split())
        assert f"Norm ratio {exact.norm_ratio:.2f}." in last
        assert f"Sign conflict of all together {exact.conflict_of_all:.3f}" in last
        assert "These are diagnostics: they predict merged quality badly." in last

    def test_numbers_are_whole_on_a_narrow_terminal(self) -> None:
        rng = np.random.default_rng(0)
        values = rng.uniform(-1, 1, (14, 14))
        screen = Console(width=80, record=True, file=io.StringIO())
        print_matrix(
            screen, "Cosine", [f"org/some-long-name-of-an-expert-{i}" for i in range(14)], values.tolist()
        )
        text = screen.export_text()
        assert max(map(len, text.splitlines())) <= 80
        assert sorted(numbers(text)) == sorted(
            float(f"{values[i, j]:z.3f}") for i in range(14) for j in range(14) if i != j
        )

    def test_an_expert_that_equals_its_base_has_no_direction(self, here: Path) -> None:
        text = succeed("compare", "base", "base", "law")
        assert "nan" not in text
        assert "An expert equals its base" in text

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_heatmaps(self, suffix: str, here: Path, tmp_path: Path) -> None:
        folder = tmp_path / ("long " * 20)
        folder.mkdir()
        path = folder / f"heatmap{suffix}"
        text = succeed("compare", "base", "law", "code[bold]", "-o", path)
        assert f"Wrote {path}" in text, "a path is never broken into lines"
        assert path.stat().st_size > 1000

    def test_heads_stay_out_when_that_is_allowed(self, here: Path, main: Main) -> None:
        code, _, error = main("compare", "encoder", "law", "code[bold]")
        assert (code, "classifier.weight" in error) == (1, True)
        assert "code[bold]" in succeed("compare", "encoder", "law", "code[bold]", "--no-strict")
