from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergeready.errors import FormatError, MismatchError, NotTrainedError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.delta import Delta
from mergeready.experts.parts import BiasPart, DoraPart, LowRankPart, Part, ReplacePart, RowsPart, SumPart
from mergeready.experts.peft_config import PeftConfig
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.names import match_names
from mergeready.weights.source import TensorInfo, WeightSource

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
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


class PeftTaskVector(TaskVector):
    """The task vector of a PEFT LoRA adapter: effective deltas under base parameter names.

    Reads plain LoRA, rsLoRA, per-module ranks and alphas, ``lora_bias``, trained base biases, DoRA, LoRA on
    embeddings, Conv1D and convolutions, ``modules_to_save`` and trained token rows. The adapter may be a file
    or the adapter of a live model; a live one is read anew at each access.

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
        self.label, self.base = label, base.identity
        modules, copies = _sort_tensors(source, label)
        builder = _Builder(source, config, base, label)
        builder.match(modules, copies)
        for module, keys in modules.items():
            builder.add_module(module, keys)
        for name, key in copies.items():
            builder.add_copy(name, key)
        if builder.problems:
            raise MismatchError(f"{label} does not fit {base.source.label}: {listing(builder.problems)}.")
        self.extra = tuple(builder.extra)
        self._parts = {
            name: parts[0] if len(parts) == 1 else SumPart(parts, base.source.infos[name].shape)
            for name, parts in builder.parts.items()
        }
        self.infos = {name: base.source.infos[name] for name in self._parts}

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        return self._parts[name].flat(start, stop)

    def __getitem__(self, name: str) -> Delta:
        return self._parts[name].delta()

    def require_trained(self) -> None:
        """Raise if every change is exactly zero: LoRA starts with B = 0, and nothing moved it.

        Raises:
            NotTrainedError: If so.
        """
        if not any(self[name].norm() > 0 for name in self):
            raise NotTrainedError(f"{self.label} changes nothing: the adapter was never trained.")


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
        else:
            copies[name.replace(".base_layer.", ".")] = key
    if unknown:
        raise FormatError(f"{label} holds tensors that PEFT's LoRA format does not have: {listing(unknown)}.")
    halves = [
        f"{module}.{role}"
        for module, keys in modules.items()
        for role, other in (
            ("A", "B"),
            ("B", "A"),
            ("embedding_A", "embedding_B"),
            ("embedding_B", "embedding_A"),
        )
        if role in keys and other not in keys
    ]
    if halves:
        raise FormatError(f"{label} holds only one of two LoRA factors: {listing(halves)}.")
    if not modules and not copies:
        raise FormatError(f"{label} holds no tensors.")
    return modules, copies


@dataclass
class _Builder:
    source: WeightSource
    config: PeftConfig
    base: Base
    label: str
    parts: dict[str, list[Part]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    names: Mapping[str, str] = field(default_factory=dict)
    tied: frozenset[str] = frozenset()
    _owners: dict[str, str] = field(default_factory=dict)

    def match(self, modules: Mapping[str, object], copies: Mapping[str, str]) -> None:
        """Find the base's own name for every parameter the adapter may touch."""
        wanted = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
        wanted += list(copies)
        base = self.base.source
        self.names = match_names(wanted, base.infos, base_aliases=base.aliases).to_base
        self.tied = self.base.tied

    def add_module(self, module: str, keys: Mapping[str, str]) -> None:
        name = self.names.get(f"{module}.weight")
        if name is None:
            self.problems.append(f"{module}.weight is not in the base")
            return
        info = self.base.source.infos[name]
        if "token_rows" in keys:
            self._add_rows(module, keys["token_rows"], name, info)
        if "A" in keys or "embedding_A" in keys:
            lora = self._low_rank(module, keys, name, info)
            if lora is not None:
                self._add(name, module, self._with_dora(lora, keys, name, info, "embedding_A" in keys))
                self._add_bias(module, keys, lora.scaling)

    def add_copy(self, name: str, key: str) -> None:
        base_name = self.names.get(name)
        if base_name is None:
            self.extra.append(name)
            return
        info, own = self.base.source.infos[base_name], self.source.infos[key]
        if own.shape != info.shape:
            self.problems.append(f"{name} is {own.shape}, in the base {info.shape}")
            return
        part = ReplacePart(self._slice(key), self._base_slice(base_name), info)
        self._add(base_name, name.rpartition(".")[0], part)

    def _low_rank(
        self, module: str, keys: Mapping[str, str], name: str, info: TensorInfo
    ) -> LowRankPart | None:
        embedding = "embedding_A" in keys
        A_key, B_key = (keys["embedding_A"], keys["embedding_B"]) if embedding else (keys["A"], keys["B"])
        A_shape, B_shape = self.source.infos[A_key].shape, self.source.infos[B_key].shape
        rank = A_shape[0]
        inputs, outputs = A_shape[1:], B_shape[:1]
        transposed = embedding or self._is_transposed(outputs + inputs, info)
        expected = inputs + outputs if transposed else outputs + inputs
        if expected != info.shape or B_shape[1] != rank or any(side != 1 for side in B_shape[2:]):
            self.problems.append(
                f"factors {B_shape} and {A_shape} of {module} do not make its {info.shape}"
                + (" (grouped convolutions are not supported)" if len(info.shape) > 2 else "")
            )
            return None
        read = self._read_matrix
        scaling = self.config.scaling(module, rank)
        return LowRankPart(lambda: read(B_key), lambda: read(A_key), scaling, info.shape, transposed)

    def _is_transposed(self, straight: tuple[int, ...], info: TensorInfo) -> bool:
        if len(info.shape) != 2:
            return False
        if straight[0] == straight[1]:  # square: the shape cannot tell, the configuration can
            return self.config.fan_in_fan_out
        return straight != info.shape

    def _with_dora(
        self, lora: LowRankPart, keys: Mapping[str, str], name: str, info: TensorInfo, embedding: bool
    ) -> Part:
        if "magnitude" not in keys:
            if self.config.fields.get("use_dora"):
                self.problems.append(f"{name} has no magnitudes although `use_dora` is set")
            return lora
        key = keys["magnitude"]
        return DoraPart(
            lora, lambda: self.source.read(key), self._base_slice(name), info, embedding or lora.transposed
        )

    def _add_bias(self, module: str, keys: Mapping[str, str], scaling: float) -> None:
        if "B_bias" not in keys:
            return
        key, name = keys["B_bias"], self.names.get(f"{module}.bias")
        if name is None:
            self.problems.append(f"{module} has a LoRA bias, but no bias in the base")
            return
        self._add(name, module, BiasPart(lambda: self.source.read(key), scaling))

    def _add_rows(self, module: str, key: str, name: str, info: TensorInfo) -> None:
        index = torch.tensor(self.config.token_rows(module), dtype=torch.long)
        if self.source.infos[key].shape != (len(index), *info.shape[1:]) or int(index.max()) >= info.rows:
            self.problems.append(f"the trained token rows of {module} do not fit its {info.shape}")
            return
        self._add(name, module, RowsPart(lambda: self.source.read(key), index, self.base.source, name))

    def _add(self, name: str, module: str, part: Part) -> None:
        owner = self._owners.setdefault(name, module)
        # Trained token rows act in both places; whatever else PEFT trains acts in one.
        if owner != module or (name in self.tied and not isinstance(part, RowsPart)):
            raise UnsupportedError(
                f"{self.label} changes {name} through {module}. The base ties its embeddings, so no single weight acts "
                "as the adapted model's two do. Untie the base's embeddings first, or leave them out of the adapter."
            )
        self.parts.setdefault(name, []).append(part)

    def _slice(self, key: str) -> Callable[[int, int], Tensor]:
        return lambda start, stop: self.source.read_flat(key, start, stop)

    def _base_slice(self, name: str) -> Callable[[int, int], Tensor]:
        return lambda start, stop: self.base.source.read_flat(name, start, stop)

    def _read_matrix(self, key: str) -> Tensor:
        tensor = self.source.read(key)
        return tensor.reshape(tensor.shape[0], -1)
