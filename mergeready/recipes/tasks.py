"""What a recipe teaches: kinds of tasks, and which weights learn them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator

from mergeready.recipes.sources import STRICT


class LoraSettings(BaseModel):
    """Low-rank adapters in place of full fine-tuning, by PEFT."""

    model_config = STRICT

    rank: int = Field(default=8, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=16, gt=0)
    """Changes are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: str | list[str] = "all-linear"
    """Names of the modules that get adapters, a regular expression, or ``all-linear``."""
    rslora: bool = False
    """Scale by alpha / √rank instead."""


class TextClassification(BaseModel):
    """A text to one of several classes."""

    model_config = STRICT

    kind: Literal["text-classification"]
    """A text to one of several classes."""
    text: str | Annotated[list[str], Field(min_length=1, max_length=2)] = "text"
    """Column of the text; two columns for pairs of texts."""
    label: str = "label"
    """Column of the class: a number, or a name."""
    max_tokens: int = Field(default=128, ge=1)
    """Texts are cut there."""
    lora: LoraSettings | None = None
    """Train adapters; left out, the whole model."""


class ImageClassification(BaseModel):
    """An image to one of several classes."""

    model_config = STRICT

    kind: Literal["image-classification"]
    """An image to one of several classes."""
    image: str = "image"
    """Column of the image."""
    label: str = "label"
    """Column of the class: a number, or a name."""
    head: Literal["trained", "zero-shot"] = "trained"
    """``zero-shot``: a frozen head made by CLIP's text encoder from the names of the classes. Experts then share all
    parameters, and nothing of a task is left out of a merge."""
    prompt: str = "a photo of a {}."
    """What the text encoder reads for a class."""
    class_names: list[str] | None = None
    """Names of the classes for the prompt, where the dataset has none that a reader would understand."""
    lora: LoraSettings | None = None
    """Train adapters; left out, the whole model."""

    @field_validator("prompt")
    @classmethod
    def _has_place(cls, prompt: str) -> str:
        if prompt.replace("{}", "", 1) == prompt or set("{}") & set(prompt.replace("{}", "", 1)):
            raise ValueError("write {} once, where the name of the class goes, and no other braces")
        return prompt


class CausalLM(BaseModel):
    """Supervised fine-tuning of a language model, by TRL's ``SFTTrainer``.

    The dataset has columns ``prompt`` and ``completion``, else ``messages``, else ``text``; others are left out.
    """

    model_config = STRICT

    kind: Literal["causal-lm"]
    """Supervised fine-tuning of a language model."""
    text: str = "text"
    """Column of the text, where there are no prompts, completions or messages."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longer examples are cut there."""
    packing: bool = False
    """Pack several short examples into one sequence."""
    assistant_only: bool = False
    """Learn the assistant's turns of ``messages`` only; the chat template must mark them."""
    lora: LoraSettings | None = None
    """Train adapters; left out, the whole model."""


Task = Annotated[TextClassification | ImageClassification | CausalLM, Field(discriminator="kind")]
