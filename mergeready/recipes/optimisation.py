"""How a recipe trains."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from mergeready.recipes.sources import STRICT


class OptimisationSettings(BaseModel):
    """How long, how fast, and on what."""

    model_config = STRICT

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal[
        "constant", "linear", "cosine", "polynomial", "inverse_sqrt", "constant_with_warmup"
    ] = "cosine"
    """How the learning rate falls."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which it rises at first."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give this or ``epochs``."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training examples. Give this or ``steps``."""
    batch_size: int = Field(default=16, ge=1)
    """Examples a device and forward pass."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes an optimizer step."""
    optimizer: str = "adamw_torch"
    """Its name, as transformers knows it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the weights towards zero, which also moves what the task does not need."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient; 0 for no limit."""
    freeze: list[str] = Field(default_factory=list)
    """Regular expressions: parameters whose name they find are not trained."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of examples, of dropout, and of new weights."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of forward and backward passes (mixed precision below float32)."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to train."""
    sharding: Literal["none", "fsdp2"] = "none"
    """``fsdp2``: parameters, gradients and optimizer states are spread over the processes that torchrun starts."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, from which an interrupted run goes on; a tenth of the run by default."""
    log_every: int = Field(default=10, ge=1)
    """Steps between entries of the log."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = "neither is given" if self.steps is None else "both are given"
            raise ValueError(f"give `steps` or `epochs`; {given}")
        return self
