from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeready.errors import HistoryError
from mergeready.training.history import History, HistoryFile, read_history
from mergeready.training.records import DecisionRecord, Record, StartRecord
from tests.training.histories import RECORDS, curves, metrics, probe, start

NAME = "history.jsonl"
LOST = "history.superseded.jsonl"
RUN: list[Record] = [
    start("ties", "average"),
    metrics(1, 0.1),
    probe(1, 0.5, ties=0.4, average=1 / 3),
    metrics(2, 0.2),
    probe(2, 0.6, ties=0.5, average=0.3),
    DecisionRecord(step=2, reason="‖τ‖ is beyond 1; “enough”", acted=True),
]


def sort_keys(content: object) -> object:
    """What a framework does that saves its state with sorted keys."""
    return json.loads(json.dumps(content, sort_keys=True))


def write(folder: Path, records: list[Record], known: int = 0) -> HistoryFile:
    """A history file that is opened with some records and appended the others."""
    history = HistoryFile(folder / NAME, records[:known])
    for record in records[known:]:
        history.append(record)
    return history


class TestHistory:
    def test_it_is_a_sequence(self) -> None:
        history = History(RUN)
        assert len(history) == 6
        assert history[2] == RUN[2]
        assert history[-2:] == RUN[-2:]
        assert list(history) == RUN

    def test_its_views(self) -> None:
        history = History(RUN)
        assert history.start == RUN[0]
        assert history.metrics == [RUN[1], RUN[3]]
        assert history.probes == [RUN[2], RUN[4]]
        assert history.decisions == [RUN[5]]
        assert history.expert() == [(1, 0.5), (2, 0.6)]
        assert history.merged("ties") == [(1, 0.4), (2, 0.5)]
        assert history.merged("dare") == []

    def test_an_empty_one(self) -> None:
        history = History()
        assert (history.start, history.probes, history.methods, history.sign) == (None, [], [], 1.0)

    def test_sign_is_that_of_the_newest_start(self) -> None:
        assert History([start("ties", greater=False)]).sign == -1.0
        assert History([start("ties", greater=False), start("ties", step=3)]).sign == 1.0

    def test_a_copy_does_not_grow(self) -> None:
        given = list(RUN[:1])
        history = History(given)
        history.append(RUN[1])
        assert len(given) == 1

    def test_time_runs_forwards(self) -> None:
        history = History([metrics(5, 1.0)])
        history.append(probe(5, 0.5, ties=0.5))
        with pytest.raises(HistoryError, match="step 4 cannot follow step 5"):
            history.append(metrics(4, 1.0))
        assert len(history) == 2

    def test_methods_in_the_order_in_which_they_were_named(self) -> None:
        order = ["ties", "average", "dare", "breadcrumbs"]
        history = curves(**{method: [0.5] for method in order})
        assert history.methods == order
        assert History.from_json(sort_keys(history.to_json())).methods == order

    def test_methods_that_were_never_probed_are_not_listed(self) -> None:
        assert History([start("ties", "average"), probe(1, 0.5, average=0.5)]).methods == ["average"]

    def test_methods_of_a_resumed_run_come_after_the_earlier_ones(self) -> None:
        records = [start("ties"), probe(1, 0.5, ties=0.5), start("average", "ties", step=1)]
        assert History([*records, probe(2, 0.5, average=0.5, ties=0.5)]).methods == ["ties", "average"]

    def test_the_json_form_grows_with_it(self) -> None:
        history = History(RUN[:2])
        content = history.to_json()
        history.append(RUN[2])
        assert content is history.to_json()
        assert len(content) == 3
        assert list(History.from_json(content)) == RUN[:3]

    @pytest.mark.parametrize("content", [[{"kind": "epoch"}], [3], ["text"], [None]])
    def test_what_is_no_record_is_named(self, content: list[object]) -> None:
        with pytest.raises(HistoryError, match="the checkpoint holds a record that cannot be understood"):
            History.from_json(content, "the checkpoint")


