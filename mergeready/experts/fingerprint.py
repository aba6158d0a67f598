"""A small sketch of a task vector, enough to estimate norms, cosines and sign conflicts without anybody's weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save
from torch import Tensor

from mergeready.errors import FormatError, MismatchError, listing
from mergeready.experts.base import Base
from mergeready.experts.coordinates import sample_count
from mergeready.experts.identity import BaseIdentity
from mergeready.weights.atomic import new_file
from mergeready.weights.safetensors_file import SafetensorsFile

SUFFIX = ".fingerprint.safetensors"
SCHEMA = "1"
BUDGET = 2**18
"""Coordinates that a fingerprint holds by default: half a megabyte."""


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Norms, sampled coordinates and subspace sketches of one expert.

    Attributes:
        label: How messages and figures call the expert.
        base: Identity of its base.
        shapes: Shape of every parameter that the expert may change, by base parameter name.
        norms: ‖τ‖ of each, exact.
        samples: Values of τ at the sampled coordinates of each (see ``coordinates``), bf16 in files, fp32 here.
        subspaces: For matrices: the leading right singular vectors, projected; shape (k, width), orthonormal rows up
            to the projection.
        total: Elements of all parameters of the base, which with ``budget`` says how many coordinates each has.
        budget: Coordinates that were asked for.
        facts: Whatever else the maker wanted to say, JSON-ready.
        router: If asked for: of linear layers, the unit input that the change answers most strongly, fp16 in files; see
            ``mergeready.metrics.router``.
    """

    label: str
    base: BaseIdentity
    shapes: Mapping[str, tuple[int, ...]]
    norms: Mapping[str, float]
    samples: Mapping[str, Tensor]
    subspaces: Mapping[str, Tensor]
    total: int
    budget: int = BUDGET
    facts: Mapping[str, Any] = field(default_factory=dict)
    router: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """‖τ‖ over all parameters."""
        return math.sqrt(math.fsum(value * value for value in self.norms.values()))

    def numel(self, name: str) -> int:
        """Elements of a parameter."""
        return math.prod(self.shapes[name])

    def save(self, path: str | Path) -> Path:
        """Write the fingerprint; ``.fingerprint.safetensors`` is the customary ending.

        Raises:
            OSError: If it cannot be written; an older file is left as it was then.
        """
        names = list(self.shapes)
        tensors = {
            "norms": torch.tensor([self.norms[name] for name in names], dtype=torch.float64),
            "samples": torch.cat(
                [self.samples[name].to(torch.bfloat16) for name in names] or [torch.zeros(0)]
            ),
        }
        if self.subspaces:
            tensors["subspaces"] = torch.stack([sketch.half() for sketch in self.subspaces.values()])
        if self.router:
            tensors["router"] = torch.cat([vector.half() for vector in self.router.values()])
        about = {
            "label": self.label,
            "base": self.base.to_json(),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "subspaces": list(self.subspaces),
            "total": self.total,
            "budget": self.budget,
            "facts": dict(self.facts),
            **(
                {"router": {name: len(vector) for name, vector in self.router.items()}} if self.router else {}
            ),
        }
        metadata = {"format": "pt", "mergeready.fingerprint": SCHEMA, "mergeready.about": json.dumps(about)}
        with new_file(Path(path)) as temporary:
            temporary.write_bytes(save(tensors, metadata=metadata))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Fingerprint:
        """Read a fingerprint.

        Raises:
            FormatError: If the file is none, is of an unknown schema, or contradicts itself.
        """
        file = SafetensorsFile(Path(path))
        if "mergeready.fingerprint" not in file.metadata:
            raise FormatError(f"{path} is no fingerprint. Make one with `mergeready fingerprint`.")
        if file.metadata["mergeready.fingerprint"] != SCHEMA:
            raise FormatError(
                f"{path} is a fingerprint of schema {file.metadata['mergeready.fingerprint']!r}; "
                f"this version reads schema {SCHEMA}."
            )
        try:
            about = json.loads(file.metadata["mergeready.about"])
            shapes = {str(name): tuple(map(int, shape)) for name, shape in about["shapes"].items()}
            total, budget = int(about["total"]), int(about["budget"])
            base = BaseIdentity.from_json(about["base"], f"the base of {about['label']}")
            sketched, facts, label = list(about["subspaces"]), dict(about["facts"]), str(about["label"])
            routed = {str(name): int(width) for name, width in about.get("router", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise FormatError(f"{path} does not describe itself as a fingerprint does ({error}).") from error
        return cls._assemble(path, file, shapes, total, budget, base, sketched, routed, facts, label)

    @classmethod
    def _assemble(
        cls,
        path: str | Path,
        file: SafetensorsFile,
        shapes: dict[str, tuple[int, ...]],
        total: int,
        budget: int,
        base: BaseIdentity,
        sketched: list[str],
        routed: dict[str, int],
        facts: dict[str, Any],
        label: str,
    ) -> Fingerprint:
        impossible = [name for name, shape in shapes.items() if min(shape, default=0) < 0]
        if impossible:
            raise FormatError(f"{path} gives {listing(impossible)} shapes that no tensor has. Make it again.")
        counts = [sample_count(math.prod(shape), total, budget) for shape in shapes.values()]
        wanted: dict[str, tuple[int, ...]] = {"norms": (len(shapes),), "samples": (sum(counts),)}
        found = {name: info.shape for name, info in file.infos.items()}
        problems = [
            f"{name} is {found.get(name)}, not {shape}"
            for name, shape in wanted.items()
            if found.get(name) != shape
        ]
        sketches = found.get("subspaces", (0, 0, 0))
        if len(sketches) != 3 or sketches[0] != len(sketched) or not set(sketched) <= set(shapes):
            problems.append(f"{len(sketched)} subspaces are named and {sketches[0]} are there")
        if found.get("router", (0,)) != (sum(routed.values()),):
            problems.append(f"router is {found.get('router')}, not {(sum(routed.values()),)}")
        problems += [
            f"router is of {name}, width {width}"
            for name, width in routed.items()
            if width < 1 or width not in shapes.get(name, ())
        ]
        if problems:
            raise FormatError(f"{path} contradicts itself: {listing(problems)}. Make it again.")
        tensors = {
            name: file.read_flat(name, 0, info.numel).reshape(info.shape) for name, info in file.infos.items()
        }
        broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if broken or bool((tensors["norms"] < 0).any()):
            raise FormatError(f"{path} holds values that no fingerprint has: {listing(broken or ['norms'])}.")
        pieces = torch.split(tensors["samples"].float(), counts)
        norms = tensors["norms"].double().tolist()
        prototypes = torch.split(tensors["router"].float(), list(routed.values())) if routed else ()
        return cls(
            label=label,
            base=base,
            shapes=shapes,
            norms=dict(zip(shapes, norms, strict=True)),
            samples=dict(zip(shapes, pieces, strict=True)),
            subspaces={name: tensors["subspaces"][i].float() for i, name in enumerate(sketched)},
            total=total,
            budget=budget,
            facts=facts,
            router=dict(zip(routed, prototypes, strict=True)),
        )


def is_fingerprint(path: object) -> TypeGuard[str | Path]:
    """Whether something is a path that ends like a fingerprint's."""
    return isinstance(path, str | Path) and str(path).endswith(SUFFIX)


def open_fingerprint(given: str | Path | Fingerprint, base: Base) -> Fingerprint:
    """A fingerprint of an expert on this base, read if it is a path.

    Raises:
        FormatError: If the file is no fingerprint.
        BaseMismatchError: If it was taken of an expert on another base.
        MismatchError: If it names parameters that the base does not have in those shapes; all are listed.
    """
    made = given if isinstance(given, Fingerprint) else Fingerprint.load(given)
    base.identity.require_same(made.base, f"fingerprint {made.label}", made.shapes)
    infos = base.source.infos
    strange = [name for name, shape in made.shapes.items() if name not in infos or infos[name].shape != shape]
    if strange:
        raise MismatchError(
            f"fingerprint {made.label} is of parameters that {base.identity.label or 'the base'} does not have in "
            f"these names and shapes: {listing(strange)}. Take it again, relative to this base."
        )
    return made
