from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from mergeready.errors import BaseMismatchError
from mergeready.experts import BaseIdentity
from mergeready.experts.identity import sample_starts
from mergeready.weights import StateDictSource, open_weights
from tests.models import TinyConvNet, tiny_bert, tiny_encoder, tiny_gpt2, tiny_llama


def identity(weights: object, label: str = "") -> BaseIdentity:
    taken = BaseIdentity.of(open_weights(weights))
    return BaseIdentity(taken.digests, label or taken.label)


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
def test_the_same_values_are_the_same_base_wherever_they_lie(make: type[nn.Module], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    sources = [model, make(), model.state_dict(), tmp_path / "one", tmp_path / "many"]
    identities = [identity(source) for source in sources]
    assert len({i.fingerprint for i in identities}) == 1
    assert all(i == identities[0] for i in identities)
    for other in identities:
        identities[0].require_same(other, "the expert")


def test_order_does_not_matter() -> None:
    state = tiny_bert().state_dict()
    assert identity(state).fingerprint == identity(dict(reversed(state.items()))).fingerprint


def test_another_initialisation_is_another_base() -> None:
    ours, theirs = identity(tiny_bert(0), "ours"), identity(tiny_bert(1), "theirs")
    assert ours.fingerprint != theirs.fingerprint
    with pytest.raises(BaseMismatchError, match=r"expert was made for another base than ours.*\(theirs\)"):
        ours.require_same(theirs, "expert")


def test_another_dtype_is_another_base() -> None:
    # Values that both dtypes hold exactly: the dtype alone must tell them apart.
    full, half = {"x": torch.ones(8, 8)}, {"x": torch.ones(8, 8).bfloat16()}
    assert identity(full).fingerprint != identity(half).fingerprint
    with pytest.raises(BaseMismatchError, match="another dtype is another base"):
        identity(full).require_same(identity(half), "expert")
    zeros = torch.zeros(8, 8)  # the same bytes in both dtypes
    assert identity({"x": zeros.half()}).fingerprint != identity({"x": zeros.bfloat16()}).fingerprint


def test_another_shape_is_another_base() -> None:
    assert identity({"x": torch.ones(8, 8)}).fingerprint != identity({"x": torch.ones(64)}).fingerprint
    with pytest.raises(BaseMismatchError, match="1 of 1 tensors differ"):
        identity({"x": torch.ones(8, 8)}).require_same(identity({"x": torch.ones(4, 16)}), "expert")


@pytest.mark.parametrize("bit", [0, 15, 31])
def test_one_bit_of_a_small_tensor_is_noticed(bit: int) -> None:
    changed = torch.ones(128)
    changed.view(torch.int32)[77] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert identity({"x": torch.ones(128)}).fingerprint != identity({"x": changed}).fingerprint


@pytest.mark.parametrize("numel", [1, 127, 128, 129, 1000, 10**6])
def test_samples_lie_inside_and_reach_both_ends(numel: int) -> None:
    starts = sample_starts(numel)
    blocks = [(start, min(start + 16, numel)) for start in starts]
    assert blocks[0][0] == 0
    assert blocks[-1][1] == numel
    assert all(0 <= start < stop <= numel for start, stop in blocks)
    if numel <= 128:
        assert [i for start, stop in blocks for i in range(start, stop)] == list(range(numel))
    else:
        assert len(starts) == 8
        gaps = {b - a for a, b in pairwise(starts)}
        assert max(gaps) - min(gaps) <= 1


def test_statistics_and_counters_do_not_count() -> None:
    model = TinyConvNet()
    before = identity(model).fingerprint
    model.train()(torch.randn(2, 3, 8, 8))
    assert identity(model).fingerprint == before
    nn.init.ones_(model.point.weight)
    assert identity(model).fingerprint != before


def test_the_message_names_what_differs() -> None:
    theirs = tiny_bert()
    with torch.no_grad():
        theirs.classifier.weight += 1
        theirs.bert.pooler.dense.bias += 1
    with pytest.raises(BaseMismatchError) as caught:
        identity(tiny_bert(), "models/base").require_same(identity(theirs, "the base of peer"), "peer")
    message = str(caught.value)
    assert "peer was made for another base than models/base: 2 of 41 tensors differ" in message
    assert "(bert.pooler.dense.bias, classifier.weight)" in message
    assert "the base of peer" in message


def test_only_the_names_that_matter_are_compared() -> None:
    theirs = tiny_bert()
    nn.init.ones_(theirs.classifier.weight)
    ours = identity(tiny_bert())
    ours.require_same(identity(theirs), "expert", ["classifier.bias", "bert.pooler.dense.weight"])
    with pytest.raises(BaseMismatchError, match=r"1 of 2 tensors differ \(classifier\.weight\)"):
        ours.require_same(identity(theirs), "expert", ["classifier.bias", "classifier.weight"])


def test_a_model_prefix_does_not_matter() -> None:
    task = tiny_bert()
    identity(task.bert).require_same(identity(task), "expert")
    identity(task).require_same(identity(task.bert), "expert")
    with pytest.raises(BaseMismatchError, match="another base"):
        identity(tiny_encoder(seed=3)).require_same(identity(task), "expert")


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(BaseMismatchError, match="shares no tensor name with ours"):
        identity({"a.b": torch.ones(1)}, "ours").require_same(identity({"c.d": torch.ones(1)}), "expert")


def test_json_round_trip() -> None:
    taken = identity(tiny_bert(), "/a/local/path")
    text = json.dumps(taken.to_json())
    assert "/a/local/path" not in text
    back = BaseIdentity.from_json(json.loads(text), "elsewhere")
    assert back == taken
    assert back.fingerprint == taken.fingerprint
    assert back.label == "elsewhere"


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "0" * 64},
        {"fingerprint": None},
        {"digests": {"x": "0" * 16}},
        {"digests": {}},
    ],
)
def test_an_altered_identity_is_refused(change: dict[str, object]) -> None:
    content = identity({"x": torch.ones(3)}).to_json() | change
    with pytest.raises(BaseMismatchError, match="in the record contradicts itself"):
        BaseIdentity.from_json(content, "the record")


@pytest.mark.parametrize("content", [{}, {"digests": None}, {"digests": ["x"], "fingerprint": ""}])
def test_what_is_no_identity_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(BaseMismatchError, match="holds no base identity"):
        BaseIdentity.from_json(content)


def test_odd_tensors_have_identities() -> None:
    odd = {
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
        "eight bits": torch.ones(4).to(torch.float8_e4m3fn),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    first = BaseIdentity.of(StateDictSource(odd))
    assert first.digests.keys() == odd.keys()
    assert first == BaseIdentity.of(StateDictSource({n: t.clone() for n, t in odd.items()}))
    odd["transposed"] = torch.arange(6.0).reshape(3, 2)
    assert first != BaseIdentity.of(StateDictSource(odd))
