from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mergeready import cli
from mergeready.cli.app import console
from mergeready.errors import HistoryError
from tests.cli.commands import Main, run, succeed

COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)


def test_all_commands_are_registered() -> None:
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert set(COMMANDS) <= files
    assert {
        "compare",
        "demo",
        "factors",
        "fingerprint",
        "inspect",
        "merge",
        "study",
        "train",
        "validate",
    } <= set(COMMANDS)


@pytest.mark.parametrize(("rank", "quiet"), [(None, False), ("0", False), ("1", True)])
def test_only_the_first_rank_prints(
    rank: str | None, quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    console().print("x" * 130)
    lines = capsys.readouterr().out.split()
    assert [len(line) for line in lines] == ([] if quiet else [120, 10])  # as wide as files are


def test_on_a_terminal_it_is_as_wide_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "77")
    assert console().width == 77


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


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "base", "LONG", "law"),
        ("compare", "base", "LONG", "law", "--subspaces"),
        ("compare", "base", "LONG", "law", "--partners-of", "law"),
        ("merge", "base", "LONG", "--plan"),
        ("validate", "LONG", "--base", "base", "--level", "base"),
        ("inspect", "LONG", "--base", "base"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_narrow_terminals_cut_no_name(
    arguments: tuple[str, ...], here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that are longer than the table wrap; dots in their place would hide what differs."""
    long = tmp_path / ("a" * 30 + "-" + "b" * 80)
    shutil.copytree("law", long)
    monkeypatch.setattr(f"mergeready.cli.{arguments[0]}.console", lambda: Console(width=60))
    text = succeed(*(long if argument == "LONG" else argument for argument in arguments))
    assert "…" not in text
    assert "b" * 10 in text
