from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.metrics.labels import distinct_labels, short_labels

labels = st.lists(st.sampled_from(["law", "law (2)", "runs/law", "old/law", "code/"]), max_size=6)


@given(given_labels=labels)
def test_none_is_another_s(given_labels: list[str]) -> None:
    found = distinct_labels(given_labels)
    assert len(set(found)) == len(given_labels)
    assert all(name.startswith(label) for name, label in zip(found, given_labels, strict=True))
    if len(set(given_labels)) == len(given_labels):
        assert found == given_labels


@pytest.mark.parametrize(
    ("labels", "short"),
    [
        (["experts/law", "experts/code/"], ["law", "code"]),
        (["org/law", "other/law"], ["org/law", "other/law"]),
        (["law", "code"], ["law", "code"]),
    ],
)
def test_labels_are_short_as_long_as_they_differ(labels: list[str], short: list[str]) -> None:
    assert short_labels(labels) == short
