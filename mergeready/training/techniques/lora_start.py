from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mergeready.errors import OptionError
from mergeready.training.lora_start import InputsLike, freeze_lora_a, share_lora_a, start_orthogonal
from mergeready.training.techniques.registry import register
from mergeready.training.techniques.run import TechniqueRun
from mergeready.training.techniques.technique import Running, Technique, Touch
from mergeready.training.techniques.train_only import require_not_wrapped


@register
@dataclass(frozen=True, kw_only=True)
class SharedLoraA(Technique):
    """Every team's adapter has one A, frozen, so that merging factors is merging changes.

    See :func:`mergeready.training.lora_start.share_lora_a`; call that before the model is wrapped under DDP.

    Attributes:
        seed: What teams agree on.
        base: The base, where teams train different model classes: it gives parameters their names.

    Example:
        >>> SharedLoraA(seed=7).seed
        7
    """

    name: ClassVar[str] = "shared_lora_a"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.INITIALISATION, Touch.TRAINABLE})

    seed: int = 0
    base: str | None = None

    def prepare(self, model: nn.Module, *, step: int) -> None:
        require_not_wrapped(model, self.name, "mergeready.share_lora_a(model, …)")
        if step:
            freeze_lora_a(model, base=self.base)
        else:
            share_lora_a(model, base=self.base, seed=self.seed)

    def begin(self, run: TechniqueRun) -> Running:
        return Running()


@register
@dataclass(frozen=True, kw_only=True)
class OrthogonalStart(Technique):
    """Begin a LoRA adapter blind to peers' inputs (OSRM).

    See :func:`mergeready.training.lora_start.start_orthogonal`.

    Attributes:
        inputs: What is known of each peer's inputs: files of Kronecker factors or of input Gram matrices, or objects.
        freeze: Whether A stays as it begins.
        base: The base, which gives parameters their names, where the model's own differ.

    Example:
        >>> OrthogonalStart(inputs=["law.factors.safetensors"]).freeze
        False
    """

    name: ClassVar[str] = "orthogonal_start"
    touches: ClassVar[frozenset[Touch]] = frozenset({Touch.INITIALISATION, Touch.TRAINABLE})

    inputs: Sequence[InputsLike]
    freeze: bool = False
    base: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str) or not self.inputs:
            raise OptionError(
                "`inputs` must be a list with what is known of each peer's inputs, one peer at least."
            )

    def prepare(self, model: nn.Module, *, step: int) -> None:
        if self.freeze:
            require_not_wrapped(model, self.name, "mergeready.start_orthogonal(model, …)")
        if not step:
            start_orthogonal(model, self.inputs, base=self.base, freeze=self.freeze)
        elif self.freeze:
            freeze_lora_a(model, base=self.base)

    def begin(self, run: TechniqueRun) -> Running:
        return Running()
