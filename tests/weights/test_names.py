from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.weights.names import match_names
from tests.models import tiny_bert, tiny_encoder

parts = st.sampled_from(["encoder", "layer", "0", "1", "weight", "bias", "bert", "head"])
names = st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), unique=True, max_size=8)


@given(names=names)
def test_equal_names_are_never_renamed(names: list[str]) -> None:
    match = match_names(names, names)
    assert match.to_base == {name: name for name in names}
    assert match.extra == match.missing == ()


@given(names=names.filter(bool))
def test_a_prefix_on_either_side_is_understood(names: list[str]) -> None:
    longer = [f"model.{name}" for name in names]
    assert match_names(longer, names).to_base == dict(zip(longer, names, strict=True))
    assert match_names(names, longer).to_base == dict(zip(names, longer, strict=True))


@given(own=names, base=names)
def test_every_name_is_accounted_for_once(own: list[str], base: list[str]) -> None:
    match = match_names(own, base)
    assert sorted([*match.to_base, *match.extra]) == sorted(own)
    assert sorted([*set(match.to_base.values()), *match.missing]) == sorted(base)


def test_a_task_model_and_its_encoder() -> None:
    task, encoder = list(tiny_bert().state_dict()), list(tiny_encoder().state_dict())
    match = match_names(task, encoder)
    assert match.extra == ("classifier.weight", "classifier.bias")
    assert match.missing == ()
    assert all(own == f"bert.{base}" for own, base in match.to_base.items())
    back = match_names(encoder, task)
    assert back.missing == ("classifier.weight", "classifier.bias")
    assert back.extra == ()
    assert all(base == f"bert.{own}" for own, base in back.to_base.items())


def test_the_prefix_that_pairs_most_names_wins() -> None:
    own = ["a.x", "a.y", "b.x"]
    assert match_names(own, ["x", "y"]).to_base["a.y"] == "y"
    assert match_names(["a.x", "b.x", "b.y"], ["x", "y"]).to_base["b.y"] == "y"


def test_tied_names_pair_under_any_of_their_names() -> None:
    own_alias = match_names(["emb"], ["head"], aliases={"head": "emb"})
    assert own_alias.to_base == {"emb": "head"}
    base_alias = match_names(["head"], ["emb"], base_aliases={"head": "emb"})
    assert base_alias.to_base == {"head": "emb"}
    assert base_alias.missing == ()
    both = match_names(
        ["m.emb", "m.x"], ["out", "x"], aliases={"m.head": "m.emb"}, base_aliases={"head": "out"}
    )
    assert both.to_base == {"m.emb": "out", "m.x": "x"}


@pytest.mark.parametrize(("own", "base"), [([], ["a"]), (["a"], []), ([], []), (["a.b"], ["c.d"])])
def test_nothing_in_common(own: list[str], base: list[str]) -> None:
    match = match_names(own, base)
    assert (match.to_base, match.extra, match.missing) == ({}, tuple(own), tuple(base))
