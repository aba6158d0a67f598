from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergeready.errors import FormatError, UnsupportedError, listing
from mergeready.experts.adapter import AdapterBuilder, AdapterTaskVector, Slot, require_pairs
from mergeready.experts.base import Base
from mergeready.experts.parts import DoraPart, GainBiasPart, LowRankPart
from mergeready.weights.source import TensorInfo, WeightSource

WEIGHTS_NAMES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_NAMES = ("model_head.safetensors", "pytorch_model_head.bin")

_KEY = re.compile(r"(?P<module>.+)\.loras\.(?P<adapter>[^.]+)\.(?P<role>lora_A|lora_B|m)(?:\.weight)?")
_VERSION = re.compile(r"adapters\.(\d+)\.(\d+)")
_BLOCKS = "qkv"
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt")

_ARCHITECTURES = {
    "prefix_tuning": "it changes keys and values, not weights",
    "prompt_tuning": "it changes inputs, not weights",
    "reft": "it edits hidden states, not weights",
    "mtl_lora": "its factors differ by task and are mixed at each forward pass",
    "union": "it joins several kinds of adapter. Save its LoRA part alone",
}
_BOTTLENECK = "it is a bottleneck adapter: new layers with a nonlinearity are no change of the weights"


@dataclass(frozen=True)
class AdapterHubConfig:
    """The fields of an AdapterHub (`adapters` library) configuration that decide what its tensors mean.

    Raises:
        UnsupportedError: If it is no adapter that can be folded into weights.
    """

    fields: Mapping[str, Any]
    label: str

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise UnsupportedError(f"{self.label} cannot be folded into its base: {'; '.join(problems)}.")

    def _problems(self) -> list[str]:
        inner = self.fields.get("config")
        if not isinstance(inner, Mapping):
            return [f"its `config` is {inner!r}. Load and save it with a current version of `adapters`"]
        architecture = inner.get("architecture")
        if architecture != "lora":
            return [_ARCHITECTURES.get(str(architecture), _BOTTLENECK)]
        found = []
        if inner.get("composition_mode", "add") != "add":
            found.append("its `composition_mode` is scale, which is (IA)³: it multiplies, and is no sum")
        if inner.get("use_gating"):
            found.append("`use_gating`: its gates depend on the input")
        if inner.get("vera_d") is not None or inner.get("vera_b") is not None:
            found.append("it is VeRA, which is not read: merge it into the base and pass the full model")
        if not found and self._scaling_is_unknown():
            found.append(
                f"`version` is {self.fields.get('version')!r}, of which it is unknown whether α was in force while "
                "training; if it was not, set α to r in its configuration"
            )
        return found

    def _scaling_is_unknown(self) -> bool:
        return self.version is None and self._number("alpha") != self._number("r")

    @property
    def version(self) -> tuple[int, int] | None:
        """Major and minor version of the `adapters` library that saved it."""
        found = _VERSION.match(str(self.fields.get("version", "")))
        return (int(found[1]), int(found[2])) if found else None

    @property
    def base_name(self) -> str | None:
        """What the adapter calls its base: an id or a path."""
        name = self.fields.get("model_name")
        return str(name) if name else None

    @property
    def name(self) -> str:
        """The adapter's own name, part of its tensors' names."""
        return str(self.fields.get("name"))

    @property
    def attention(self) -> str:
        """Which of a fused weight's blocks q, k and v have factors, in that order."""
        matrices = self.fields["config"].get("attn_matrices") or ("q", "v")
        if not isinstance(matrices, list | tuple | str):
            raise FormatError(f"{self.label}: `attn_matrices` is {matrices!r}, not a list.")
        return "".join(block for block in _BLOCKS if block in matrices)

    @property
    def stores_transposed(self) -> bool:
        """Whether the model's linear layers store their weight as (in, out)."""
        return self.fields.get("model_type") in _TRANSPOSED_MODELS

    @property
    def use_dora(self) -> bool:
        """Whether magnitudes belong to the factors."""
        return bool(self.fields["config"].get("use_dora"))

    def scaling(self) -> float:
        """LoRA's factor α/r.

        Before version 1.1.0 the library trained without it (its issue 770), so such adapters act with factor 1.
        """
        if self.version is None or self.version < (1, 1):
            return 1.0
        return self._number("alpha") / self._number("r")

    def _number(self, key: str) -> float:
        value = self.fields["config"].get(key, 8)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise FormatError(f"{self.label}: `{key}` is {value!r}, not a positive number.")
        return float(value)


class AdapterHubTaskVector(AdapterTaskVector):
    """The task vector of an adapter of the `adapters` library: effective deltas under base parameter names.

    Reads LoRA on linear layers, on Conv1D and on fused query-key-value weights, where each of the three blocks has
    factors of its own, and DoRA. That library's DoRA leaves the scaling out inside the norm and multiplies the
    layer's whole output, bias included: ``y = g ∘ (W x + b + s B A x)`` with ``g = m / ‖W + B A‖``.

    Args:
        source: The adapter's tensors under the library's names.
        config: Its configuration.
        base: The base it belongs to.
        label: How messages call it.

    Raises:
        FormatError: If tensors are unknown or do not pair up; all are listed.
        MismatchError: If targets are missing in the base or have another shape; all are listed.
    """

    def __init__(self, source: WeightSource, config: AdapterHubConfig, base: Base, label: str) -> None:
        modules = _sort_tensors(source, config, label)
        builder = _Builder(source, base, label)
        builder.config = config
        builder.match(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))
        for module, keys in modules.items():
            builder.add_module(module, keys)
        super().__init__(builder)


