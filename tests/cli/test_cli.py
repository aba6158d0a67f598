from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from typer.testing import CliRunner, Result

from mergeready import cli
from mergeready.cli.options import parse_numbers, parse_parameter
from mergeready.errors import HistoryError
from mergeready.experts import Base, open_expert
from mergeready.merging import merge, method_names
from mergeready.metrics.compare import compare_vectors
from mergeready.metrics.inspection import inspect_vector
from tests.models import perturb, tiny_bert, tiny_encoder
from tests.trainers import weights_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two full experts, an adapter, one with a head of its own, and a stranger."""
    folder = tmp_path_factory.mktemp("world")
    tiny_bert().save_pretrained(folder / "base")
    perturb(tiny_bert(), 1).save_pretrained(folder / "law")
    perturb(tiny_bert(), 2, 0.03).save_pretrained(folder / "code[bold]")
    adapter = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "value"]))
    perturb(adapter, 3, 0.1).save_pretrained(folder / "adapter")
    tiny_bert(seed=9).save_pretrained(folder / "stranger")
    tiny_encoder().save_pretrained(folder / "encoder")
    return folder


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths as users type them: relative."""
    monkeypatch.chdir(world)
    return world


COMMANDS = ("demo", "merge", "compare", "inspect", "fingerprint", "validate")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, done.output or done.exception
    return done.stdout


Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """The entry point: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergeready", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def read(folder: Path) -> dict[str, Tensor]:
    source = Base.open(folder).source
    return {name: source.read(name) for name in source.infos}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[-+]\d+)?", text)]


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

    @pytest.mark.parametrize("suffix", [".png", ".svg"])
    def test_heatmaps(self, suffix: str, here: Path, tmp_path: Path) -> None:
        path = tmp_path / f"heatmap{suffix}"
        text = succeed("compare", "base", "law", "code[bold]", "-o", path)
        assert "Wrote" in text
        assert path.stat().st_size > 1000

    def test_heads_stay_out_when_that_is_allowed(self, here: Path, main: Main) -> None:
        code, _, error = main("compare", "encoder", "law", "code[bold]")
        assert (code, "classifier.weight" in error) == (1, True)
        assert "code[bold]" in succeed("compare", "encoder", "law", "code[bold]", "--no-strict")


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
        assert facts["mass in top 1 %"] == f"{exact.top_mass:.1%}"
        assert facts["rank"] == f"at most {exact.rank}; stable rank {exact.stable_rank:.1f} on average"
        for name, value in {**exact.groups, **exact.layers}.items():
            assert [str(name), f"{value:.4g}"] in rows

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


class TestErrors:
    """One line that names the thing, on standard error; exit code 1; nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["merge", "base", "stranger"], "stranger does not descend from base"),
            (["merge", "nowhere/at/all", "law"], "nowhere/at/all"),
            (["merge", "base", "law", "-m", "tise"], "there is no merge method 'tise'; known are"),
            (
                ["merge", "base", "law", "-m", "ties", "--density", "2"],
                "`density` must be in (0, 1], not 2.0",
            ),
            (["merge", "base", "law", "--density", "0.5"], "task_arithmetic has no parameter density"),
            (["merge", "base", "law", "-p", "density"], "'density' is not of the form name=value"),
            (["merge", "base", "law", "-p", "=3"], "'=3' is not of the form name=value"),
            (["merge", "base", "law", "-p", "scale=2"], "task_arithmetic has no parameter scale"),
            (["merge", "base", "law", "-p", "shard_bytes=9"], "task_arithmetic has no parameter shard_bytes"),
            (["merge", "base", "law", "--weights", "1,x"], "'1,x' is not a list of numbers such as 1,0.5"),
            (["merge", "base", "law", "--weights", ""], "'' is not a list of numbers"),
            (["merge", "base", "law", "--weights", "1,2"], "`weights` has 2 values for 1 experts"),
            (["merge", "base", "law", "--scale", "nan"], "`scale` must be finite, not nan"),
            (
                ["merge", "base", "law", "--dtype", "int8"],
                "`dtype` must be one of float32, bfloat16, float16, not int8",
            ),
            (["compare", "base", "law"], "comparing needs at least two experts, not 1"),
            (["compare", "base", "law", "stranger"], "stranger does not descend from base"),
            (["inspect", "nothing", "-b", "base[/x]"], "base[/x]"),
        ],
    )
    def test_they_are_one_line(
        self, arguments: list[str], message: str, here: Path, tmp_path: Path, main: Main
    ) -> None:
        if arguments[0] == "merge":
            arguments = [*arguments, "-o", str(tmp_path / "out")]
        code, out, error = main(*arguments)
        assert code == 1
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
        assert not (tmp_path / "out").exists()

    def test_paths_in_brackets_are_shown_as_they_are(self, here: Path, tmp_path: Path, main: Main) -> None:
        _, _, error = main("merge", "base", "no[red]where[/red]", "-o", tmp_path / "out")
        assert "no[red]where[/red]" in error
        assert "out[dim]/" in succeed("merge", "base", "law", "-o", tmp_path / "out[dim]").replace("\n", "")

    def test_messages_of_several_lines_are_joined(self, monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
        def fail() -> None:
            raise HistoryError("first\nsecond")

        monkeypatch.setattr(cli, "app", fail)
        assert main("inspect") == (1, "", "error: first second\n")

    def test_mistakes_of_ours_keep_their_traceback(self, monkeypatch: pytest.MonkeyPatch, main: Main) -> None:
        def fail() -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(ZeroDivisionError):
            main("inspect")

    @pytest.mark.parametrize(
        "arguments",
        [["merge", "base"], ["merge", "base", "law"], ["inspect", "law"], ["compare"], ["unknown"]],
    )
    def test_what_is_missing_is_a_matter_of_usage(self, arguments: list[str], here: Path, main: Main) -> None:
        code, _, error = main(*arguments)
        assert code == 2
        assert "Usage:" in error


class TestParameters:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("x=3", 3),
            ("x=-3", -3),
            ("x=0.5", 0.5),
            ("x=1e-3", 0.001),
            ("x=true", True),
            ("x=False", False),
            ("x=sum", "sum"),
            ("x=a=b", "a=b"),
            ("x=", ""),
        ],
    )
    def test_values_have_the_type_they_look_like(self, text: str, value: object) -> None:
        name, found = parse_parameter(text)
        assert name == "x"
        assert found == value
        assert type(found) is type(value)

    def test_numbers(self) -> None:
        assert parse_numbers("1,0.5,-2") == [1.0, 0.5, -2.0]
        assert parse_numbers(None) is None


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_every_command(self, command: str) -> None:
        text = succeed(command, "--help")
        assert f"{command} [OPTIONS]" in text
        assert len(text.splitlines()) > 5

    def test_the_list_of_commands(self) -> None:
        text = succeed("--help")
        for command in COMMANDS:
            assert re.search(rf"\b{command}\b", text)

    def test_without_a_command(self) -> None:
        assert "Usage:" in run().output


