from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeready.errors import FormatError, UnsupportedError, listing
from mergeready.experts.adapter import AdapterBuilder, AdapterTaskVector, Slot, SlotKind, require_pairs
from mergeready.experts.base import Base
from mergeready.experts.parts import DoraPart, LowRankPart
from mergeready.experts.peft_config import quantised_note
from mergeready.weights.source import TensorInfo, WeightSource

WEIGHTS_NAME = "adapters.safetensors"
_ROLES = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
_KINDS = ("lora", "dora", "full")


@dataclass(frozen=True)
class MlxConfig:
    """The fields of an MLX-LM adapter configuration that decide what its tensors mean.

    Raises:
        UnsupportedError: If its kind is unknown, or its scaling ambiguous.
    """

    fields: Mapping[str, Any]
    label: str

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UnsupportedError(
                f"{self.label}: `fine_tune_type` is {self.kind!r}; {', '.join(_KINDS)} can be folded into weights."
            )
        if "fine_tune_type" not in self.fields and "alpha" in self.parameters:
            raise UnsupportedError(
                f"{self.label} comes from an old MLX-LM, where `alpha` counted in some versions and not in others. Add "
                '`"fine_tune_type": "lora"` to its configuration and the factor that was in force as `scale`.'
            )

    @property
    def kind(self) -> str:
        """``lora``, ``dora`` or ``full``."""
        return str(self.fields.get("fine_tune_type", "lora"))

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The LoRA settings."""
        found = self.fields.get("lora_parameters")
        return found if isinstance(found, Mapping) else {}

    @property
    def base_name(self) -> str | None:
        """What the adapter calls its base: an id or a path."""
        name = self.fields.get("model")
        return str(name) if name else None

    def scaling(self) -> float:
        """The factor on B A; it is not divided by the rank."""
        scale = self.parameters.get("scale")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30:
            raise FormatError(f"{self.label}: `scale` is {scale!r}, not a finite number.")
        return float(scale)


class MlxTaskVector(AdapterTaskVector):
    """The task vector of an MLX-LM adapter: effective deltas under base parameter names.

    ``lora_a`` is (in, r) and ``lora_b`` (r, out), so a linear layer (out, in) changes by
    ``scale · (lora_a lora_b)ᵀ`` and an embedding (rows, width) by ``scale · lora_a lora_b``. DoRA multiplies rows by
    ``m / ‖W + D‖``. A ``full`` adapter holds whole trained parameters.

    Args:
        source: The adapter's tensors.
        config: Its configuration.
        base: The base it belongs to, under the names of its safetensors.
        label: How messages call it.

    Raises:
        FormatError: If tensors are unknown or do not pair up; all are listed.
        MismatchError: If targets are missing in the base or have another shape; all are listed.
    """

    def __init__(self, source: WeightSource, config: MlxConfig, base: Base, label: str) -> None:
        builder = _Builder(source, base, label)
        builder.config, builder.acts_on_both = config, True  # its layers serve tied embeddings as head, too
        if config.kind == "full":
            builder.match(source.infos)
            for name in source.infos:
                builder.add_copy(name, name)
        else:
            modules = _sort_tensors(source, label)
            builder.match(f"{module}.weight" for module in modules)
            for module, keys in modules.items():
                builder.add_module(module, keys)
        builder.notes += quantised_note(config.base_name)
        super().__init__(builder)


def _sort_tensors(source: WeightSource, label: str) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for key in source.infos:
        module, _, leaf = key.rpartition(".")
        if leaf in _ROLES:
            modules.setdefault(module, {})[_ROLES[leaf]] = key
        else:
            unknown.append(key)
    if unknown:
        raise FormatError(f"{label} holds tensors that MLX's LoRA format does not have: {listing(unknown)}.")
    require_pairs(modules, (("A", "B"),), label, source.infos)
    if not modules:
        raise FormatError(f"{label} holds no tensors.")
    return modules


class _Builder(AdapterBuilder):
    config: MlxConfig

    def add_module(self, module: str, keys: Mapping[str, str]) -> None:
        name = self.weight_of(module)
        if name is None:
            return
        info = self.base.source.infos[name]
        a, b = self.source.infos[keys["A"]].shape, self.source.infos[keys["B"]].shape
        kind = self._kind(module, a, b, info)
        if kind is None:
            self.problems.append(f"lora_a {a} and lora_b {b} of {module} do not make its {info.shape}")
            return
        if ("magnitude" in keys) != (self.config.kind == "dora"):
            has = "has" if "magnitude" in keys else "lacks"
            self.problems.append(f"{module} {has} magnitudes, yet `fine_tune_type` is {self.config.kind}")
            return
        A_key, B_key = keys["A"], keys["B"]
        lora = LowRankPart(
            lambda: self.source.read(B_key).T,
            lambda: self.source.read(A_key).T,
            self.config.scaling(),
            info.shape,
            kind == "embedding",
        )
        if "magnitude" in keys:
            m_key = keys["magnitude"]
            dora = DoraPart(lora, lambda: self.source.read(m_key), self.base_slice(name), info)
            self.add(name, Slot(module, kind, dora=True), dora)
        else:
            self.add(name, Slot(module, kind), lora)

    def _kind(self, module: str, a: tuple[int, ...], b: tuple[int, ...], info: TensorInfo) -> SlotKind | None:
        if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            return None
        straight, swapped = (b[1], a[0]) == info.shape, (a[0], b[1]) == info.shape
        if straight and swapped:
            return "embedding" if "embed" in module.rpartition(".")[2] else "linear"
        return "linear" if straight else "embedding" if swapped else None
