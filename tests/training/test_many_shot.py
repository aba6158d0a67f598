"""Rounds against the same trainings and merges by hand; interruptions; one expert is plain training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from mergeready import many_shot, merge
from mergeready.errors import HistoryError, MismatchError, NotTrainedError, OptionError
from tests.models import tiny_bert, token_batch
from tests.training.small import Net, equal, loaded, save, state_of, train_on

TASKS = {"law": 1, "code": 2}


class Trainer:
    """Three steps of a task, from wherever it starts; may be killed at a certain call."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.kill_at = kill_at

    def __call__(self, expert: str, start: Path, round_: int) -> Mapping[str, Tensor]:
        self.calls.append((expert, round_))
        if len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        model = loaded(load_file(start / "model.safetensors"))
        steps(model, TASKS[expert], round_)
        return state_of(model)


def steps(model: Net, task: int, round_: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train_on(model, optimizer, task, 3 * round_ - 2, 3 * round_)


def merged_state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(Net(), tmp_path / "base")


def test_rounds_by_hand(base: Path, tmp_path: Path) -> None:
    found = many_shot(base, list(TASKS), Trainer(), tmp_path / "out", rounds=3, scale=0.4)
    start = Net().eval()
    for round_ in (1, 2, 3):
        experts = []
        for task in TASKS.values():
            experts.append(copy.deepcopy(start))
            steps(experts[-1], task, round_)
        start = merge(start, experts, "task_arithmetic", scale=0.4)
    for name, tensor in state_of(start).items():
        torch.testing.assert_close(merged_state(found.merged)[name], tensor, rtol=1e-6, atol=1e-7)
    assert found.merged == tmp_path / "out" / "round-3" / "merged"
    assert equal(merged_state(found.experts["law"]), state_of(experts[0]))


def test_one_expert_is_plain_training_bit_for_bit(base: Path, tmp_path: Path) -> None:
    found = many_shot(base, ["law"], Trainer(), tmp_path / "out", rounds=3)
    plain = Net()
    for round_ in (1, 2, 3):
        steps(plain, 1, round_)
    assert equal(merged_state(found.merged), state_of(plain))


@pytest.mark.parametrize("kill_at", [1, 2, 4, 6])
def test_it_goes_on_where_it_was_killed(base: Path, tmp_path: Path, kill_at: int) -> None:
    whole = many_shot(base, list(TASKS), Trainer(), tmp_path / "whole", rounds=3)
    killed = Trainer(kill_at)
    with pytest.raises(KeyboardInterrupt):
        many_shot(base, list(TASKS), killed, tmp_path / "out", rounds=3)
    again = Trainer()
    found = many_shot(base, list(TASKS), again, tmp_path / "out", rounds=3)
    assert killed.calls[:-1] + again.calls == [(n, r) for r in (1, 2, 3) for n in TASKS]
    assert equal(merged_state(found.merged), merged_state(whole.merged))
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_kill_while_a_result_is_written_leaves_none(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mergeready.training.many_shot.copy_companions", dies)
        with pytest.raises(KeyboardInterrupt):
            many_shot(base, list(TASKS), Trainer(), tmp_path / "out", rounds=1)
    assert not (tmp_path / "out" / "round-1" / "law").exists()
    many_shot(base, list(TASKS), again := Trainer(), tmp_path / "out", rounds=1)
    assert again.calls == [("law", 1), ("code", 1)]


def test_more_rounds_go_on_from_fewer(base: Path, tmp_path: Path) -> None:
    many_shot(base, list(TASKS), Trainer(), tmp_path / "out", rounds=1)
    found = many_shot(base, list(TASKS), more := Trainer(), tmp_path / "out", rounds=2)
    assert more.calls == [("law", 2), ("code", 2)]
    whole = many_shot(base, list(TASKS), Trainer(), tmp_path / "whole", rounds=2)
    assert equal(merged_state(found.merged), merged_state(whole.merged))


def test_adapters_are_merged_into_the_start_of_the_next_round(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")

    def train(expert: str, start: Path, round_: int) -> Path:
        model = tiny_bert()
        model.load_state_dict(load_file(start / "model.safetensors"))
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(2):
            optimizer.zero_grad()
            model(**token_batch(10 * round_ + step), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
            optimizer.step()
        model.save_pretrained(tmp_path / "run" / expert / str(round_))
        return tmp_path / "run" / expert / str(round_)

    found = many_shot(tmp_path / "base", ["a", "b"], train, tmp_path / "out", rounds=2, method="ties")
    first, last = merged_state(tmp_path / "base"), merged_state(found.merged)
    changed = [name for name in first if not torch.equal(first[name], last[name])]
    assert len(changed) == 2
    assert all("query.weight" in name for name in changed)
    assert (found.merged / "config.json").is_file()
    assert (found.experts["a"] / "adapter_config.json").is_file()


def test_other_settings_in_the_same_folder_are_refused(base: Path, tmp_path: Path) -> None:
    many_shot(base, list(TASKS), Trainer(), tmp_path / "out", rounds=1)
    with pytest.raises(HistoryError, match="scale changed"):
        many_shot(base, list(TASKS), Trainer(), tmp_path / "out", rounds=1, scale=0.9)
    with pytest.raises(HistoryError, match="method"):
        many_shot(base, list(TASKS), Trainer(), tmp_path / "out", rounds=1, method="ties")


def test_results_that_are_none_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(NotTrainedError, match="round 1 of law changed nothing"):
        many_shot(base, ["law"], lambda *_: base, tmp_path / "a")
    with pytest.raises(OptionError, match="returned a NoneType for law"):
        many_shot(base, ["law"], lambda *_: None, tmp_path / "b")  # type: ignore[arg-type,return-value]
    with pytest.raises(MismatchError):
        many_shot(base, ["law"], lambda *_: {"head.weight": torch.ones(2, 2)}, tmp_path / "c")


def test_arguments_that_do_not_serve_are_refused_together(base: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"a/b, merged.*one name.*`rounds`.*`weights` has 1"):
        many_shot(base, ["a/b", "merged", "x", "x"], Trainer(), tmp_path / "o", rounds=0, weights=[1.0])
    with pytest.raises(OptionError, match="`experts` is empty"):
        many_shot(base, [], Trainer(), tmp_path / "o")
    assert not (tmp_path / "o").exists()
