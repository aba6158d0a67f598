from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mergeready
from mergeready.cli import merge as command
from mergeready.experts import open_expert
from mergeready.experts.record import read_record
from mergeready.merging import merge, merge_folders, merge_plan, method_names
from tests.cli.commands import Main, equal, read, run, succeed
from tests.models import tiny_bert
from tests.trainers import weights_of


class TestMerge:
    def expected(
        self, here: Path, *experts: str, method: str = "task_arithmetic", **options: object
    ) -> object:
        """In memory, by the Python function."""
        return merge(read(here / "base"), [here / expert for expert in experts], method, **options)  # type: ignore[call-overload]

    def test_full_models_and_adapters(self, here: Path, tmp_path: Path) -> None:
        text = succeed("merge", "base", "law", "code[bold]", "adapter", "-o", tmp_path / "out")
        assert "Merged 3 experts with task_arithmetic into" in text
        assert equal(read(tmp_path / "out"), self.expected(here, "law", "code[bold]", "adapter"))
        assert (tmp_path / "out" / "config.json").is_file()

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            (["-m", "ties", "--density", "0.5"], {"method": "ties", "density": 0.5}),
            (["-m", "ties", "-p", "density=0.5"], {"method": "ties", "density": 0.5}),
            (["--method", "average", "--scale", "0.75"], {"method": "average", "scale": 0.75}),
            (["--weights", "1,0.25"], {"weights": [1, 0.25]}),
            (["--weights", "1, -0.5"], {"weights": [1, -0.5]}),
            (
                ["-m", "dare_linear", "-p", "density=0.5", "--param", "seed=3"],
                {"method": "dare_linear", "density": 0.5, "seed": 3},
            ),
        ],
    )
    def test_options(
        self, arguments: list[str], options: dict[str, object], here: Path, tmp_path: Path
    ) -> None:
        succeed("merge", "base", "law", "adapter", "-o", tmp_path / "out", *arguments)
        assert equal(read(tmp_path / "out"), self.expected(here, "law", "adapter", **options))  # type: ignore[arg-type]

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_dtype(self, name: str, here: Path, tmp_path: Path) -> None:
        succeed("merge", "base", "law", "-o", tmp_path / "out", "--dtype", name)
        dtype = getattr(torch, name)
        found = read(tmp_path / "out")
        assert {value.dtype for value in found.values() if value.is_floating_point()} == {dtype}
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name

    def test_one_expert_at_scale_one_is_that_expert(self, here: Path, tmp_path: Path) -> None:
        succeed("merge", "base", "law", "-o", tmp_path / "out")
        for name, value in read(tmp_path / "out").items():
            torch.testing.assert_close(value, read(here / "law")[name], rtol=0, atol=1e-7)

    def test_heads_stay_out_when_that_is_allowed(self, here: Path, tmp_path: Path, main: Main) -> None:
        arguments = ["merge", "encoder", "law", "-o", tmp_path / "out"]
        code, _, error = main(*arguments)
        assert code == 1
        assert "classifier.weight" in error
        assert not (tmp_path / "out").exists()
        succeed(*arguments, "--no-strict")
        assert "classifier.weight" not in read(tmp_path / "out")

    def test_overwriting_must_be_allowed(self, here: Path, tmp_path: Path, main: Main) -> None:
        arguments = ["merge", "base", "law", "-o", tmp_path / "out"]
        succeed(*arguments)
        code, _, error = main(*arguments, "--scale", "2")
        assert (code, "exists" in error) == (1, True)
        assert equal(read(tmp_path / "out"), self.expected(here, "law"))
        succeed(*arguments, "--scale", "2", "--overwrite")
        assert equal(read(tmp_path / "out"), self.expected(here, "law", scale=2.0))

    def test_the_result_is_an_expert_with_a_verified_base(self, here: Path, tmp_path: Path) -> None:
        succeed("merge", "base", "law", "-o", tmp_path / "out")
        assert open_expert(tmp_path / "out", here / "base").base_checked == "recorded"


def test_every_method_can_be_named(here: Path, tmp_path: Path) -> None:
    for method in method_names():
        done = run("merge", "base", "law", "adapter", "-m", method, "-o", tmp_path / method)
        if done.exit_code:  # such as one that is for a certain number of experts
            assert type(done.exception).__module__ == "mergeready.errors"
        else:
            assert all(torch.isfinite(value).all() for value in read(tmp_path / method).values())
            assert not equal(read(tmp_path / method), weights_of(tiny_bert()))


