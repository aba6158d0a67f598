from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import BaseMismatchError, OptionError
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.record import read_record, recorded_base
from mergeready.training.history import History
from mergeready.training.picks import Picks, PickStore, pareto_steps
from tests.training.histories import curves, metrics, probe, start

BASE = BaseIdentity({"weight": "0" * 16}, "the base")


class TestSelect:
    def test_one_method(self) -> None:
        history = curves(expert=[0.1, 0.3, 0.2], ties=[0.3, 0.1, 0.2])
        assert Picks().select(history) == {"expert-best": 20, "merge-best": 10}

    def test_smaller_is_better(self) -> None:
        history = curves(greater=False, expert=[0.1, 0.3, 0.2], ties=[0.3, 0.1, 0.2])
        assert Picks().select(history) == {"expert-best": 10, "merge-best": 20}

    def test_several_methods_have_a_pick_each(self) -> None:
        history = curves(ties=[0.3, 0.1, 0.2], average=[0.1, 0.2, 0.3])
        assert Picks(expert_best=False).select(history) == {"merge-best:ties": 10, "merge-best:average": 30}

    @pytest.mark.parametrize("greater", [True, False])
    def test_ties_go_to_the_earliest(self, greater: bool) -> None:
        history = curves(greater=greater, expert=[0.4, 0.4, 0.4], ties=[0.4, 0.4, 0.4])
        assert Picks(pareto=3).select(history) == {"expert-best": 10, "merge-best": 10, "pareto-1": 10}

    def test_what_is_not_wanted_is_not_picked(self) -> None:
        assert Picks(expert_best=False, merge_best=False).select(curves(ties=[0.1])) == {}

    @pytest.mark.parametrize("history", [History(), History([start("ties"), metrics(1, 1.0)])])
    def test_without_probes_there_is_nothing(self, history: History) -> None:
        assert Picks(pareto=2).select(history) == {}

    def test_pareto_best_merged_first(self) -> None:
        #                      10   20   30   40   50
        history = curves(expert=[0.1, 0.5, 0.4, 0.9, 0.6], ties=[0.9, 0.8, 0.7, 0.2, 0.1])
        found = Picks(expert_best=False, merge_best=False, pareto=9).select(history)
        assert found == {"pareto-1": 10, "pareto-2": 20, "pareto-3": 40}
        assert Picks(expert_best=False, merge_best=False, pareto=2).select(history) == {
            "pareto-1": 10,
            "pareto-2": 20,
        }

    def test_pareto_takes_only_what_is_available(self) -> None:
        history = curves(expert=[0.1, 0.5, 0.4, 0.9], ties=[0.9, 0.8, 0.7, 0.2])
        found = Picks(expert_best=False, merge_best=False, pareto=2).select(history, available=[20, 30, 40])
        assert found == {"pareto-1": 20, "pareto-2": 40}

    def test_pareto_follows_the_leading_method(self) -> None:
        history = curves(expert=[0.1, 0.2], average=[0.1, 0.2], ties=[0.9, 0.1])
        assert history.methods == ["average", "ties"]
        assert Picks(expert_best=False, merge_best=False, pareto=5).select(history) == {"pareto-1": 20}

    def test_merges_with_other_peers_are_not_compared(self) -> None:
        """Resumed with a peer, where merges had been with surrogates; the expert is what it is."""
        first = [probe(10, 0.9, surrogate=True, ties=0.9), probe(20, 0.8, surrogate=True, ties=0.8)]
        peers = replace(start("ties", step=20), peers={"law": 1.0})
        begun = [replace(start("ties"), surrogate=True), *first, peers]
        assert Picks(pareto=2).select(History(begun)) == {"expert-best": 10, "merge-best": 10, "pareto-1": 10}
        found = Picks(pareto=2).select(History([*begun, probe(30, 0.5, ties=0.4), probe(40, 0.5, ties=0.5)]))
        assert found == {"expert-best": 10, "merge-best": 40, "pareto-1": 40}

    def test_range(self) -> None:
        with pytest.raises(OptionError, match="`pareto` must not be negative, not -1"):
            Picks(pareto=-1)


POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=10)


@given(points=POINTS, greater=st.booleans())
def test_pareto_against_brute_force(points: list[tuple[int, int]], greater: bool) -> None:
    """Kept: whatever no other step dominates, and of equal steps the earliest."""
    history = curves(greater=greater, expert=[p[0] for p in points], ties=[p[1] for p in points])
    sign = 1 if greater else -1
    signed = [(sign * expert, sign * merged) for expert, merged in points]

    def beats(j: int, i: int) -> bool:
        at_least = all(a >= b for a, b in zip(signed[j], signed[i], strict=True))
        return at_least and (signed[j] != signed[i] or j < i)

    kept = [i for i in range(len(points)) if not any(beats(j, i) for j in range(len(points)) if j != i)]
    kept.sort(key=lambda i: -signed[i][1])
    assert pareto_steps(history, "ties") == [10 * (i + 1) for i in kept]


@given(points=POINTS)
def test_selection_at_a_step_does_not_depend_on_what_comes_later(points: list[tuple[int, int]]) -> None:
    history = curves(expert=[p[0] for p in points], ties=[p[1] for p in points])
    for count in range(1, len(points) + 1):
        short = curves(expert=[p[0] for p in points[:count]], ties=[p[1] for p in points[:count]])
        assert Picks(pareto=3).select(History(history[: count + 1])) == Picks(pareto=3).select(short)


class Model:
    """What is saved: the step that the model was at."""

    def __init__(self) -> None:
        self.step = 0
        self.word: str | None = None
        self.fails = False

    def save(self, folder: Path) -> None:
        (folder / "step.txt").write_text(self.word or str(self.step))
        if self.fails:
            raise OSError("disk full")


class Store(PickStore):
    """A store that is told the newest probe's metrics, as a run would."""

    def __init__(self, folder: Path, picks: Picks | None = None) -> None:
        self.model = Model()
        self.history = History([start("ties")])
        super().__init__(folder / "picks", picks or Picks(), self.model.save, BASE)

    def probe(self, step: int, expert: float, merged: float) -> None:
        self.model.step = step
        self.history.append(probe(step, expert, ties=merged))
        self.update(self.history)

    @property
    def index(self) -> dict[str, dict[str, object]]:
        return json.loads((self.folder / "picks.json").read_text())

    def content(self) -> dict[int, str]:
        return {step: (self.path(step) / "step.txt").read_text() for step in self.saved()}


