"""A recipe: everything that a training run needs, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergeready.errors import OptionError
from mergeready.recipes.document import Document, read_document
from mergeready.recipes.optimisation import OptimisationSettings
from mergeready.recipes.override import overridden, parse_overrides
from mergeready.recipes.problems import problems
from mergeready.recipes.quick import made_quick
from mergeready.recipes.sources import STRICT, Data, Evaluation, Model
from mergeready.recipes.tasks import Task
from mergeready.recipes.team_settings import TeamSettings
from mergeready.training.settings import RunSettings


class Recipe(BaseModel):
    """Everything that a training run needs: model, data, task, optimisation, what to watch, where to write.

    Example:
        >>> recipe = parse_recipe({
        ...     "model": "org/base", "data": "org/reviews", "task": {"kind": "text-classification"},
        ...     "optimisation": {"learning_rate": 2e-5, "steps": 500}, "output": "runs/reviews",
        ... })
        >>> recipe.model.name, recipe.optimisation.schedule
        ('org/base', 'cosine')
    """

    model_config = ConfigDict(**{**STRICT, "title": "mergeready recipe"})

    model: Model
    """The model that training starts from: a hub id, a folder, or ``module:function``."""
    data: Data
    """Examples: a hub id, a folder, files by split, or ``module:function``."""
    task: Task
    """What is learned, and by which weights."""
    optimisation: OptimisationSettings
    """How long, how fast, and on what."""
    mergeready: RunSettings = RunSettings()
    """What the callback is told: peers, probe, stop, picks."""
    evaluation: Evaluation | None = None
    """What probes and the final result measure: accuracy for classes and loss for language models by default."""
    team: TeamSettings | None = None
    """Several experts that are meant to be merged, in place of one."""
    output: str
    """The run's folder. The same command goes on with what it finds there."""
    quick: dict[str, Any] = Field(default_factory=dict)
    """What ``--quick`` changes, beside making everything small."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.join is not None and self.team is not None:
            raise ValueError(
                "`data.join` trains one model on all tasks and `team` one a task: give one of them"
            )
        if self.data.join is not None and self.task.kind == "causal-lm":
            raise ValueError(
                "`data.join` joins tasks with classes; give a language model one dataset of all texts"
            )
        given = [self.data.name, self.data.files, self.data.join]
        if self.team is None and sum(value is not None for value in given) != 1:
            raise ValueError("`data` takes one of `name`, `files` and `join`")
        return self


def read_recipe(path: str | Path, changes: Iterable[str] = (), *, quick: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.
        changes: ``key=value`` texts; they count more than the file.
        quick: Make it a smoke run: everything happens, nothing is learned.

    Raises:
        FormatError: If the file is not YAML.
        OptionError: If a setting is unknown, missing or out of range; all of them are listed, each with its line.
    """
    document = read_document(path)
    content = document.content
    if quick:
        content = made_quick(content)
    content = overridden(content, parse_overrides(changes))
    return parse_recipe(content, Document(content, document.lines, document.label))


def parse_recipe(content: Mapping[str, Any], document: Document | None = None) -> Recipe:
    """Check settings that were read already.

    Raises:
        OptionError: As :func:`read_recipe`.
    """
    document = document or Document(dict(content))
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        found = problems(error, document, json_schema())
        raise OptionError("\n".join(found)) from error
    for name in recipe.team.members if recipe.team else ():
        member_recipe(recipe, name, content, document)
    return recipe


def member_recipe(
    recipe: Recipe, name: str, content: Mapping[str, Any] | None = None, document: Document | None = None
) -> Recipe:
    """The recipe of one member of a team, which writes below the team's folder.

    Raises:
        OptionError: If what the member changes is not understood.
    """
    if recipe.team is None:
        raise OptionError("the recipe has no `team`.")
    document = document or Document({})
    whole = dict(content if content is not None else recipe_content(recipe))
    members = whole.pop("team")["members"]
    changed = overridden(whole, members[name] or {})
    changed["output"] = str(Path(recipe.output) / name)
    lines = {key: line for key, line in document.lines.items() if key[:1] != ("team",)}
    prefix = ("team", "members", name)
    lines |= {key[3:]: line for key, line in document.lines.items() if key[:3] == prefix and len(key) > 3}
    return parse_recipe(changed, Document(changed, lines, f"{document.label}, team member {name}"))


def recipe_content(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, without what it leaves at its default."""
    content: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)
    return content


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors that complete and check YAML."""
    schema: dict[str, Any] = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
