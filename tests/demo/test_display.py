from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from mergeready.demo.display import LiveDisplay, results_table, verdict
from mergeready.demo.results import DemoResults, MergedScores
from mergeready.training.records import Estimate
from tests.demo.tiny import tiny_task
from tests.training.histories import probe

METHODS = ("task_arithmetic", "ties")


def estimate(value: float, half: float | None = 0.05) -> Estimate:
    if half is None:
        return Estimate(value=value)
    return Estimate(value=value, n=100, low=value - half, high=value + half)


def merged(first: float, second: float, inside: bool = True) -> MergedScores:
    return MergedScores(
        {"law": estimate(first), "code": estimate(second)}, estimate((first + second) / 2), 0.5, inside
    )


def make_results(**changes: object) -> DemoResults:
    results = DemoResults(
        base={"law": estimate(0.125), "code": estimate(0.25)},
        experts={"law": estimate(0.75), "code": estimate(0.875)},
        ends={"task_arithmetic": merged(0.5, 0.625), "ties": merged(0.375, 0.375)},
        picks={"task_arithmetic": merged(0.5625, 0.6875), "ties": merged(0.3125, 0.375)},
        gain={
            "task_arithmetic": Estimate(value=0.0625, n=200, low=0.01, high=0.11),
            "ties": Estimate(value=-0.03125, n=200, low=-0.08, high=0.02),
        },
        joint=None,
        steps=160,
        stopped_at={"law": 96, "code": None},
        pick_steps={"task_arithmetic": {"law": 64, "code": 160}, "ties": {"law": 32, "code": 8}},
        seconds=60.0,
    )
    return replace(results, **changes)


def printed(results: DemoResults) -> str:
    stream = io.StringIO()
    Console(file=stream, width=140).print(results_table(results))
    return stream.getvalue()


def gives_the_cursor_back(text: str) -> bool:
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    return text.rfind(shown) > text.rfind(hidden) > -1


