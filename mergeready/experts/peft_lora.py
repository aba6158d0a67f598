from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from mergeready.errors import FormatError, listing
from mergeready.experts.adapter import AdapterBuilder, AdapterTaskVector, Slot, SlotKind, require_pairs
from mergeready.experts.base import Base
from mergeready.experts.orientation import is_swapped, orientations
from mergeready.experts.parts import BiasPart, DoraPart, ExpertsPart, LowRankPart, Part, RowsPart
from mergeready.experts.peft_config import PeftConfig
from mergeready.weights.source import TensorInfo, WeightSource, equal

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS_BASE = ".token_adapter.base_layer."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "B_bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "token_rows",
}


class PeftTaskVector(AdapterTaskVector):
    """The task vector of a PEFT LoRA adapter: effective deltas under base parameter names.

    Reads plain LoRA, rsLoRA, per-module ranks and alphas, ``lora_bias``, trained base biases, DoRA, LoRA on
    embeddings, Conv1D, convolutions and stacks of experts, ``modules_to_save`` and trained token rows. The adapter may
    be a file or the adapter of a live model; a live one is read anew at each access.

    Args:
        source: The adapter's tensors under PEFT's file names.
        config: Its configuration.
        base: The base it belongs to.
        label: How messages call it.

    Raises:
        FormatError: If tensors are unknown or do not pair up; all are listed.
        MismatchError: If targets are missing in the base or have another shape; all are listed.
        UnsupportedError: If it changes one place of a parameter that the base uses in two.
    """

    def __init__(self, source: WeightSource, config: PeftConfig, base: Base, label: str) -> None:
        modules, copies = _sort_tensors(source, label)
        builder = _PeftBuilder(source, base, label)
        builder.config = config
        leaves = ("weight", "bias", *config.parameter_leaves)
        builder.match([*(f"{_plain(module)}.{leaf}" for module in modules for leaf in leaves), *copies])
        if not config.scores_tokens:
            builder.tied = (
                frozenset()
            )  # where the base has a head that shares its embeddings, the adapted model has not
        for module, keys in modules.items():
            builder.add_module(module, keys)
        for name, key in copies.items():
            builder.add_stored(name, key)
        builder.notes += config.notes
        super().__init__(builder)


def plain_name(key: str) -> str:
    """A parameter's name without what PEFT puts around it.

    >>> plain_name("base_model.model.model.embed_tokens.base_layer.weight")
    'model.embed_tokens.weight'
    """
    return key.removeprefix(_PREFIX).replace(_ROWS_BASE, ".").replace(".base_layer.", ".")


