from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from mergeready.errors import OptionError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.kinship import require_frozen_equal, require_kinship
from mergeready.experts.open import pair_with_base
from mergeready.experts.peft_config import PeftConfig
from mergeready.experts.peft_lora import PeftTaskVector
from mergeready.experts.task_vector import FullTaskVector, TaskVector
from mergeready.weights.module import ModuleSource, module_parameters, plain_name, unwrap
from mergeready.weights.open import WeightsLike
from mergeready.weights.state_dict import StateDictSource


class LiveExpert:
    """A model in training seen as an expert: its task vector of this moment, and where merged weights go.

    Args:
        model: The model, plain or with one PEFT LoRA adapter; wrappers such as DDP are looked through.
        base: The base. May be None for a PEFT model whose only trained parameters belong to the adapter: the
            frozen weights inside the model are the base then.

    Attributes:
        model: The unwrapped model.
        base: The base, opened.
        vector: The live task vector; reading it reads the model.
        targets: Base name to the live tensor that holds that weight when no adapter acts.
        extra: Parameters that the base does not have, such as the task's head.
        missing: Base parameters that the model does not have; they count as unchanged.
        base_is_live: Whether the base's values are read from the model itself.

    Raises:
        OptionError: If a base is needed and None was given.
        BaseMismatchError: If the model does not descend from the base.
        MismatchError: If shapes differ.
        UnsupportedError: If the model's adapters cannot be seen as one change of the weights.
    """

    def __init__(self, model: nn.Module, base: WeightsLike | Base | None) -> None:
        self.model = unwrap(model)
        self.is_peft = is_peft(self.model)
        self.base_is_live = base is None
        if self.is_peft:
            self._bind_peft(base)
        else:
            self._bind_full(base)

    def _bind_full(self, base: WeightsLike | Base | None) -> None:
        if base is None:
            raise OptionError("a model that is trained whole needs `base`: the weights it started from.")
        self.base = Base.open(base)
        source = ModuleSource(self.model)
        names, self.extra, self.missing = pair_with_base(source, self.base, strict=False)
        require_kinship(source, self.base.source, names)
        parameters = module_parameters(self.model)
        self.targets: Mapping[str, Tensor] = {
            b: parameters[own] for b, own in names.items() if own in parameters
        }
        frozen = {b: names[b] for b, target in self.targets.items() if not target.requires_grad}
        require_frozen_equal(source, self.base.source, frozen)
        trained = {b: names[b] for b in self.targets if b not in frozen}
        self.vector: TaskVector = FullTaskVector(
            source, self.base.source, trained, self.base.identity, "this run"
        )

    def _bind_peft(self, base: WeightsLike | Base | None) -> None:
        import peft

        model = cast("Any", self.model)
        if len(model.active_adapters) != 1:
            raise UnsupportedError(
                f"one active adapter is needed, not {listing(map(str, model.active_adapters))}."
            )
        name = model.active_adapters[0]
        inner = _base_parameters(model)
        if base is None:
            _require_adapter_only(model, inner)
            self.base = Base.open(StateDictSource(inner, "the frozen weights of the model"))
        else:
            self.base = Base.open(base)
        own = StateDictSource(inner, f"live {type(model).__name__}")
        names, self.extra, self.missing = pair_with_base(own, self.base, strict=False)
        if base is not None:
            frozen = {b: name for b, name in names.items() if not inner[name].requires_grad}
            require_frozen_equal(own, self.base.source, frozen)
        self.targets = {base_name: inner[own] for base_name, own in names.items()}
        state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        config = PeftConfig(model.peft_config[name].to_dict(), "the adapter in training")
        vector = PeftTaskVector(StateDictSource(state, "adapter"), config, self.base, "this run")
        self.vector, self.extra = vector, self.extra + vector.extra

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Let the model compute with its base weights alone; a plain model does so anyway.

        ``requires_grad`` flags, which PEFT changes when it toggles adapters, are put back.
        """
        if not self.is_peft:
            yield
            return
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with cast("Any", self.model).disable_adapter():
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def is_peft(model: nn.Module) -> bool:
    """Whether the model is a PEFT model.

    Raises:
        UnsupportedError: If it carries adapters that were injected without PEFT's model class.
    """
    if type(model).__module__.startswith("peft."):
        return True
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            f"{type(model).__name__} carries injected adapters. Wrap the model with peft.get_peft_model instead."
        )
    return False


def _base_parameters(model: Any) -> dict[str, Tensor]:
    """The base's own parameters inside a PEFT model, under the names they had before."""
    found: dict[str, Tensor] = {}
    for full_name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        name = plain_name(full_name)
        own = ("lora_", ".modules_to_save.", "trainable_tokens_")
        if not any(mark in name for mark in own):
            for infix in (".base_layer.", ".original_module.", ".token_adapter."):
                name = name.replace(infix, ".")
            found[name] = parameter
    return found


def _require_adapter_only(model: Any, inner: Mapping[str, Tensor]) -> None:
    trained = [name for name, parameter in inner.items() if parameter.requires_grad]
    if trained:
        raise OptionError(
            f"the run also trains parameters of the base ({listing(trained, 4)}), so the base cannot be read from "
            "the model; pass `base`."
        )
