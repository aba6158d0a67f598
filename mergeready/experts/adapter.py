"""What all adapter formats have in common once their files are understood: parts under base parameter names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from mergeready.errors import FormatError, MismatchError, NotTrainedError, UnsupportedError, listing
from mergeready.experts.base import Base
from mergeready.experts.delta import Delta
from mergeready.experts.parts import LowRankPart, Part, ReplacePart, RowsPart, SumPart
from mergeready.experts.stored import Rounded, coarsest
from mergeready.experts.task_vector import TaskVector
from mergeready.weights.names import match_names
from mergeready.weights.source import TensorInfo, WeightSource, is_mergeable
from mergeready.weights.state_dict import StateDictSource

SlotKind: TypeAlias = Literal["linear", "transposed", "embedding", "copy", "bias", "rows", "experts"]


@dataclass(frozen=True)
class Slot:
    """Where an adapter changes a parameter, and how.

    Attributes:
        module: The module's own name in the adapter, without format prefixes.
        kind: ``linear`` factors; ``transposed`` factors of a weight stored (in, out); ``embedding`` factors; a whole
            trained ``copy``; a ``bias`` of LoRA's own; trained ``rows``; factors of a stack of ``experts``.
        dora: Whether magnitudes make the change of factors more than low-rank.
    """

    module: str
    kind: SlotKind
    dora: bool = False


class AdapterTaskVector(TaskVector):
    """The task vector of an adapter: effective deltas under base parameter names, all scaling folded in.

    Attributes:
        source: The adapter's own tensors.
        slots: Where and how each parameter is changed.
        extra: Parameters in the adapter's file that the base does not have.
        running: Base name to own name of running statistics that it holds; they are no change of weights.
        notes: What a reader of results should know, such as training on quantised weights.
    """

    source: WeightSource
    slots: Mapping[str, Slot]
    extra: tuple[str, ...]
    running: Mapping[str, str]
    notes: tuple[str, ...]

    def __init__(self, builder: AdapterBuilder) -> None:
        base, label = builder.base, builder.label
        if builder.problems:
            raise MismatchError(f"{label} does not fit {base.source.label}: {listing(builder.problems)}.")
        self.label, self.base, self.source = label, base.identity, builder.source
        self.extra, self.slots = tuple(builder.extra), dict(builder.slots)
        self.running = dict(builder.running)
        self.notes = tuple(builder.notes)
        infos = base.source.infos
        self._parts = {
            name: parts[0] if len(parts) == 1 else SumPart(parts, infos[name].shape)
            for name, parts in builder.parts.items()
        }
        self.infos = {name: infos[name] for name in self._parts}

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        return self._parts[name].flat(start, stop)

    def rounded(self) -> Mapping[str, Rounded]:
        # Adapters are written in one format; of several, the coarsest decides what is known of a product.
        dtype = coarsest({self.source.precision(key) for key in self.source.infos})
        if dtype is None:
            return {}
        stored: dict[SlotKind, Literal["weights", "rows"]] = {"copy": "weights", "rows": "rows"}
        return {name: Rounded(dtype, stored.get(slot.kind, "factors")) for name, slot in self.slots.items()}

    def __getitem__(self, name: str) -> Delta:
        return self._parts[name].delta()

    def statistics(self) -> WeightSource | None:
        """Its running statistics under the base's names, read now; None where it holds none."""
        if not self.running:
            return None
        return StateDictSource(
            {name: self.source.read(key) for name, key in self.running.items()}, self.label
        )

    def require_trained(self) -> None:
        """Raise if every change is exactly zero: LoRA starts with B = 0, and nothing moved it.

        Raises:
            NotTrainedError: If so.
        """
        if not any(self[name].norm() > 0 for name in self):
            raise NotTrainedError(f"{self.label} changes nothing: the adapter was never trained.")