def test_every_method_can_be_named(here: Path, tmp_path: Path) -> None:
    for method in method_names():
        done = run("merge", "base", "law", "adapter", "-m", method, "-o", tmp_path / method)
        if done.exit_code:  # such as one that is for a certain number of experts
            assert type(done.exception).__module__ == "mergeready.errors"
        else:
            assert all(torch.isfinite(value).all() for value in read(tmp_path / method).values())
            assert not equal(read(tmp_path / method), weights_of(tiny_bert()))


def test_the_demo_is_called_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mergeready.demo import run as run_module
    from tests.demo.test_display import make_results

    seen = []

    def run_demo(output: Path, settings: object, listener: object) -> object:
        seen.append((output, settings))
        return make_results(seconds=90.0), [output / "composability.png"]

    monkeypatch.setattr(run_module, "run_demo", run_demo)
    text = succeed("demo", "--quick", "--joint", "--seed", "3", "-o", tmp_path / "demo[x]")
    from mergeready.demo.settings import DemoSettings

    assert seen == [(tmp_path / "demo[x]", DemoSettings.quick(joint=True, seed=3))]
    joined = text.replace("\n", "")
    assert (
        "task_arithmetic: ends 0.562, picks 0.625, +0.062 [+0.010, +0.110]: merging the picks was better."
        in text
    )
    assert "Took 1.5 minutes." in joined
    assert "demo[x]/composability.png" in joined
    succeed("demo", "-o", tmp_path / "other")
    assert seen[1] == (tmp_path / "other", DemoSettings())
