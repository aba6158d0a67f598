from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergeready.merging.angles import cosines
from mergeready.weights.source import CHUNK_ELEMENTS, TensorInfo


def between(*deltas: Tensor) -> Tensor:
    info = TensorInfo(tuple(deltas[0].shape), torch.float32)
    return cosines(lambda a, b: [delta.reshape(-1)[a:b] for delta in deltas], info, len(deltas))


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2 * CHUNK_ELEMENTS + 5,)])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e12])
def test_are_those_of_float64(shape: tuple[int, ...], size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [size * torch.randn(shape, generator=generator) for _ in range(4)]
    units = torch.stack([d.double().reshape(-1) / d.double().norm() for d in deltas])
    torch.testing.assert_close(between(*deltas), units @ units.T, rtol=0, atol=1e-6)


def test_there_is_no_angle_to_zeros() -> None:
    found = between(torch.ones(4), torch.zeros(4), -2 * torch.ones(4))
    assert found[1].isnan().all()
    assert found[[0, 2]][:, [0, 2]].tolist() == [[1, -1], [-1, 1]]