def row(text: str, name: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


class TestTable:
    def test_every_number_is_in_its_place(self) -> None:
        text = printed(make_results())
        half = " ±0.050"
        law = [f"{value}{half}" for value in ("0.125", "0.750", "0.500", "0.562", "0.375", "0.312")]
        assert row(text, "law") == law
        assert row(text, "mean") == ["0.188", "0.812", "0.562", "0.625", "0.375", "0.344"]

    def test_columns_are_named(self) -> None:
        text = printed(make_results())
        for name in ("Test accuracy", "from ends", "from picks", "at end", *METHODS):
            assert name in text
        assert "joint" not in text

    def test_nothing_is_cut_off_on_a_narrow_terminal(self) -> None:
        stream = io.StringIO()
        Console(file=stream, width=80).print(results_table(make_results(), 80))
        assert "…" not in stream.getvalue()
        rows = [line for line in stream.getvalue().splitlines() if line.startswith(("┃", "│"))]
        assert {line.rstrip()[-1] for line in rows} == {"┃", "│"}
        assert stream.getvalue().count("arithmetic ") == 2

    def test_the_joint_model_has_a_column_of_its_own(self) -> None:
        text = printed(make_results(joint={"law": estimate(0.6875), "code": estimate(0.75, None)}))
        assert row(text, "law")[-1] == "0.688 ±0.050"
        assert row(text, "code")[-1] == "0.750"
        assert row(text, "mean")[-1] == "0.719"

    def test_the_caption_tells_stops_and_picks_of_the_leading_method(self) -> None:
        text = " ".join(printed(make_results()).split())
        assert "law stopped at 96 of 160, pick 64; code not stopped in 160 steps, pick 160" in text


class TestVerdict:
    def say(self, value: float, low: float | None, high: float | None, **changes: object) -> str:
        gain = {"ties": Estimate(value=value, low=low, high=high)}
        [line] = verdict(make_results(gain=gain, **changes))
        return line

    def test_better(self) -> None:
        line = self.say(0.04, 0.01, 0.07)
        assert line == "ties: ends 0.375, picks 0.344, +0.040 [+0.010, +0.070]: merging the picks was better."

    def test_worse(self) -> None:
        line = self.say(-0.04, -0.07, -0.01)
        assert line.endswith(
            "-0.040 [-0.070, -0.010]: merging the fully trained ends was better: train longer."
        )

    @pytest.mark.parametrize(("low", "high"), [(-0.01, 0.09), (-0.09, 0.01), (0.0, 0.08), (-0.08, 0.0)])
    def test_neither_when_zero_is_inside(self, low: float, high: float) -> None:
        assert self.say((low + high) / 2, low, high).endswith("no difference that these test sets can show.")

    def test_without_an_interval_nothing_is_claimed(self) -> None:
        line = self.say(0.5, None, None)
        assert line == "ties: ends 0.375, picks 0.344, +0.500: no difference that these test sets can show."

    @pytest.mark.parametrize("place", ["ends", "picks"])
    def test_a_scale_at_its_edge_is_said(self, place: str) -> None:
        scores = {"ties": merged(0.375, 0.375, inside=False)}
        assert self.say(0.04, 0.01, 0.07, **{place: scores | {"task_arithmetic": merged(0.5, 0.5)}}).endswith(
            "merging the picks was better; a scale is at its edge."
        )

    def test_one_sentence_a_method(self) -> None:
        assert [line.split(":")[0] for line in verdict(make_results())] == list(METHODS)


def tell(display: LiveDisplay) -> None:
    """A whole run's events."""
    with display:
        for name, peers in (("law", []), ("code", ["law"])):
            task = tiny_task(name, 0)
            display.expert_started(task, 2, peers)
            for step in (1, 2):
                display.stepped(task, step)
                display.probed(task, probe(step, 0.5, surrogate=not peers, task_arithmetic=0.25, ties=0.125))
            display.stopped(task, 2, "merged metric: nothing [new] for 3 probes")
            display.expert_finished(task)
        display.working_on("merging")


def test_elsewhere_than_on_a_terminal_a_probe_is_a_line() -> None:
    stream = io.StringIO()
    tell(LiveDisplay(Console(file=stream, width=120), "task_arithmetic"))
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("  step")] == [
        "  step    1  expert 0.500  surrogate 0.250",
        "  step    2  expert 0.500  surrogate 0.250",
        "  step    1  expert 0.500  merged 0.250",
        "  step    2  expert 0.500  merged 0.250",
    ]
    assert "law: Task law (no peers yet: probes use surrogates)" in lines
    assert "code: Task code (peers: law)" in lines
    assert lines[-1] == "merging …"
    assert sum("stopped at step 2" in line for line in lines) == 2
    assert "\x1b" not in stream.getvalue()


def test_brackets_in_a_reason_are_shown() -> None:
    stream = io.StringIO()
    tell(LiveDisplay(Console(file=stream, width=120), "task_arithmetic"))
    assert "nothing [new] for 3 probes" in stream.getvalue()


def test_the_method_that_was_chosen_is_shown() -> None:
    stream = io.StringIO()
    tell(LiveDisplay(Console(file=stream, width=120), "ties"))
    assert "merged 0.125" in stream.getvalue()
    assert "0.250" not in stream.getvalue()


def test_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    tell(LiveDisplay(console, "task_arithmetic"))
    text = stream.getvalue()
    assert "\x1b[" in text
    for words in ("law", "code", "expert 0.500  surrogate 0.250", "expert 0.500  merged 0.250", "2/2"):
        assert words in text
    assert gives_the_cursor_back(text)


def test_on_a_terminal_an_error_gives_the_terminal_back() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)

    class Broken(Exception):
        pass

    with pytest.raises(Broken), LiveDisplay(console, "ties"):
        raise Broken
    assert gives_the_cursor_back(stream.getvalue())
