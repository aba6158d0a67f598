from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from mergeready.errors import NonFiniteError
from mergeready.experts import Base, LiveExpert
from mergeready.training.history import History
from mergeready.training.measure import measure
from mergeready.training.peers import Peer, open_peers
from tests.models import perturb
from tests.tensor_watch import TensorWatch
from tests.training.histories import metrics
from tests.training.small import Net, expert, state_of


def change(seed: int | Net) -> dict[str, NDArray[np.float64]]:
    """A task vector in float64."""
    start = state_of(Net())
    state = state_of(seed if isinstance(seed, Net) else expert(seed))
    return {name: (state[name].double() - start[name].double()).numpy() for name in start}


def flat(vector: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([values.reshape(-1) for values in vector.values()])


def norm(*values: NDArray[np.float64]) -> float:
    return float(np.sqrt(sum((v**2).sum() for v in values)))


def test_against_numpy() -> None:
    model, base = expert(1), Base.open(Net())
    peers = open_peers([Peer(expert(2), name="law"), Peer(expert(3, steps=40), name="code")], base)
    found = measure(LiveExpert(model, base), peers, 20, History([metrics(10, 0.25)]))
    tau, start = change(model), state_of(Net())
    own, others = flat(tau), [flat(change(2)), flat(change(expert(3, steps=40)))]
    assert found.step == 20
    assert found.norm == pytest.approx(norm(own), rel=1e-6)
    assert found.relative_norm == pytest.approx(
        norm(own) / norm(*(v.double().numpy() for v in start.values())), rel=1e-6
    )
    assert found.growth == pytest.approx((norm(own) - 0.25) / 10, rel=1e-6)
    of_norm = [values for name, values in tau.items() if name.startswith("norm.")]
    of_embed = [values for name, values in tau.items() if name.startswith("embed.")]
    assert found.groups["norm"] == pytest.approx(norm(*of_norm), rel=1e-6)
    assert found.groups["embedding"] == pytest.approx(norm(*of_embed), rel=1e-6)
    assert norm(np.array(list(found.groups.values()))) == pytest.approx(norm(own), rel=1e-6)
    for layer in (0, 1):
        exact = norm(tau[f"layers.{layer}.weight"], tau[f"layers.{layer}.bias"])
        assert found.layers[layer] == pytest.approx(exact, rel=1e-6)
    assert set(found.layers) == {0, 1}
    squares = np.sort(own**2)[::-1]
    count = len(squares) / 10
    exact_share = (squares[: int(count)].sum() + (count % 1) * squares[int(count)]) / squares.sum()
    assert found.top_mass["0.1"] == pytest.approx(exact_share, rel=1e-3)
    assert set(found.top_mass) == {"0.01", "0.1"}
    for label, other in zip(("law", "code"), others, strict=True):
        assert found.cosine[label] == pytest.approx(own @ other / norm(own) / norm(other), abs=1e-6)
        both = (own != 0) & (other != 0)
        conflict = np.mean(np.sign(own[both]) != np.sign(other[both]))
        assert found.sign_conflict[label] == pytest.approx(conflict, abs=2e-3)  # fp32 may round to zero
    norms = [norm(own), *(norm(other) for other in others)]
    assert found.norm_ratio == pytest.approx(max(norms) / min(norms), rel=1e-6)


def test_without_peers_there_is_nothing_to_compare_with() -> None:
    found = measure(LiveExpert(expert(1), Net()), [], 4, History())
    assert (found.cosine, found.sign_conflict, found.norm_ratio) == ({}, {}, None)
    assert found.growth == pytest.approx(found.norm / 4)


def test_growth_is_since_an_earlier_step_not_this_one() -> None:
    """A step may be measured again, after a probe of the same step or a resumed run."""
    live = LiveExpert(expert(1), Net())
    history = History([metrics(2, 0.25), metrics(4, 0.5)])
    found = measure(live, [], 4, history)
    assert found.growth == pytest.approx((found.norm - 0.25) / 2)


def test_only_trained_parameters_count() -> None:
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "head.bias"
    live = LiveExpert(model, Net())
    with torch.no_grad():
        model.head.bias += 2
    found = measure(live, [], 1, History())
    assert found.norm == pytest.approx(2 * 3**0.5)
    assert found.relative_norm == pytest.approx(2 * 3**0.5 / float(Net().head.bias.norm()))
    assert found.layers == {}


def test_an_untrained_model() -> None:
    found = measure(LiveExpert(Net(), Net()), open_peers([expert(1)], Base.open(Net())), 1, History())
    assert (found.norm, found.growth, found.relative_norm) == (0.0, 0.0, 0.0)
    assert set(found.top_mass.values()) == {None}
    assert set(found.cosine.values()) == {None}
    assert found.norm_ratio is None


def test_a_base_of_zeros_has_no_relative_norm() -> None:
    """Gates, biases and other parameters that start at zero, trained alone."""
    base, model = Net(), Net()
    for net in (base, model):
        with torch.no_grad():
            net.head.bias.zero_()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "head.bias"
    live = LiveExpert(model, base)
    with torch.no_grad():
        model.head.bias += 1
    assert measure(live, [], 1, History()).relative_norm is None


def test_nan() -> None:
    model = expert(1)
    live = LiveExpert(model, Net())
    with torch.no_grad():
        model.layers[1].weight[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the model in training holds NaN .*layers\.1\.weight"):
        measure(live, [], 1, History())


def test_no_gradient_graph_is_made_and_weights_stay() -> None:
    model = expert(1)
    before = state_of(model)
    measure(LiveExpert(model, Net()), [], 1, History())
    assert all(torch.equal(before[name], value) for name, value in state_of(model).items())


def test_memory_on_the_models_device_does_not_grow_with_peers() -> None:
    """Not while measuring, beyond a few pieces of a parameter, and not afterwards."""
    model = nn.Linear(1024, 700)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    live = LiveExpert(perturb(model, 1), base)
    peer = {name: value + 0.01 for name, value in base.items()}
    peaks = {}
    for count in (1, 8, 32):
        peers = open_peers([Peer(peer, name=f"peer {index}") for index in range(count)], live.base)
        with TensorWatch() as watch:
            record = measure(live, peers, 1, History())
        assert len(record.cosine) == count
        assert watch.live == 0
        peaks[count] = watch.peak
    assert peaks[1] > 1e6  # bytes; what is counted is there
    assert peaks[32] < 1.1 * peaks[8] < 64 * 2**20
