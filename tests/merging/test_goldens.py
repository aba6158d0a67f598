"""Matrix methods against the authors' own code; see goldens/README.md for what was run and how."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from mergeready.experts import LowRank
from mergeready.experts.delta import Delta
from mergeready.merging import MergeMethod, make_method
from tests.merging.matrices import error, merged

FOLDER = Path(__file__).parent / "goldens" / "matrix"


def golden(name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    for case in sorted({key.split("/")[0] for key in tensors}):
        yield (
            case,
            {key.removeprefix(f"{case}/"): t for key, t in tensors.items() if key.startswith(f"{case}/")},
        )


def deltas_of(case: dict[str, Tensor]) -> list[Delta | Tensor]:
    if "B.0" not in case:
        return [case[key] for key in sorted(case) if key.startswith("delta.")]
    count = sum(key.startswith("B.") for key in case)
    shape = (case["B.0"].shape[0], case["A.0"].shape[1])
    return [LowRank(case[f"B.{i}"], case[f"A.{i}"], shape) for i in range(count)]


def method_of(name: str, label: str, case: dict[str, Tensor]) -> MergeMethod:
    ties = {"method": "ties", "density": float(case["density"])} if "density" in case else None
    if name == "knots":
        return make_method("knots", inner=ties)
    if name == "core_space":
        return make_method("core_space", inner=ties or label)
    if name == "svc":
        return make_method("svc", inner=label.split("-")[1], alpha=float(case["alpha"]))
    return make_method(name, **({"ridge": 0.0} if name == "wudi" else {}))


CASES = [(path.stem, *pair) for path in sorted(FOLDER.glob("*.safetensors")) for pair in golden(path.stem)]


@pytest.mark.parametrize(
    ("name", "label", "case"), CASES, ids=[f"{name}-{label}" for name, label, _ in CASES]
)
def test_equals_the_authors_code(name: str, label: str, case: dict[str, Tensor]) -> None:
    deltas = deltas_of(case)
    ours = merged(method_of(name, label, case), deltas, [1.0] * len(deltas))
    assert error(ours, case["merged"].numpy()) < 1e-5


def test_there_are_goldens_of_every_method() -> None:
    assert {name for name, _, _ in CASES} == {
        "core_space",
        "iso_c",
        "iso_cts",
        "knots",
        "svc",
        "tsv_m",
        "wudi",
    }
