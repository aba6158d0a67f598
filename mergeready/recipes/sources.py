"""Where a recipe's model, data and evaluation come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from mergeready.errors import listing
from mergeready.targets import is_target

STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, populate_by_name=True)

Split = Literal["train", "validation", "test"]


class ModelSettings(BaseModel):
    """The model that training starts from."""

    model_config = STRICT

    name: str
    """A hub id, a folder, or ``module:function``, whose result is a folder, a hub id or a model."""
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Arguments of the function."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights in training. Adapters of large models can have a bfloat16 base."""
    processor: str | None = None
    """Hub id or folder of the tokenizer or image processor; by default the model's own."""

    @model_validator(mode="after")
    def _only_for_functions(self) -> Self:
        _require_function(self.name, self.arguments)
        return self


class DataSettings(BaseModel):
    """Examples to train on, to choose with (validation), and to report on (test)."""

    model_config = STRICT

    name: str | None = None
    """A hub id, a folder, a file, or ``module:function``, whose result is a dataset or datasets by split."""
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Arguments of the function."""
    files: dict[Split, str | list[str]] | None = None
    """Instead of ``name``: csv, json, jsonl or parquet files by split."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a hub dataset."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """What the dataset calls its splits, where that is not train, validation and test."""
    limit: dict[Split, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Most examples of each split. Probes evaluate all validation examples, again and again."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training examples that is kept for validation if there is no such split."""
    join: dict[str, DataSettings] | None = None
    """Instead of ``name``: several tasks by name, for one model on all of them (the joint baseline)."""

    @model_validator(mode="after")
    def _joined(self) -> Self:
        if self.join is None:
            return self
        beside = [name for name in _OF_ONE_TASK if name in self.model_fields_set and getattr(self, name)]
        if beside:
            raise ValueError(
                f"beside `join`, {listing(beside)} would do nothing: say it for each task inside"
            )
        odd = [task for task, part in self.join.items() if (part.name is None) == (part.files is None)]
        if odd:
            raise ValueError(f"`join` takes one of `name` and `files` for each task, unlike {listing(odd)}")
        return self


_OF_ONE_TASK = ("subset", "revision", "splits", "limit", "holdout")


class EvaluationSettings(BaseModel):
    """What probes and the final result measure."""

    model_config = STRICT

    name: str
    """``accuracy``, ``loss``, or ``module:function``.

    The function is called with ``data`` (datasets by split), ``split`` (the split to evaluate on), ``processor`` and
    what ``with`` says, and returns an evaluation: a function of the model that returns metrics by name.
    """
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Further arguments of the function."""

    @model_validator(mode="after")
    def _only_for_functions(self) -> Self:
        _require_function(self.name, self.arguments)
        return self


def _by_name(given: Any) -> Any:
    return {"name": given} if isinstance(given, str) else given


def _require_function(name: str, arguments: dict[str, Any]) -> None:
    if arguments and not is_target(name):
        raise ValueError(f"`with` holds arguments of a function, and {name} is none")


Model = Annotated[ModelSettings, BeforeValidator(_by_name, json_schema_input_type=str | ModelSettings)]
Data = Annotated[DataSettings, BeforeValidator(_by_name, json_schema_input_type=str | DataSettings)]
Evaluation = Annotated[
    EvaluationSettings, BeforeValidator(_by_name, json_schema_input_type=str | EvaluationSettings)
]