def _sort_tensors(source: WeightSource, config: AdapterHubConfig, label: str) -> dict[str, dict[str, str]]:
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for key in source.infos:
        match = _KEY.fullmatch(key)
        if match is None or match["adapter"] != config.name:
            unknown.append(key)
        else:
            modules.setdefault(match["module"], {})[match["role"]] = key
    if unknown:
        raise FormatError(f"{label} holds tensors that are no LoRA of {config.name!r}: {listing(unknown)}.")
    if not modules:
        raise FormatError(f"{label} holds no tensors.")
    require_pairs(modules, (("lora_A", "lora_B"),), label, source.infos)
    return modules


class _Builder(AdapterBuilder):
    config: AdapterHubConfig

    def add_module(self, module: str, keys: Mapping[str, str]) -> None:
        name = self.weight_of(module)
        if name is None:
            return
        info = self.base.source.infos[name]
        if ("m" in keys) != self.config.use_dora:
            self.problems.append(
                f"{module} has {'' if 'm' in keys else 'no '}magnitudes, unlike `use_dora` says"
            )
            return
        A, B = self.source.infos[keys["lora_A"]].shape, self.source.infos[keys["lora_B"]].shape
        transposed = self._is_transposed(A[1], info)
        if A[0] != B[1] or B[0] != info.shape[1 if transposed else 0]:
            self._add_blocks(module, keys, name, info, transposed)
        elif self.factors(module, A, B, info, "transposed" if transposed else "linear"):
            lora = self.low_rank(keys["lora_B"], keys["lora_A"], self.config.scaling(), info, transposed)
            if self.config.use_dora:
                self._add_dora(module, keys, name, info, lora)
            else:
                self.add(name, Slot(module, "transposed" if transposed else "linear"), lora)

    def _is_transposed(self, inputs: int, info: TensorInfo) -> bool:
        square = len(info.shape) == 2 and info.shape[0] == info.shape[1]
        return self.config.stores_transposed if square else info.shape[0] == inputs

    def _add_blocks(
        self, module: str, keys: Mapping[str, str], name: str, info: TensorInfo, transposed: bool
    ) -> None:
        """Factors of some of the three blocks of a fused query-key-value weight, as one pair of factors."""
        A, B = self.source.infos[keys["lora_A"]].shape, self.source.infos[keys["lora_B"]].shape
        used, outputs = self.config.attention, info.shape[1 if transposed else 0]
        expected = ((B[1] * len(used), info.shape[0 if transposed else 1]), (outputs // 3 * len(used), B[1]))
        if outputs % 3 or expected != (A, B):
            self.problems.append(
                f"factors {B} and {A} of {module} do not make blocks {used} of its {info.shape}"
            )
            return
        if self.config.use_dora:
            self.problems.append(f"{module} is a fused weight, for which `adapters` does not apply DoRA")
            return
        A_key, B_key = keys["lora_A"], keys["lora_B"]
        part = LowRankPart(
            lambda: spread_blocks(self.source.read(B_key), used, outputs),
            lambda: self.source.read(A_key),
            self.config.scaling(),
            info.shape,
            transposed,
        )
        self.add(name, Slot(module, "transposed" if transposed else "linear"), part)

    def _add_dora(
        self, module: str, keys: Mapping[str, str], name: str, info: TensorInfo, lora: LowRankPart
    ) -> None:
        if lora.transposed:
            self.problems.append(
                f"{name} is stored (in, out), where `adapters` takes DoRA's norms of the wrong side"
            )
            return
        key, unscaled = keys["m"], self.low_rank(keys["lora_B"], keys["lora_A"], 1.0, info, False)
        part = DoraPart(lora, lambda: self.source.read(key), self.base_slice(name), info, normed=unscaled)
        self.add(name, Slot(module, "linear", dora=True), part)
        bias = self.names.get(f"{module}.bias")
        if bias is not None:
            rows = self.base.source.infos[bias].numel
            self.add(bias, Slot(module, "bias"), GainBiasPart(part, self.base_slice(bias), rows))


def spread_blocks(B: Tensor, used: str, outputs: int) -> Tensor:
    """The factor B of a whole fused weight from the factors of its blocks.

    Args:
        B: (outputs / 3 · n, r), the n used blocks below each other.
        used: Which of q, k and v they are.
        outputs: Rows of the fused weight.

    Returns:
        (outputs, n · r), zero but for the used blocks, each in columns of its own.

    >>> import torch
    >>> spread_blocks(torch.tensor([[1.0], [2.0]]), "qv", 3)
    tensor([[1., 0.],
            [0., 0.],
            [0., 2.]])
    """
    rank, rows = B.shape[1], outputs // 3
    spread = B.new_zeros(outputs, rank * len(used))
    for index, block in enumerate(used):
        place = _BLOCKS.index(block) * rows
        spread[place : place + rows, index * rank : (index + 1) * rank] = B[index * rows : (index + 1) * rows]
    return spread
