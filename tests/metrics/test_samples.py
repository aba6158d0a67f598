from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from mergeready.experts.coordinates import coordinates
from mergeready.metrics.samples import SampleAccumulator
from mergeready.weights import StateDictSource
from tests.metrics.chunks import Values, cuts, experts, feed, in_parts, long_experts


def sampler(found: list[Values], count: int) -> SampleAccumulator:
    return SampleAccumulator(
        StateDictSource(found[0]).infos, {n: min(count, t.numel()) for n, t in found[0].items()}
    )


@given(experts(), cuts)
@settings(max_examples=30)
def test_pieces_in_any_order_give_the_sampled_values(found: list[Values], where: list[float]) -> None:
    parts = in_parts([sampler(found, 100) for _ in range(3)], found, where)
    assert isinstance(parts, SampleAccumulator)
    samples = parts.samples()
    for name, tensor in found[0].items():
        if tensor.numel():
            wanted = tensor.reshape(-1)[coordinates(name, tensor.numel(), min(100, tensor.numel()))]
            assert torch.equal(samples[name], wanted)


@pytest.mark.parametrize("count", [7, 5000])
def test_a_parameter_of_several_chunks(count: int) -> None:
    found = long_experts(1)
    gathered = feed(sampler(found, count), found)
    assert isinstance(gathered, SampleAccumulator)
    wanted = found[0]["long"].reshape(-1)[coordinates("long", found[0]["long"].numel(), count)]
    assert torch.equal(gathered.samples()["long"], wanted)


def test_what_no_fingerprint_holds_is_passed_over() -> None:
    found = [{"a": torch.ones(4), "b": torch.ones(3)}]
    gathered = SampleAccumulator(StateDictSource(found[0]).infos, {"b": 3})
    feed(gathered, found)
    assert {name: values.tolist() for name, values in gathered.samples().items()} == {"b": [1, 1, 1]}
