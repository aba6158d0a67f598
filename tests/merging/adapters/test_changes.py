"""What each parameter becomes, against changes worked out by hand from what PEFT saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergeready.errors import UnsupportedError
from mergeready.experts import Base, dense, open_expert
from mergeready.experts.adapter import AdapterTaskVector
from mergeready.merging.adapters.changes import Changes, linear_factors, merged_changes
from mergeready.merging.average import Average
from mergeready.merging.settings import MergeSettings
from mergeready.merging.task_arithmetic import TaskArithmetic
from mergeready.merging.ties import Ties
from tests.merging.worlds import adapted
from tests.models import tiny_bert

BERT = tiny_bert()
BASE = Base.open(BERT)
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
WORDS = "bert.embeddings.word_embeddings.weight"


def vector(folder: Path, seed: int, **options: Any) -> AdapterTaskVector:
    adapted(BERT, seed, **options).save_pretrained(folder / str(seed), save_embedding_layers=False)
    opened = open_expert(folder / str(seed), BASE).vector
    assert isinstance(opened, AdapterTaskVector)
    return opened


def changes(vectors: list[AdapterTaskVector], absent: Any = "unchanged", **settings: Any) -> Changes:
    method = settings.pop("method", "task_arithmetic")
    made = MergeSettings.make(method, len(vectors), **settings)
    return merged_changes(BASE, vectors, made, "exact", absent)


def test_only_weighted_sums_are_linear() -> None:
    assert linear_factors(TaskArithmetic(), [2.0, -1.0]) == [2.0, -1.0]
    assert linear_factors(Average(), [2.0, 6.0]) == [0.25, 0.75]
    assert linear_factors(Average(), [1.0, -1.0]) == [0.0, 0.0]  # as the method itself has it
    assert linear_factors(Ties(), [1.0, 1.0]) is None


@pytest.mark.parametrize(("absent", "factor"), [("unchanged", 0.25), ("left_out", 1.0)])
def test_an_expert_without_a_parameter(absent: str, factor: float, tmp_path: Path) -> None:
    a = vector(tmp_path, 1, target_modules=["query", "value"])
    b = vector(tmp_path, 2, target_modules=["value"])
    found = changes([a, b], absent, method="average", weights=[1.0, 3.0], scale=2.0)
    value = QUERY.replace("query", "value")
    for name, expected in (
        (QUERY, 2 * factor * dense(a[QUERY]).double()),
        (value, 2 * (0.25 * dense(a[value]).double() + 0.75 * dense(b[value]).double())),
    ):
        delta = found.factors[name].delta
        torch.testing.assert_close(delta.B.double() @ delta.A.double(), expected, rtol=1e-5, atol=1e-7)
    assert list(found.factors) == [name for name in BASE.source.infos if name in a]  # in the base's order
    assert found.modules[QUERY] == QUERY.removesuffix(".weight")


def test_trained_rows(tmp_path: Path) -> None:
    a = vector(tmp_path, 1, target_modules=["query"], trainable_token_indices={"word_embeddings": [3, 7]})
    b = vector(tmp_path, 2, target_modules=["query"], trainable_token_indices={"word_embeddings": [7, 9]})
    index, values = changes([a, b], weights=[1.0, 0.5]).rows[WORDS]
    assert index.tolist() == [3, 7, 9]
    whole = BASE.source.read(WORDS) + dense(a[WORDS]) + 0.5 * dense(b[WORDS])
    torch.testing.assert_close(values, whole[index], rtol=1e-6, atol=1e-7)


def test_everything_that_has_no_form_is_listed(tmp_path: Path) -> None:
    rows = vector(tmp_path, 1, target_modules=["query"], trainable_token_indices={"word_embeddings": [3]})
    factors = vector(tmp_path, 2, target_modules=["word_embeddings"])
    with pytest.raises(UnsupportedError) as caught:
        changes([rows, factors], method="ties")
    said = str(caught.value)
    assert f"{WORDS}: trained rows and other changes of one embedding can only be folded" in said
    assert f"{QUERY}: ties gives changes of full rank: choose `rank`" in said


def test_modules_are_called_as_the_base_calls_them_where_adapters_disagree(tmp_path: Path) -> None:
    a, b = (vector(tmp_path, seed, target_modules=["query"]) for seed in (1, 2))
    inner = QUERY.removeprefix("bert.").removesuffix(".weight")
    for one in (a, b):
        one.slots = {
            name: type(slot)(slot.module.removeprefix("bert."), slot.kind) for name, slot in one.slots.items()
        }
    assert changes([a, b]).modules[QUERY] == inner  # as both were trained
    c = vector(tmp_path, 3, target_modules=["query"])
    assert changes([a, c]).modules[QUERY] == f"bert.{inner}"
