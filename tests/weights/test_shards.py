from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mergeready.errors import UnsupportedError
from mergeready.weights import ModuleSource, StateDictSource
from mergeready.weights.guard import untouched
from mergeready.weights.shards import Held, held, is_sharded, local, require_readable, whole
from tests.ranks import run_ranks
from tests.sharded import ON_FOUR, ON_TWO, spread
from tests.training.small import Net, examples, state_of


def blocks_of(layouts: tuple[str, ...]) -> dict[str, Any]:
    """Of every parameter under every layout: does the block of the plain tensor equal what this rank holds?"""
    plain, found = state_of(Net()), {}
    stored = StateDictSource(plain)
    for layout in layouts:
        wrong, spans = [], {}
        model = spread(Net(), layout)
        for full_name, parameter in model.named_parameters():
            name = full_name.removeprefix("module.")
            block = held(parameter)
            spans[name] = block.span
            same = [
                torch.equal(block.of(plain[name]), local(parameter)),
                torch.equal(block.read(stored, name), local(parameter)),
                torch.equal(whole(parameter), plain[name]),
                block.sizes == tuple(local(parameter).shape),
                is_sharded(parameter) == isinstance(parameter, DTensor),
            ]
            if block.span is not None:
                start, stop = block.span
                same.append(torch.equal(plain[name].reshape(-1)[start:stop], local(parameter).reshape(-1)))
            if not all(same):
                wrong.append((name, same))
        with torch.no_grad():
            local(next(iter(model.parameters()))).fill_(7)
        written = local(next(iter(model.parameters())))
        found[layout] = (wrong, spans, bool((written == 7).all()))
    return found


@pytest.mark.parametrize(("size", "layouts"), [(2, ON_TWO), (4, ON_FOUR)])
def test_a_block_is_what_a_rank_holds(size: int, layouts: tuple[str, ...]) -> None:
    results = run_ranks(blocks_of, size, layouts)
    for found in results:
        for layout in layouts:
            wrong, _, written = found[layout]
            assert wrong == [], layout
            assert written
    head = [found["fsdp2"][1]["head.bias"] for found in results]
    assert head == (
        [(0, 2), (2, 3)] if size == 2 else [(0, 1), (1, 2), (2, 3), (0, 0)]
    )  # the last holds nothing
    assert all(found["ddp"][1]["head.bias"] == (0, 3) for found in results)
    assert all(found["columns"][1]["layers.0.weight"] is None for found in results)


def after_an_evaluation() -> dict[str, Any]:
    """FSDP2's root keeps its gathered parameters after a pass without gradients."""
    model: Any = spread(Net().eval(), "fsdp2")
    x, _ = examples(0, 0, 4)
    with torch.no_grad():
        model(x)
    gathered = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    listed = ModuleSource(model).is_sharded  # lists shards, whatever the model holds at the moment
    after = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    shards = dict(model.named_parameters())
    heads = [local(p) for name, p in shards.items() if name.startswith("head")]
    with torch.no_grad():
        before = model(x)
        kept = [head.clone() for head in heads]
        for head in heads:
            head.zero_()
        stale = torch.equal(model(x), before)
        for head, value in zip(heads, kept, strict=True):
            head.copy_(value)
        with untouched(model, shards):
            for head in heads:
                head.zero_()
            swapped = bool((model(x) == 0).all())
        restored = torch.equal(model(x), before)
    return {
        "gathered": gathered,
        "listed": listed,
        "after": after,
        "stale": stale,
        "swapped": swapped,
        "restored": restored,
    }


def test_pitfall_fsdp2_modules_stay_gathered_after_a_pass_without_gradients() -> None:
    for found in run_ranks(after_an_evaluation, 2):
        assert found["gathered"], "the pitfall is gone: resharding may be needless"
        assert found["listed"]
        assert found["after"] == []
        assert found["stale"]
        assert found["swapped"]
        assert found["restored"]


def test_spans() -> None:
    assert Held((), (), ()).span == (0, 1)
    assert Held((6,), (2,), (3,)).span == (2, 5)
    assert Held((6, 2, 2), (2, 0, 0), (3, 2, 2)).span == (8, 20)
    assert Held((6, 4), (0, 2), (6, 2)).span is None
    assert Held((6, 4), (6, 0), (0, 4)).span == (0, 0)


def test_a_plain_tensor_is_held_whole() -> None:
    tensor = nn.Parameter(torch.ones(2, 3))
    assert held(tensor) == Held((2, 3), (0, 0), (2, 3))
    assert local(tensor).data_ptr() == tensor.data_ptr()
    assert not local(tensor).requires_grad


class FullyShardedDataParallel(nn.Module):
    """Named as FSDP1's wrapper, which needs a process group to be made."""


class TestRefused:
    def test_pitfall_fsdp1(self) -> None:
        model = nn.Sequential(FullyShardedDataParallel(), nn.Linear(2, 2))
        with pytest.raises(UnsupportedError, match="Use FSDP2"):
            require_readable(model)

    def test_pitfall_zero_3(self) -> None:
        model = nn.Linear(2, 2)
        model.weight.ds_id = 0  # DeepSpeed marks the parameters that it has partitioned
        with pytest.raises(UnsupportedError, match=r"ZeRO-3 .* Use ZeRO-2, or FSDP2"):
            require_readable(model)

    def test_values_elsewhere(self) -> None:
        model = nn.Linear(2, 2, device="meta")
        with pytest.raises(UnsupportedError, match=r"on the meta device.*weight, bias"):
            require_readable(model)


def reading() -> dict[str, Any]:
    source = ModuleSource(spread(Net(), "fsdp2"))
    plain = state_of(Net())
    found: dict[str, Any] = {}
    try:
        source.read("head.weight")
    except UnsupportedError as error:
        found["message"] = str(error)
    with source.gathered(["head.weight"]):
        found["gathered"] = torch.equal(source.read("head.weight"), plain["head.weight"])
    with source.gathering():
        everything: dict[str, Tensor] = {name: source.read(name) for name in source.infos}
    found["whole"] = all(torch.equal(value, plain[name]) for name, value in everything.items())
    try:
        source.read("head.weight")
    except UnsupportedError:
        found["only_inside"] = True
    return found


def test_what_lies_on_other_ranks_is_read_on_purpose_only() -> None:
    for found in run_ranks(reading, 2):
        assert "of head.weight lie on other ranks" in found["message"]
        assert found["gathered"]
        assert found["whole"]
        assert found["only_inside"]


def test_places_inside_a_block() -> None:
    whole = torch.arange(4 * 5 * 3).reshape(4, 5, 3)
    for offset, sizes in [
        ((0, 0, 0), (4, 5, 3)),
        ((1, 0, 0), (2, 5, 3)),
        ((0, 2, 1), (4, 3, 2)),
        ((4, 0, 0), (0, 5, 3)),
    ]:
        block = Held((4, 5, 3), offset, sizes)
        own = block.of(whole).reshape(-1)
        places = torch.tensor([59, 0, 17, 31, 17, 22, 46])
        inside, found = block.places(places)
        assert inside.tolist() == [place in own for place in places.tolist()]
        assert torch.equal(own[found], places[inside])
    assert Held((), (), ()).places(torch.tensor([0, 0]))[1].tolist() == [0, 0]
