from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeready.errors import OptionError
from mergeready.recipes import json_schema, parse_recipe, read_recipe
from mergeready.recipes.document import parse_document
from mergeready.recipes.recipe import member_recipe, recipe_content

jsonschema = pytest.importorskip("jsonschema", reason="the dev extra brings it")

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))

GOOD = """\
model: org/base
data: org/reviews
task: {kind: text-classification}
optimisation:
  learning_rate: 2e-5
  steps: 500
output: runs/reviews
"""


def broken(text: str) -> list[str]:
    document = parse_document(text, "run.yaml")
    with pytest.raises(OptionError) as caught:
        parse_recipe(document.content, document)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        (
            "  steps: 500",
            "  stepz: 500",
            6,
            "`optimisation.stepz` is no setting. Did you mean `optimisation.steps`?",
        ),
        ("  steps: 500", "  steps: many", 6, "`optimisation.steps`.*'many'"),
        ("  steps: 500", "  steps: 0", 6, "greater than or equal to 1"),
        ("  steps: 500", "  epochs: 2\n  steps: 500", 4, "give `steps` or `epochs`; both are given"),
        ("  steps: 500\n", "", 4, "neither is given"),
        ("data: org/reviews", "learning_rate: 3", 2, "Did you mean `optimisation.learning_rate`?"),
        ("org/reviews", "{name: a, limit: {tain: 3}}", 2, "train"),
        ("org/reviews", "{name: a, files: {train: a.csv}}", None, "one of `name`, `files` and `join`"),
        ("text-classification", "text-clasification", 3, "`task.kind` must be one of.*text-classification"),
        ("{kind: text-classification}", "{text: a}", 3, "`task.kind` is missing"),
        (
            "{kind: text-classification}",
            "{kind: causal-lm, text_column: a}",
            3,
            "`task.text_column` is no setting",
        ),
        ("output: runs/reviews\n", "", None, "`output` is missing"),
        ("output:", "mergeready: {probe: {merge: [tiess]}}\noutput:", 7, "no merge method 'tiess'"),
        (
            "output:",
            "mergeready: {probe: {schedule: {evry: 3}}}\noutput:",
            7,
            "`mergeready.probe.schedule.every`",
        ),
        ("output:", "mergeready: {stop: {merged_plateau: {patience: 0}}}\noutput:", 7, "at least 1, not 0"),
        ("output:", "team: {members: {a: {}}}\noutput:", 7, "team.members"),
        (
            "org/reviews",
            "{join: {a: {name: org/a}}, limit: {train: 3}, holdout: 0.2}",
            2,
            "limit, holdout would do",
        ),
        (
            "org/reviews",
            "{join: {a: {name: org/a}, b: {subset: x}}}",
            2,
            "`name` and `files` for each.*unlike b",
        ),
        (
            "model: org/base",
            "model: {name: org/base, with: {num_labels: 3}}",
            1,
            "`with` holds.*org/base is none",
        ),
        (
            "output:",
            "evaluation: {name: accuracy, with: {top: 5}}\noutput:",
            7,
            "`with` holds.*accuracy is none",
        ),
        (
            "{kind: text-classification}",
            "{kind: image-classification, prompt: a photo}",
            3,
            "`task.prompt`: write {} once",
        ),
    ],
)
def test_errors_name_line_key_and_fix(old: str, new: str, line: int | None, words: str) -> None:
    assert old in GOOD
    lines = broken(GOOD.replace(old, new, 1))
    place = "run.yaml: " if line is None else f"run.yaml, line {line}: "
    found = [text for text in lines if text.startswith(place) and re.search(words, text)]
    assert found, lines


def test_all_errors_are_told_at_once_and_each_once() -> None:
    text = GOOD.replace("2e-5", "fast").replace("steps: 500", "steps: many").replace("output", "outputs")
    lines = broken(text)
    assert len(lines) == 4  # two values, an unknown key, and the key that is missing then
    assert len(set(lines)) == 4


def test_errors_inside_a_member_name_it_and_its_line() -> None:
    text = GOOD + "team:\n  members:\n    a: {}\n    b:\n      optimisation:\n        stepz: 3\n"
    [line] = broken(text)
    assert line.startswith("run.yaml, team member b, line 13: `optimisation.stepz`")


def test_members_are_the_recipe_with_what_they_change() -> None:
    text = GOOD + "team:\n  members:\n    a: {data: {name: org/a}}\n    b: {optimisation: {seed: 3}}\n"
    recipe = parse_recipe(parse_document(text).content)
    a, b = (member_recipe(recipe, name) for name in "ab")
    assert (a.data.name, a.optimisation.seed, a.output, a.team) == ("org/a", 0, "runs/reviews/a", None)
    assert (b.data.name, b.optimisation.seed, b.optimisation.steps) == ("org/reviews", 3, 500)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
@pytest.mark.parametrize("quick", [False, True])
def test_shipped_recipes_are_valid_and_survive_a_round_trip(path: Path, quick: bool) -> None:
    recipe = read_recipe(path, quick=quick)
    assert parse_recipe(recipe_content(recipe)) == recipe
    assert (path.parent / "README.md").is_file()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_flat_start_ends_no_shipped_recipe(path: Path) -> None:
    """Learning rates rise, and metrics of few examples stand still at first: a quarter of the run is trained anyway."""
    recipe = read_recipe(path)
    policy, probe = recipe.mergeready.stop.merged_plateau, recipe.mergeready.probe
    if policy is None or not probe:
        return
    steps = recipe.optimisation.steps
    assert steps is not None
    probes = [step for step in range(1, steps + 1) if probe.schedule.has(step, steps)]
    assert next(s for s in probes[policy.patience :] if s >= policy.min_step) >= steps / 4


def test_the_schema_is_one_and_accepts_all_shipped_recipes() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert len(SHIPPED) >= 10
    for path in SHIPPED:
        # YAML 1.1 reads 3e-4 as a text, which is why recipes have a reader of their own.
        content = parse_document(path.read_text(encoding="utf-8")).content
        assert not [error.message for error in validator.iter_errors(content)], path
    wrong: dict[str, Any] = yaml.safe_load(GOOD) | {"outputs": "x"}
    assert [error.validator for error in validator.iter_errors(wrong)][:1] == ["additionalProperties"]


def test_every_setting_is_explained_in_the_schema() -> None:
    schema = json_schema()
    for name in ("OptimisationSettings", "LoraSettings", "DataSettings", "TeamSettings"):
        for key, about in schema["$defs"][name]["properties"].items():
            assert about.get("description"), f"{name}.{key}"


def test_changes_count_more_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    recipe = read_recipe(path, ["optimisation.steps=7", "mergeready.peers=[a, b]", "task.lora.rank=4"])
    assert recipe.optimisation.steps == 7
    assert recipe.mergeready.peers == ["a", "b"]
    assert recipe.task.lora is not None
    assert recipe.task.lora.rank == 4
    with pytest.raises(OptionError, match=r"`optimisation.steps`.*'soon'"):
        read_recipe(path, ["optimisation.steps=soon"])
