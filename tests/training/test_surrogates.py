from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mergeready.errors import OptionError
from mergeready.experts import BaseIdentity, DeltaTaskVector, Dense, LiveExpert, dense
from mergeready.experts.delta import LowRank
from mergeready.training.surrogates import Surrogates, SyntheticPeer, synthetic_peers
from mergeready.weights.source import TensorInfo

SHAPES = {
    "scalar": (),
    "one": (1,),
    "odd": (7, 3),
    "bias": (17,),
    "large": (600, 500),
}  # large: over one chunk


def make_expert(seed: int = 0) -> DeltaTaskVector:
    generator = torch.Generator().manual_seed(seed)
    deltas = {name: Dense(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    infos = {name: TensorInfo(shape, torch.float32) for name, shape in SHAPES.items()}
    return DeltaTaskVector(deltas, infos, BaseIdentity({}), "expert")


def values(vector: object, name: str) -> Tensor:
    return dense(vector[name]).reshape(-1)  # type: ignore[index]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("index", [0, 1])
def test_magnitudes_and_norms_are_the_experts(name: str, index: int) -> None:
    expert = make_expert()
    peer = synthetic_peers(expert, Surrogates(count=2))[index]
    theirs, own = values(peer, name), values(expert, name)
    assert dense(peer[name]).shape == SHAPES[name]
    assert torch.equal(theirs.abs().sort().values, own.abs().sort().values)
    assert float(theirs.double().square().sum()) == pytest.approx(
        float(own.double().square().sum()), rel=1e-12
    )


def test_directions_are_unrelated() -> None:
    """Cosines of independent vectors of n entries have standard deviation 1/√n."""
    expert = make_expert()
    vectors = [expert, *synthetic_peers(expert, Surrogates(count=4))]
    large = torch.stack([values(vector, "large").double() for vector in vectors])
    large /= large.norm(dim=1, keepdim=True)
    cosines = large @ large.T - torch.eye(5)
    assert cosines.abs().max() < 5 / 300_000**0.5


def test_signs_are_fair() -> None:
    peer = synthetic_peers(make_expert(), Surrogates(count=1))[0]
    assert float((values(peer, "large") > 0).double().mean()) == pytest.approx(
        0.5, abs=5 * 0.5 / 300_000**0.5
    )


def test_entries_of_equal_size_stay_where_their_kind_is() -> None:
    """A cyclic shift: neighbours in the expert are neighbours in the surrogate, but for the seam."""
    ramp = torch.arange(1.0, 101.0)
    infos = {"ramp": TensorInfo((100,), torch.float32)}
    expert = DeltaTaskVector({"ramp": Dense(ramp)}, infos, BaseIdentity({}), "expert")
    found = values(synthetic_peers(expert, Surrogates(count=1))[0], "ramp").abs()
    assert sum(b - a == 1 for a, b in pairwise(found.tolist())) == 98
    assert not torch.equal(found, ramp)


@pytest.mark.parametrize("name", SHAPES)
def test_pieces_equal_the_whole(name: str) -> None:
    peer = synthetic_peers(make_expert(), Surrogates(count=1))[0]
    whole = values(peer, name)
    numel = peer.infos[name].numel
    for cuts in ([0, numel], [0, numel // 3, numel // 2, numel], [0, 1, numel], [0, numel - 1, numel]):
        cuts = sorted({cut for cut in cuts if 0 <= cut <= numel})
        pieces = [peer.flat(name, a, b) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)


def test_every_piece_of_a_small_one() -> None:
    peer = synthetic_peers(make_expert(), Surrogates(count=1))[0]
    whole = values(peer, "odd")
    for a in range(21):
        for b in range(a + 1, 22):
            assert torch.equal(peer.flat("odd", a, b), whole[a:b])


def test_a_piece_may_be_written_to() -> None:
    expert = make_expert()
    peer = synthetic_peers(expert, Surrogates(count=1))[0]
    before = values(expert, "odd").clone(), values(peer, "odd")
    peer.flat("odd", 0, 21).zero_()
    assert torch.equal(values(expert, "odd"), before[0])
    assert torch.equal(values(peer, "odd"), before[1])


def test_the_seed_and_the_position_decide() -> None:
    def draw(seed: int, index: int) -> Tensor:
        return values(SyntheticPeer(make_expert(), index, seed), "bias")

    assert torch.equal(draw(0, 0), draw(0, 0))
    assert not torch.equal(draw(0, 0), draw(0, 1))
    assert not torch.equal(draw(0, 0), draw(1, 0))
    for other in ((0, 1), (1, 0)):  # shifted apart as well as signed apart
        assert not torch.equal(draw(0, 0).abs(), draw(*other).abs())
        assert not torch.equal(draw(0, 0).sign(), draw(*other).sign())


def test_parameters_are_shifted_and_signed_apart() -> None:
    infos = {name: TensorInfo((64,), torch.float32) for name in "ab"}
    same = {name: Dense(torch.arange(1.0, 65.0)) for name in "ab"}
    peer = SyntheticPeer(DeltaTaskVector(same, infos, BaseIdentity({}), "expert"), 0, 0)
    assert not torch.equal(values(peer, "a").abs(), values(peer, "b").abs())
    assert not torch.equal(values(peer, "a").sign(), values(peer, "b").sign())


def test_an_adapters_change_is_used_as_it_acts() -> None:
    infos = {"w": TensorInfo((6, 5), torch.float32)}
    B, A = torch.randn(6, 2), torch.randn(2, 5)
    expert = DeltaTaskVector({"w": LowRank(B, A, (6, 5))}, infos, BaseIdentity({}), "adapter")
    found = values(synthetic_peers(expert, Surrogates(count=1))[0], "w")
    torch.testing.assert_close(found.abs().sort().values, (B @ A).reshape(-1).abs().sort().values)


def test_they_follow_a_live_model() -> None:
    base, model = nn.Linear(8, 8), nn.Linear(8, 8)
    model.load_state_dict(base.state_dict())
    live = LiveExpert(model, base)
    [peer] = synthetic_peers(live.vector, Surrogates(count=1))
    assert values(peer, "weight").norm() == 0
    with torch.no_grad():
        model.weight += 0.01
    first = values(peer, "weight")
    with torch.no_grad():
        model.weight += 0.01
    torch.testing.assert_close(values(peer, "weight"), 2 * first, rtol=1e-4, atol=1e-6)


def test_names_and_number() -> None:
    expert = make_expert()
    peers = synthetic_peers(expert, Surrogates(count=3))
    assert [peer.label for peer in peers] == ["surrogate 1", "surrogate 2", "surrogate 3"]
    assert all(list(peer) == list(expert) and peer.base is expert.base for peer in peers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "`count` must be at least 1, not 0"),
        ({"alone_scales": [0.3, 0.0]}, "`scales` must be positive"),
        ({"alone_scales": [float("inf")]}, "`scales` must be positive"),
    ],
)
def test_ranges(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Surrogates(**options)
    assert Surrogates(alone_scales=()).alone_scales == ()