def test_a_picked_step_is_saved_with_its_base_and_its_reason(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.probe(7, 0.25, 0.5)
    assert store.content() == {7: "7"}
    assert store.path(7).name == "step-000007"
    assert recorded_base(store.path(7)) == BASE
    record = read_record(store.path(7))
    assert record is not None
    assert record["step"] == 7
    assert store.index["merge-best"] == {
        "step": 7,
        "folder": "step-000007",
        "expert": {"value": 0.25, "n": None, "low": None, "high": None},
        "merged": {"ties": 0.5},
        "surrogate": False,
        "resolution": None,
    }


def test_the_record_of_a_pick_refuses_another_base(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.probe(7, 0.25, 0.5)
    recorded = recorded_base(store.path(7))
    assert recorded is not None
    with pytest.raises(BaseMismatchError):
        BaseIdentity({"weight": "1" * 16}, "another").require_same(recorded, "the pick")


def test_what_is_not_picked_is_not_saved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.probe(1, 0.5, 0.5)
    store.probe(2, 0.4, 0.4)
    store.probe(3, 0.6, 0.3)
    assert store.content() == {1: "1", 3: "3"}
    assert {label: pick["step"] for label, pick in store.index.items()} == {"expert-best": 3, "merge-best": 1}


def test_nothing_goes_before_prune(tmp_path: Path) -> None:
    """The last saved state may still refer to a pick that the run has bettered since."""
    store = Store(tmp_path)
    for step in range(1, 6):
        store.probe(step, step / 10, step / 10)
        assert store.saved() == list(range(1, step + 1))
    store.prune(store.history)
    assert store.content() == {5: "5"}


@given(
    points=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=10),
    killed=st.integers(0, 9),
)
def test_a_killed_and_resumed_run_keeps_the_same_picks(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[int, int, bool]], killed: int
) -> None:
    """Probes, with the framework's saves between them; killed anywhere and resumed from the last save."""
    picks = Picks(pareto=2)

    def go_on(store: Store, first: int, last: int) -> int:
        saved = first
        for step in range(first + 1, last + 1):
            expert, merged, save = points[step - 1]
            store.probe(step, expert, merged)
            if save:
                store.prune(store.history)
                saved = step
        return saved

    whole = Store(tmp_path_factory.mktemp("whole"), picks)
    go_on(whole, 0, len(points))
    folder = tmp_path_factory.mktemp("killed")
    broken = Store(folder, picks)
    at = go_on(broken, 0, min(killed, len(points)))
    resumed = Store(folder, picks)
    for step in range(1, at + 1):
        resumed.history.append(broken.history[step])
    go_on(resumed, at, len(points))
    for store in (whole, resumed):
        store.prune(store.history)
    assert resumed.content() == whole.content()
    assert resumed.index == whole.index
    assert all(pick["folder"] is not None for pick in resumed.index.values())


def test_a_save_that_fails_leaves_the_old_picks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.probe(1, 0.5, 0.5)
    store.probe(2, 0.4, 0.6)
    before = store.index, store.content()
    store.model.fails = True
    with pytest.raises(OSError, match="disk full"):
        store.probe(3, 0.9, 0.9)
    assert (store.index, store.content()) == before
    assert {path.name for path in store.folder.iterdir()} == {"picks.json", "step-000001", "step-000002"}


def test_a_failed_save_again_leaves_the_same_step_of_before(tmp_path: Path) -> None:
    """A resumed run comes by the same step again, and its disk is full now."""
    store = Store(tmp_path)
    store.probe(1, 0.5, 0.5)
    again = Store(tmp_path)
    again.model.fails = True
    with pytest.raises(OSError, match="disk full"):
        again.probe(1, 0.5, 0.5)
    assert again.content() == {1: "1"}


def test_a_step_that_went_another_way_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.probe(1, 0.5, 0.5)
    again = Store(tmp_path)
    again.model.word = "another"
    again.probe(1, 0.5, 0.5)
    assert again.content() == {1: "another"}


def test_leftovers_of_a_step_that_is_not_picked_any_more_are_not_taken_for_it(tmp_path: Path) -> None:
    """A step may become a Pareto pick later; weights of a run that went another way must not stand in for it."""
    picks = Picks(expert_best=False, merge_best=False, pareto=1)
    first = Store(tmp_path, picks)
    first.probe(1, 0.5, 0.5)
    first.probe(2, 0.6, 0.6)  # picked here, and killed before the next save
    second = Store(tmp_path, picks)
    second.probe(1, 0.5, 0.5)
    second.probe(2, 0.9, 0.2)  # another way: on the front, but second to step 1
    assert second.saved() == [1]


def test_a_pick_whose_weights_are_gone_is_shown_without_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.history.append(probe(1, 0.9, ties=0.9))  # an earlier run without picks
    store.probe(2, 0.1, 0.1)
    assert {pick["folder"] for pick in store.index.values()} == {None}
    assert store.saved() == []


def test_the_index_follows_what_prune_leaves(tmp_path: Path) -> None:
    """Resumed from before a pick and finished without another probe: the index must not name what is gone."""
    store = Store(tmp_path)
    store.probe(1, 0.5, 0.5)
    store.probe(2, 0.6, 0.6)
    store.prune(History(store.history[:2]))
    assert store.saved() == [1]
    assert {pick["folder"] for pick in store.index.values()} == {"step-000001"}
