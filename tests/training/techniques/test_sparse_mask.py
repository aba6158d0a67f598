"""Only the lowest scores move, under decay and momentum; a resumed run goes on with the same masks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergeready import lowest_fisher
from mergeready.errors import HistoryError, MismatchError, OptionError, UnsupportedError
from mergeready.training.techniques.sparse_mask import SparseMask
from tests.sharded import adapter
from tests.training.small import Net, equal, examples, state_of
from tests.training.techniques.drive import adamw, net, started, task_loss, train

DATA = [examples(1, 0, 16)[0]]


def run(steps: int, stop_at: int | None = None) -> dict[str, Tensor]:
    model = net()
    optimizer = adamw(model)
    chosen = started([SparseMask(batches=DATA, share=0.2)], model, Net(), optimizer=optimizer)
    if stop_at is None:
        train(chosen, model, optimizer, 1, steps)
        return state_of(model)
    train(chosen, model, optimizer, 1, stop_at)
    saved = chosen.state_dict(), chosen.tensors()
    again = net()
    again.load_state_dict(state_of(model))
    continued = adamw(again)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    chosen = started(
        [SparseMask(batches=DATA, share=0.2)], again, Net(), optimizer=continued, step=stop_at, saved=saved
    )
    train(chosen, again, continued, stop_at + 1, steps)
    return state_of(again)


def test_only_the_lowest_scores_move() -> None:
    masks = lowest_fisher(Net(), DATA, share=0.2)
    start, after = state_of(Net()), run(6)
    moved = {n: after[n] != start[n] for n in start}
    assert all(not bool((moved[n] & ~masks[n]).any()) for n in masks)  # bit for bit, though AdamW decays
    assert sum(int(m.sum()) for m in moved.values()) > 0.8 * sum(int(m.sum()) for m in masks.values())


def test_gradients_outside_are_gone_before_clipping() -> None:
    model = net()
    chosen = started([SparseMask(batches=DATA, share=0.2)], model, Net(), optimizer=adamw(model))
    for _ in chosen.passes():
        task_loss(model, 0, 0, 1).backward()
    masks = lowest_fisher(Net(), DATA, share=0.2)
    for name, parameter in model.named_parameters():
        assert not bool(parameter.grad[~masks[name]].any())
    assert any(bool(parameter.grad.any()) for parameter in model.parameters())


def test_settings_reach_the_scores() -> None:
    own = {"seed": 3, "rounds": 2, "forward": lambda model, batch: model(batch) * 0.3}
    plain = lowest_fisher(Net(), DATA, share=0.2)
    for name, value in own.items():
        model = net()
        technique = SparseMask(batches=DATA, share=0.2, **{name: value})
        found = started([technique], model, Net(), optimizer=adamw(model)).tensors()
        expected = lowest_fisher(Net(), DATA, share=0.2, **{name: value})
        assert equal({f"sparse_mask/{n}": mask for n, mask in expected.items()}, found)
        assert not equal(plain, expected)


def test_resume_is_exact() -> None:
    assert equal(run(6), run(6, stop_at=3))


def test_head_and_share() -> None:
    model = net()
    optimizer = adamw(model)
    chosen = started(
        [SparseMask(batches=DATA, share=0.1)],
        model,
        {n: t for n, t in state_of(Net()).items() if "head" not in n},
        optimizer=optimizer,
    )
    assert chosen.scalars()["sparse_mask/share"] == pytest.approx(0.1, abs=0.002)
    before = state_of(model)
    train(chosen, model, optimizer, 1, 2)
    assert bool((state_of(model)["head.weight"] != before["head.weight"]).all())  # trains freely


@pytest.mark.parametrize("kind", ["mapping", "file"])
def test_masks_that_were_made_before_are_those_that_would_be_made(tmp_path: Path, kind: str) -> None:
    made: Any = lowest_fisher(Net(), DATA, share=0.2)
    if kind == "file":
        save_file(made, tmp_path / "masks.safetensors")
        made = tmp_path / "masks.safetensors"
    model = net()
    optimizer = adamw(model)
    chosen = started([SparseMask(masks=made)], model, Net(), optimizer=optimizer)
    train(chosen, model, optimizer, 1, 6)
    assert equal(state_of(model), run(6))


def test_parameters_that_given_masks_do_not_name_are_frozen() -> None:
    model = net()
    optimizer = adamw(model)
    given = {"head.weight": torch.ones(3, 16, dtype=torch.bool)}
    train(started([SparseMask(masks=given)], model, Net(), optimizer=optimizer), model, optimizer, 1, 2)
    before = state_of(Net())
    assert {n for n, t in state_of(model).items() if not torch.equal(t, before[n])} == {"head.weight"}


def test_what_does_not_serve_is_refused() -> None:
    with pytest.raises(OptionError, match="either `batches`"):
        SparseMask()
    with pytest.raises(OptionError, match="either `batches`"):
        SparseMask(batches=DATA, masks={})
    for given in ({"head.weight": torch.ones(2, 2)}, {"other": torch.ones(2)}):
        with pytest.raises(MismatchError, match=r"not of this model: (head|none is)"):
            started([SparseMask(masks=given)], net(), Net(), optimizer=adamw(net()))
    for options in ({"share": 0.0}, {"share": 1.0}, {"rounds": 0}):
        with pytest.raises(OptionError):
            SparseMask(batches=DATA, **options)
    with pytest.raises(OptionError, match="more than once"):
        SparseMask(batches=iter(DATA))
    model = adapter(Net())
    with pytest.raises(UnsupportedError, match="not for adapters"):
        started([SparseMask(batches=DATA)], model, optimizer=adamw(model))
    model = net()
    chosen = started([SparseMask(batches=DATA)], model, Net(), optimizer=adamw(model), step=3)
    with pytest.raises(HistoryError, match="without its masks"):
        chosen.gradients_ready()