def _sort_tensors(source: WeightSource, label: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Group tensor names: factors by module and role, and whole copies by parameter name."""
    modules: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    unknown = []
    for key in source.infos:
        name = key.removeprefix(_PREFIX)
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if name == key:
            unknown.append(key)
        elif suffix is not None:
            modules.setdefault(name.removesuffix(suffix), {})[_SUFFIXES[suffix]] = key
        elif "lora_" in name:
            unknown.append(key)
        elif (counted := _counts_as(key, source)) is not None:
            copies[plain_name(counted)] = key
    if unknown:
        raise FormatError(f"{label} holds tensors that PEFT's LoRA format does not have: {listing(unknown)}.")
    require_pairs(modules, (("A", "B"), ("embedding_A", "embedding_B")), label, source.infos)
    if not modules and not copies:
        raise FormatError(f"{label} holds no tensors.")
    return modules, copies


def _counts_as(key: str, source: WeightSource) -> str | None:
    """The name under which a tensor counts; None where PEFT wrote it beside the one that does.

    With ``bias="all"`` or stored embeddings it also writes what lies inside of modules that it trains whole: their
    frozen original, and the trained copy once more.
    """
    if ".original_module." in key:
        return None
    module, inside, rest = key.partition(".modules_to_save.")
    if not inside:
        return key
    for plain in (f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"):
        if plain in source.infos:
            return None
        if plain in source.aliases:  # in a live model the two are one tensor, listed under either name
            return plain
    return key


class _PeftBuilder(AdapterBuilder):
    config: PeftConfig

    def add_stored(self, name: str, key: str) -> None:
        """Add what is stored whole, unless PEFT stored a frozen weight that is the base's, which is no change."""
        frozen = ".base_layer." in key or not self.config.trains_whole(name.rpartition(".")[0])
        if frozen and key.endswith(".weight") and self._is_the_base_s(name, key):
            return
        if _ROWS_BASE in key:
            self.problems.append(f"the embeddings below the trained rows of {name} are not the base's")
            return
        self.add_copy(name, key)

    def _is_the_base_s(self, name: str, key: str) -> bool:
        """Whether a stored weight is the base's; a head that the base lacks may be its embeddings once more."""
        base_name = self.names.get(name)
        names = self.base.tied if base_name is None else (base_name,)
        return any(equal(self.source, key, self.base.source, other) for other in names)

    def add_module(self, module: str, keys: Mapping[str, str]) -> None:
        if self._is_stack(module):
            self._add_experts(module, keys)
            return
        name = self.weight_of(module)
        if name is None:
            return
        info = self.base.source.infos[name]
        if "token_rows" in keys:
            self._add_rows(module, keys["token_rows"], name, info)
        if "A" in keys or "embedding_A" in keys:
            self._add_lora(module, keys, name, info)

    def _add_lora(self, module: str, keys: Mapping[str, str], name: str, info: TensorInfo) -> None:
        embedding = "embedding_A" in keys
        A_key, B_key = (keys["embedding_A"], keys["embedding_B"]) if embedding else (keys["A"], keys["B"])
        A_shape, B_shape = self.source.infos[A_key].shape, self.source.infos[B_key].shape
        transposed = self._is_transposed(name, B_shape[:1] + A_shape[1:], info)
        kind: SlotKind = "embedding" if embedding else "transposed" if transposed else "linear"
        if self.factors(module, A_shape, B_shape, info, kind):
            scaling = self.config.scaling(module, A_shape[0])
            lora = self.low_rank(B_key, A_key, scaling, info, kind != "linear")
            part = self._with_dora(lora, keys, name, info)
            self.add(name, Slot(module, kind, dora=part is not lora), part)
            self._add_bias(module, keys, scaling)

    def _is_transposed(self, name: str, straight: tuple[int, ...], info: TensorInfo) -> bool:
        if len(info.shape) != 2:
            return False
        if straight[0] != straight[1]:
            return straight != info.shape
        # Square: the shape cannot tell. PEFT sets `fan_in_fan_out` anew for each layer and saves it as the last one had
        # it: where a Linear head is adapted as well, it does not hold for Conv1D layers.
        swapped = is_swapped(name, self._orientations)
        return self.config.fan_in_fan_out if swapped is None else swapped

    @cached_property
    def _orientations(self) -> Mapping[str, bool | None]:
        return orientations(self.base.source.infos)

    def _with_dora(self, lora: LowRankPart, keys: Mapping[str, str], name: str, info: TensorInfo) -> Part:
        if "magnitude" not in keys:
            if self.config.fields.get("use_dora"):
                self.problems.append(f"{name} has no magnitudes although `use_dora` is set")
            return lora
        key = keys["magnitude"]
        return DoraPart(lora, lambda: self.source.read(key), self.base_slice(name), info, lora.transposed)

    def _add_bias(self, module: str, keys: Mapping[str, str], scaling: float) -> None:
        if "B_bias" not in keys:
            return
        key, name = keys["B_bias"], self.names.get(f"{module}.bias")
        if name is None:
            self.problems.append(f"{module} has a LoRA bias, but no bias in the base")
            return
        self.add(name, Slot(module, "bias"), BiasPart(lambda: self.source.read(key), scaling))

    def _add_rows(self, module: str, key: str, name: str, info: TensorInfo) -> None:
        index = torch.tensor(self.config.token_rows(module), dtype=torch.long)
        if self.source.infos[key].shape != (len(index), *info.shape[1:]) or int(index.max()) >= info.rows:
            self.problems.append(f"the trained token rows of {module} do not fit its {info.shape}")
            return
        part = RowsPart(lambda: self.source.read(key), index, self.base.source, name)
        self.add(name, Slot(module, "rows"), part)

    def _is_stack(self, module: str) -> bool:
        """Whether a module's factors belong to a parameter that `target_parameters` names."""
        return bool(self.config.parameter_leaves) and f"{module}.weight" not in self.names

    def _add_experts(self, module: str, keys: Mapping[str, str]) -> None:
        """Factors of one of a module's own parameters. Which one, the file does not say: its shape does."""
        plain = _plain(module)
        A_shape, B_shape = self.source.infos[keys["A"]].shape, self.source.infos[keys["B"]].shape
        found: list[tuple[str, str, bool]] = []
        for leaf in self.config.parameter_leaves:
            name = self.names.get(f"{plain}.{leaf}")
            shape = self.base.source.infos[name].shape if name else ()
            if name and len(shape) == 3 and A_shape[0] % shape[0] == 0 and A_shape[0] == B_shape[1]:
                straight, swapped = (B_shape[0], A_shape[1]), (A_shape[1], B_shape[0])
                found += [(name, leaf, False)] if shape[1:] == straight else []
                found += [(name, leaf, True)] if shape[1:] == swapped else []
        if len(found) != 1:
            fits = "none" if not found else f"several ({', '.join(name for name, _, _ in found)})"
            self.problems.append(
                f"factors {B_shape} and {A_shape} of {module} fit {fits} of `target_parameters`{self._hint(plain)}"
            )
            return
        name, leaf, transposed = found[0]
        info = self.base.source.infos[name]
        scaling = self.config.scaling(f"{plain}.{leaf}", A_shape[0] // info.shape[0])
        A_key, B_key = keys["A"], keys["B"]
        part = ExpertsPart(
            lambda: self.source.read(B_key), lambda: self.source.read(A_key), scaling, info, transposed
        )
        self.add(name, Slot(f"{plain}.{leaf}", "experts"), part)


def _plain(module: str) -> str:
    """A module's name without the wrappers that `target_parameters` nests around it."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module