@dataclass
class AdapterBuilder:
    """Collects an adapter's parts, with every problem on the way, for an ``AdapterTaskVector``.

    Attributes:
        source: The adapter's tensors.
        base: The base it belongs to.
        label: How messages call the adapter.
        names: Own parameter name to base name, for those that :meth:`match` found.
        acts_on_both: Whether a change of tied embeddings acts in both places where the model uses them.
    """

    source: WeightSource
    base: Base
    label: str
    names: Mapping[str, str] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    running: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tied: frozenset[str] = frozenset()
    acts_on_both: bool = False
    _owners: dict[str, str] = field(default_factory=dict)

    def match(self, wanted: Iterable[str]) -> None:
        """Find the base's own name for every parameter that the adapter may touch."""
        base = self.base.source
        self.names = match_names(wanted, base.infos, base_aliases=base.aliases).to_base
        self.tied = self.base.tied

    def weight_of(self, module: str) -> str | None:
        """The base's name of a module's weight; None, with the problem noted, if it cannot be adapted."""
        name = self.names.get(f"{module}.weight")
        if name is None:
            self.problems.append(f"{module}.weight is not in the base{self._hint(module)}")
            return None
        if not self.base.source.infos[name].dtype.is_floating_point:
            self.problems.append(f"{name} is stored quantised in the base, so a delta cannot be added to it")
            return None
        return name

    def factors(
        self,
        module: str,
        A_shape: tuple[int, ...],
        B_shape: tuple[int, ...],
        info: TensorInfo,
        kind: SlotKind,
    ) -> bool:
        """Whether factors A (r, in) and B (out, r) make the parameter's shape; a problem is noted if not."""
        inputs, outputs = A_shape[1:], B_shape[:1]
        expected = outputs + inputs if kind == "linear" else inputs + outputs
        fits = expected == info.shape and B_shape[1] == A_shape[0] and all(s == 1 for s in B_shape[2:])
        if not fits:
            self.problems.append(
                f"factors {B_shape} and {A_shape} of {module} do not make its {info.shape}"
                + (" (grouped convolutions are not supported)" if len(info.shape) > 2 else "")
            )
        return fits

    def add_copy(self, name: str, key: str) -> None:
        """Add a whole trained copy of a parameter, stored under ``key``."""
        base_name = self.names.get(name)
        if base_name is None:
            self.extra.append(name)
            return
        info, own = self.base.source.infos[base_name], self.source.infos[key]
        if own.shape != info.shape:
            self.problems.append(f"{name} is {own.shape}, in the base {info.shape}")
            return
        if not is_mergeable(base_name, info):
            self.running[base_name] = key
            return
        part = ReplacePart(self.slice(key), self.base_slice(base_name), info)
        self.add(base_name, Slot(name.rpartition(".")[0], "copy"), part)

    def add(self, name: str, slot: Slot, part: Part) -> None:
        """Add one part of a parameter's change.

        Raises:
            UnsupportedError: If it would change one place of a parameter that the base uses in two.
        """
        owner = self._owners.setdefault(name, slot.module)
        # Trained token rows act in both places; whatever else PEFT trains acts in one.
        shared = self.acts_on_both or isinstance(part, RowsPart)
        if owner != slot.module or (name in self.tied and not shared):
            raise UnsupportedError(
                f"{self.label} changes {name} through {slot.module}. The base ties its embeddings, so no single "
                "weight acts as the adapted model's two do. Untie the base's embeddings first, or leave them out of "
                "the adapter."
            )
        self.parts.setdefault(name, []).append(part)
        # A LoRA bias on top of a trained base bias is a bias; anything on top of factors keeps the factors' kind.
        self.slots.setdefault(name, slot)

    def low_rank(
        self, B_key: str, A_key: str, scaling: float, info: TensorInfo, transposed: bool
    ) -> LowRankPart:
        """Factors stored as A (r, in, …) and B (out, r, …)."""
        return LowRankPart(
            lambda: self.matrix(B_key), lambda: self.matrix(A_key), scaling, info.shape, transposed
        )

    def matrix(self, key: str) -> Tensor:
        """A stored tensor as a matrix: its first dimension by all others."""
        tensor = self.source.read(key)
        return tensor.reshape(tensor.shape[0], -1)

    def slice(self, key: str) -> Callable[[int, int], Tensor]:
        """A reader of pieces of a stored tensor."""
        return lambda start, stop: self.source.read_flat(key, start, stop)

    def base_slice(self, name: str) -> Callable[[int, int], Tensor]:
        """A reader of pieces of a base parameter."""
        return lambda start, stop: self.base.source.read_flat(name, start, stop)

    def _hint(self, module: str) -> str:
        """Why a module of a mixture of experts may be called otherwise in the base."""
        fused = any(
            name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in self.base.source.infos
        )
        if ".experts." in module and fused:
            return (
                " (transformers 5 stacks the experts of a layer, older versions kept one module each: open the base "
                "from a checkpoint with the adapter's names)"
            )
        if module.endswith((".experts", ".experts.base_layer")) and not fused:
            return (
                " (the adapter was trained on stacked experts as transformers 5 loads them: pass the loaded model as "
                "base)"
            )
        return ""


def require_pairs(
    modules: Mapping[str, Mapping[str, str]],
    pairs: Iterable[tuple[str, str]],
    label: str,
    infos: Mapping[str, TensorInfo],
) -> None:
    """Raise if a module has one factor without the other, or a factor that is no matrix.

    Raises:
        FormatError: If so; all are listed.
    """
    pairs = list(pairs)
    halves = [
        f"{module}.{role}"
        for module, keys in modules.items()
        for first, second in pairs
        for role, other in ((first, second), (second, first))
        if role in keys and other not in keys
    ]
    if halves:
        raise FormatError(f"{label} holds only one of two LoRA factors: {listing(halves)}.")
    factors = {role for pair in pairs for role in pair}
    keys = [key for found in modules.values() for role, key in found.items() if role in factors]
    flat = [f"{key} {infos[key].shape}" for key in keys if len(infos[key].shape) < 2]
    if flat:
        raise FormatError(f"{label} holds LoRA factors that are no matrices: {listing(flat)}.")
