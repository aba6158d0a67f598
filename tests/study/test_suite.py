from __future__ import annotations

from dataclasses import replace

import pytest

from mergeready.errors import OptionError
from mergeready.study.settings import SuiteSettings
from mergeready.study.suite import choose_tasks, open_suite
from tests.study import toy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "no_such_module:suite"}, "`suite.target` names no_such_module:suite, but No module"),
        ({"target": "tests.study.toy:nothing"}, "has no nothing"),
        (
            {"target": "tests.study.toy:suite", "arguments": {"size": 1}},
            "called with seed, size, but .*'size'",
        ),
        ({"target": "builtins:dict"}, "must return a StudySuite, not a dict"),
    ],
)
def test_targets_that_do_not_serve_are_explained(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        open_suite(SuiteSettings.model_validate(settings), 0)


def test_tasks_come_in_the_order_of_the_study() -> None:
    suite = toy.suite(0)
    assert list(choose_tasks(suite, ["blue", "red"])) == ["blue", "red"]
    assert list(choose_tasks(suite, None)) == list(toy.TASKS)
    with pytest.raises(OptionError, match="names pink; the suite has red, green, blue"):
        choose_tasks(suite, ["red", "pink"])
    with pytest.raises(OptionError, match="at least two tasks"):
        choose_tasks(suite, ["red"])
    tasks = {name: replace(task, train=[]) if name == "red" else task for name, task in suite.tasks.items()}
    with pytest.raises(OptionError, match="no training examples for red"):
        choose_tasks(replace(suite, tasks=tasks), None)