@given(
    records=st.lists(st.one_of(*RECORDS.values()), max_size=5).map(lambda r: sorted(r, key=lambda x: x.step))
)
def test_a_history_survives_json_with_sorted_keys_and_the_disk(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> None:
    history = History(records)
    back = History.from_json(sort_keys(history.to_json()))
    assert list(back) == records
    assert back.methods == history.methods
    folder = tmp_path_factory.mktemp("run")
    write(folder, records)
    if records:
        assert list(read_history(folder / NAME)) == records


class TestFile:
    def test_one_line_a_record_at_once(self, tmp_path: Path) -> None:
        history = HistoryFile(tmp_path / "new" / NAME)
        assert not (tmp_path / "new").exists()
        for count, record in enumerate(RUN, 1):
            history.append(record)
            lines = (tmp_path / "new" / NAME).read_text().splitlines()
            assert len(lines) == count
        assert [json.loads(line)["kind"] for line in lines] == [record.kind for record in RUN]
        assert list(read_history(tmp_path / "new" / NAME)) == RUN

    def test_it_is_only_appended_to(self, tmp_path: Path) -> None:
        history = write(tmp_path, RUN[:3])
        before = (tmp_path / NAME).read_bytes()
        history.append(RUN[3])
        assert (tmp_path / NAME).read_bytes().startswith(before)

    def test_a_record_out_of_order_is_not_written(self, tmp_path: Path) -> None:
        history = write(tmp_path, RUN)
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(HistoryError):
            history.append(metrics(1, 1.0))
        assert (tmp_path / NAME).read_bytes() == before

    @pytest.mark.parametrize("known", range(len(RUN) + 1))
    def test_rewinding_moves_what_comes_after(self, tmp_path: Path, known: int) -> None:
        """The file equals what is known again, and no line is lost."""
        write(tmp_path, RUN)
        whole = (tmp_path / NAME).read_bytes().splitlines(keepends=True)
        HistoryFile(tmp_path / NAME, RUN[:known])
        assert (tmp_path / NAME).read_bytes().splitlines(keepends=True) == whole[:known]
        lost = (tmp_path / LOST).read_bytes() if (tmp_path / LOST).exists() else b""
        assert lost.splitlines(keepends=True) == whole[known:]

    @pytest.mark.parametrize("known", range(len(RUN) + 1))
    def test_going_on_gives_the_same_bytes(self, tmp_path: Path, known: int) -> None:
        write(tmp_path, RUN)
        whole = (tmp_path / NAME).read_bytes()
        state = sort_keys(History(RUN[:known]).to_json())
        history = HistoryFile(tmp_path / NAME, list(History.from_json(state)))
        for record in RUN[known:]:
            history.append(record)
        assert (tmp_path / NAME).read_bytes() == whole

    def test_what_was_superseded_twice_is_kept_twice(self, tmp_path: Path) -> None:
        write(tmp_path, RUN)
        write(tmp_path, RUN, known=4)
        HistoryFile(tmp_path / NAME, RUN[:2])
        kinds = [json.loads(line)["kind"] for line in (tmp_path / LOST).read_text().splitlines()]
        assert kinds == [record.kind for record in [*RUN[4:], *RUN[2:]]]

    def test_a_history_that_went_another_way_is_moved_from_where_it_parts(self, tmp_path: Path) -> None:
        write(tmp_path, [*RUN[:2], probe(1, 0.9, ties=0.9)])
        HistoryFile(tmp_path / NAME, RUN[:3])
        assert list(read_history(tmp_path / NAME)) == RUN[:3]
        assert list(read_history(tmp_path / LOST)) == [probe(1, 0.9, ties=0.9)]

    def test_a_cut_last_line_is_repaired(self, tmp_path: Path) -> None:
        write(tmp_path, RUN)
        whole = (tmp_path / NAME).read_bytes()
        (tmp_path / NAME).write_bytes(whole[:-20])
        write(tmp_path, RUN, known=5)
        assert (tmp_path / NAME).read_bytes() == whole
        assert (tmp_path / LOST).read_bytes().endswith(b"\n")

    def test_a_file_that_is_gone_is_made_again(self, tmp_path: Path) -> None:
        HistoryFile(tmp_path / "elsewhere" / NAME, RUN)
        assert list(read_history(tmp_path / "elsewhere" / NAME)) == RUN
        assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [NAME]

    def test_nothing_to_rewind_touches_nothing(self, tmp_path: Path) -> None:
        write(tmp_path, RUN)
        before = (tmp_path / NAME).stat()
        HistoryFile(tmp_path / NAME, RUN)
        after = (tmp_path / NAME).stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        assert not (tmp_path / LOST).exists()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_no_file_with_numbers_that_json_does_not_have(self, tmp_path: Path, value: float) -> None:
        write(tmp_path, RUN[:2])
        before = (tmp_path / NAME).read_bytes()
        with pytest.raises(ValueError, match="JSON compliant"):
            HistoryFile(tmp_path / NAME, RUN[:2]).append(metrics(3, value))
        assert (tmp_path / NAME).read_bytes() == before


class TestRead:
    @pytest.mark.parametrize("cut", [1, 2, 30])
    def test_a_last_line_that_was_cut_is_left_out(self, tmp_path: Path, cut: int) -> None:
        write(tmp_path, RUN)
        content = (tmp_path / NAME).read_bytes()
        (tmp_path / NAME).write_bytes(content[:-cut])
        assert list(read_history(tmp_path / NAME)) == RUN[:-1]

    def test_a_broken_line_in_the_middle_is_named(self, tmp_path: Path) -> None:
        write(tmp_path, RUN)
        lines = (tmp_path / NAME).read_text().splitlines()
        lines[2] = lines[2][:-5]
        (tmp_path / NAME).write_text("\n".join(lines) + "\n")
        with pytest.raises(HistoryError, match=rf"line 3 of .*{NAME} is not JSON"):
            read_history(tmp_path / NAME)

    def test_a_line_that_is_no_record_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / NAME).write_text('{"kind": "epoch", "step": 1}\n')
        with pytest.raises(HistoryError, match=rf"{NAME} holds a record that cannot be understood"):
            read_history(tmp_path / NAME)

    def test_an_empty_file_is_an_empty_history(self, tmp_path: Path) -> None:
        (tmp_path / NAME).touch()
        assert list(read_history(tmp_path / NAME)) == []

    def test_a_line_that_was_written_by_hand_may_be_spaced(self, tmp_path: Path) -> None:
        (tmp_path / NAME).write_text('{ "step": 4, "kind": "start", "base": "x" }\n')
        assert list(read_history(tmp_path / NAME)) == [StartRecord(step=4, base="x")]
