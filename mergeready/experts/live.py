from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from torch import Tensor, nn

from mergeready.errors import OptionError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.kinship import require_frozen_equal, require_kinship
from mergeready.experts.open import pair_with_base
from mergeready.experts.peft_config import PeftConfig
from mergeready.experts.peft_lora import PeftTaskVector
from mergeready.experts.task_vector import FullTaskVector, TaskVector
from mergeready.weights.live import Finer, LiveSource
from mergeready.weights.module import ModuleSource, module_parameters, plain_name, unwrap
from mergeready.weights.open import WeightsLike
from mergeready.weights.ranks import Ranks
from mergeready.weights.shards import Held, held, require_readable, reshard
from mergeready.weights.shares import Shares


class LiveExpert:
    """A model in training seen as an expert: its task vector of this moment, and where merged weights go.

    Of a model that is sharded by FSDP2 or tensor parallelism, a rank reads and writes what it holds. All ranks make
    one together then.

    Args:
        model: The model, plain or with one PEFT LoRA adapter; wrappers such as DDP are looked through.
        base: The base. May be None for a PEFT model whose only trained parameters belong to the adapter: the
            frozen weights inside the model are the base then.
        ranks: The processes that take part; by default all where the model is sharded, else this one alone.

    Attributes:
        model: The unwrapped model.
        ranks: The processes that take part.
        base: The base, opened.
        vector: The live task vector; reading it reads the model.
        targets: Base name to the live tensor that holds that weight when no adapter acts.
        blocks: Base name to what this rank holds of that tensor.
        is_sharded: Whether some rank holds a part of some tensor only.
        extra: Parameters that the base does not have, such as the task's head.
        missing: Base parameters that the model does not have; they count as unchanged.
        base_is_live: Whether the base's values are read from the model itself.

    Raises:
        OptionError: If a base is needed and None was given.
        BaseMismatchError: If the model does not descend from the base.
        MismatchError: If shapes differ.
        UnsupportedError: If the model's adapters cannot be seen as one change of the weights, or its parameters are
            kept where they cannot be read (FSDP1, ZeRO-3).
    """

    def __init__(self, model: nn.Module, base: WeightsLike | Base | None, ranks: Ranks | None = None) -> None:
        require_readable(model)
        self.model = unwrap(model)
        reshard(self.model)
        self._adapter: LiveSource | None = None
        self._frozen: set[str] = set()
        self.is_peft = is_peft(self.model)
        self.base_is_live = base is None
        if self.is_peft:
            self._bind_peft(base)
        else:
            self._bind_full(base)
        self.blocks: Mapping[str, Held] = {name: held(target) for name, target in self.targets.items()}
        self.ranks = ranks or (Ranks.world() if self.is_sharded else Ranks.alone())
        self._shares = Shares(self.vector.infos, self.blocks, self.ranks)

    def _bind_full(self, base: WeightsLike | Base | None) -> None:
        if base is None:
            raise OptionError("a model that is trained whole needs `base`: the weights it started from.")
        self.base = Base.open(base)
        source = ModuleSource(self.model)
        parameters = module_parameters(self.model)
        _require_real(parameters)
        with source.gathering():
            names, self.extra, self.missing = pair_with_base(source, self.base, strict=False)
            require_kinship(source, self.base.source, names)
            self.targets: Mapping[str, Tensor] = {
                b: parameters[own] for b, own in names.items() if own in parameters
            }
            frozen = {b: names[b] for b, target in self.targets.items() if not target.requires_grad}
            require_frozen_equal(source, self.base.source, frozen)
        self.is_sharded = source.is_sharded
        self._own: LiveSource = source
        self._names, self._frozen = names, set(frozen)
        self._compare_trained()

    def _compare_trained(self) -> None:
        self._own_names = {b: self._names[b] for b in self.targets if b not in self._frozen}
        self.vector: TaskVector = FullTaskVector(
            self._own, self.base.source, self._own_names, self.base.identity, "this run"
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
        own = LiveSource(inner, f"live {type(model).__name__}")
        with own.gathering():
            if base is None:
                _require_adapter_only(model, inner)
                own.label = "the frozen weights of the model"
                self.base = Base.open(own)
            else:
                self.base = Base.open(base)
            names, self.extra, self.missing = pair_with_base(own, self.base, strict=False)
            if base is not None:
                frozen = {b: name for b, name in names.items() if not inner[name].requires_grad}
                require_frozen_equal(own, self.base.source, frozen)
        self.targets = {base_name: inner[own] for base_name, own in names.items()}
        state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        self._adapter = LiveSource(state, "adapter")
        config = PeftConfig(model.peft_config[name].to_dict(), "the adapter in training")
        vector = PeftTaskVector(self._adapter, config, self.base, "this run")
        self.vector, self.extra = vector, self.extra + vector.extra
        self.is_sharded = own.is_sharded or self._adapter.is_sharded
        self._own, self._own_names = own, names if base is None else {}

    def follow(self) -> bool:
        """Let parameters that were frozen and train by now, as in gradual unfreezing, join the task vector for good.

        Returns:
            Whether there were any; a collective of all ranks then.
        """
        thawed = {name for name in self._frozen if self.targets[name].requires_grad}
        if thawed:
            self._frozen -= thawed
            self._compare_trained()
            self._shares = Shares(self.vector.infos, self.blocks, self.ranks)
        return bool(thawed)

    def refine(self, find: Callable[[str, Tensor], Finer | None]) -> None:
        """Read finer copies of the trained parameters in their place from now on; see ``LiveSource.refine``."""
        for source in [self._own, *([] if self._adapter is None else [self._adapter])]:
            source.refine(find, self.ranks)

    @contextmanager
    def base_readable(self) -> Iterator[None]:
        """Inside, the whole base can be read, for checks of other experts that all ranks make alike."""
        with self._own.gathering() if self.base_is_live else nullcontext():
            yield

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Inside, this rank can read the task vector where it holds the parameter.

        The factors of an adapter are gathered for that: a few rows of their product need all of one of them. A
        collective of all ranks where the model is sharded.
        """
        adapter = self._adapter
        with nullcontext() if adapter is None else adapter.gathered(adapter.infos):
            yield

    @contextmanager
    def gathered(self, name: str) -> Iterator[None]:
        """Inside, and inside ``readable``, every rank can read one parameter's whole delta.

        A collective of all ranks where the model is sharded.
        """
        with self._own.gathered([self._own_names[name]] if name in self._own_names else []):
            yield

    def pick(self, name: str, places: Tensor) -> Tensor:
        """Single elements of a parameter that is trained itself: of what this rank holds of it, by base name, fp32."""
        return self._own.pick(self._own_names[name], places)

    def pieces(self) -> Iterator[tuple[str, int, int]]:
        """What this rank has to measure: base name, first element and end of each piece; use inside ``readable``."""
        for name in self.vector:
            in_one_range = name not in self.blocks or self.blocks[name].span is not None
            with nullcontext() if in_one_range else self.gathered(name):
                yield from ((name, start, stop) for start, stop in self._shares.of(name))

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
    # Any class of its ancestry, as `fully_shard` gives a model a class of its own.
    if any(ancestor.__module__.startswith("peft.") for ancestor in type(model).__mro__):
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


def _require_real(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if complex weights train: they would be left out of measurements, and left as they are by merges."""
    strange = [
        name for name, parameter in parameters.items() if parameter.is_complex() and parameter.requires_grad
    ]
    if strange:
        raise UnsupportedError(
            f"complex weights are trained: {listing(strange, 4)}. Only real ones are measured and merged: make them "
            "pairs of real numbers (torch.view_as_real)."
        )


def _require_adapter_only(model: Any, inner: Mapping[str, Tensor]) -> None:
    trained = [name for name, parameter in inner.items() if parameter.requires_grad]
    if trained:
        raise OptionError(
            f"the run also trains parameters of the base ({listing(trained, 4)}), so the base cannot be read from "
            "the model; pass `base`."
        )
