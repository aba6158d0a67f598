from __future__ import annotations

import inspect

import pytest

from mergeready.demo.display import LiveDisplay
from mergeready.demo.events import Listener, Silent
from tests.demo.tiny import tiny_task
from tests.training.histories import probe

EVENTS = [name for name in vars(Listener) if not name.startswith("_")]


@pytest.mark.parametrize("listener", [Silent, LiveDisplay])
@pytest.mark.parametrize("event", EVENTS)
def test_listeners_take_every_event(listener: type, event: str) -> None:
    """A listener with other parameters would fail in the middle of a demo."""
    assert inspect.signature(getattr(listener, event)) == inspect.signature(getattr(Listener, event))


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    task, silent = tiny_task("a", 0), Silent()
    silent.expert_started(task, 3, [])
    silent.stepped(task, 1)
    silent.probed(task, probe(1, 0.5, ties=0.5))
    silent.stopped(task, 1, "enough")
    silent.expert_finished(task)
    silent.working_on("something")
    assert capsys.readouterr() == ("", "")