def test_a_plan_touches_nothing(here: Path, tmp_path: Path) -> None:
    text = succeed("merge", "base", "law", "adapter", "-m", "ties", "--plan", "--dtype", "bfloat16")
    plan = merge_plan(here / "base", [here / "law", here / "adapter"], "ties", dtype=torch.bfloat16)
    for word in ("law", "adapter", "peft", "ties", "model.safetensors", f"{plan.methods[0].elements:,}"):
        assert word in text
    assert f"{plan.inputs[1].nbytes / 1000:.1f} kB" in text
    assert f"writes {plan.write_bytes / 1000:.1f} kB" in text
    assert list(tmp_path.iterdir()) == []


def test_resources(here: Path, tmp_path: Path, main: Main) -> None:
    arguments = ["merge", "base", "law", "-m", "tsv_m", "-o", tmp_path / "out", "--threads", "2"]
    code, _, error = main(*arguments, "--memory", "1kB")
    assert code == 1
    assert "`memory` is 1.0 kB, and these parameters need more" in error
    assert list(tmp_path.iterdir()) == []
    succeed(*arguments, "--memory", "100 MB")
    assert (tmp_path / "out").is_dir()
    for wrong in ("lots", "-1MB", "0", "5iB"):
        code, _, error = main(*arguments, "--memory", wrong, "--overwrite")
        assert (code, f"'{wrong}' is not a size" in error) == (1, True)


def test_double_precision(here: Path, tmp_path: Path) -> None:
    succeed("merge", "base", "law", "-o", tmp_path / "a", "--arithmetic", "float64", "--scale", "0.3")
    merge_folders(here / "base", [here / "law"], tmp_path / "b", arithmetic="float64", scale=0.3)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_rounding_loses(here: Path, tmp_path: Path) -> None:
    assert "Rounding" not in succeed("merge", "base", "law", "-o", tmp_path / "a")
    text = succeed("merge", "base", "law", "-o", tmp_path / "b", "--dtype", "bfloat16")
    record = read_record(tmp_path / "b")
    assert record is not None
    loss = record["rounding"]
    assert f"Rounding to bfloat16 loses {loss['total']:.1%} of the merged change." in text
    for name, share in loss["worst"].items():
        assert f"{share:.1%} {name}" in " ".join(text.split())


def test_an_output_is_needed_unless_planning(here: Path) -> None:
    done = run("merge", "base", "law")
    assert done.exit_code == 2
    assert "--output" in done.output


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_terminals_only(terminal: bool) -> None:
    out = Console(force_terminal=terminal, width=100, record=True, file=io.StringIO())
    with command._progress_bar(out) as progress:
        assert (progress is not None) == terminal
        if progress is not None:
            progress(500_000, 1_000_000)
    text = out.export_text()
    assert ("0.5/1.0 MB" in text or "500.0" in text) == terminal


@pytest.mark.slow
def test_ranks_of_torchrun(here: Path, tmp_path: Path) -> None:
    arguments = ["merge", "base", "law", "adapter", "-m", "ties"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(mergeready.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "mergeready.cli", *arguments, "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Merged 2 experts") == 1
    succeed(*arguments, "-o", tmp_path / "one")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_configuration(here: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "base",
        "law",
        "adapter",
        "-m",
        "ties",
        "--density",
        "0.5",
        "--scale",
        "0.7",
        "--weights",
        "1,2",
    ]
    succeed("merge", *arguments, "-o", tmp_path / "a", "--mergekit", tmp_path / "mergekit.yaml")
    for i, config in enumerate((tmp_path / "a" / "mergeready_merge.yaml", tmp_path / "mergekit.yaml")):
        text = succeed("merge", "--config", config, "-o", tmp_path / str(i))
        assert "Merged 2 experts with ties" in text
        for name, value in read(tmp_path / "a").items():
            assert torch.equal(read(tmp_path / str(i))[name], value)
    config = tmp_path / "mergekit.yaml"
    succeed("merge", "encoder", "law", "adapter", "--config", config, "--no-strict", "-o", tmp_path / "other")
    assert "pooler.dense.weight" in read(tmp_path / "other")
    for wrong, message in (
        (["--scale", "2"], "change `scale` there"),
        (["-m", "ties", "-p", "density=1"], "change `method`, `parameters` there"),
        (["base", "law"], "merges 2 experts, and 1 are given"),
    ):
        code, _, error = main("merge", *wrong, "--config", config, "-o", tmp_path / "wrong")
        assert (code, message in error) == (1, True), error
    monkeypatch.chdir(tmp_path)
    code, _, error = main("merge", "--config", "a/mergeready_merge.yaml", "-o", "wrong")
    assert (code, "not where they lie. Name base and experts" in error) == (1, True), error
    assert not (tmp_path / "wrong").exists()
