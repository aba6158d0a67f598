"""A disk that is full, by a limit on the size of files: what was there stays, nothing half-written takes a name."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn

from mergeready import (
    MergeReadyLoop,
    Picks,
    Probe,
    Schedule,
    merge,
    merge_adapters,
    open_expert,
    read_history,
)
from mergeready.experts import Base
from mergeready.merging.information import Collected
from mergeready.metrics.take_fingerprint import take_fingerprint
from mergeready.validation.page import write_page
from mergeready.validation.run import validate
from mergeready.weights.model_card import update_card
from tests.models import perturb, tiny_bert


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond so many bytes of a file fails with an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    """All visible files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_bert().save_pretrained(folder / "base")
    perturb(tiny_bert(), 1).save_pretrained(folder / "law")
    return folder


def merged(world: Path, out: Path) -> Callable[[], object]:
    return lambda: merge(world / "base", [world / "law"], output=out / "merged", overwrite=True)


def fingerprinted(world: Path, out: Path) -> Callable[[], object]:
    base = Base.open(world / "base")
    made = take_fingerprint(open_expert(world / "law", base).vector, base)
    return lambda: made.save(out / "law.fingerprint.safetensors")


def adapted(world: Path, out: Path) -> Callable[[], object]:
    model = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    perturb(model, 1).save_pretrained(world / "adapter")
    return lambda: merge_adapters(world / "base", [world / "adapter"], out / "merged", overwrite=True)


def informed(world: Path, out: Path) -> Callable[[], object]:
    made = Collected(tiny_bert().state_dict(), "fisher")
    return lambda: made.save(out / "law.fisher.safetensors")


def reported(world: Path, out: Path) -> Callable[[], object]:
    report = validate(world / "law", world / "base")
    return lambda: write_page(out / "report.html", report, None)


def carded(world: Path, out: Path) -> Callable[[], object]:
    section = "A long text. " * 1000
    return lambda: update_card(out, {"tags": ["merge"]}, section)


WRITERS = {
    "merge": merged,
    "adapter": adapted,
    "fingerprint": fingerprinted,
    "information": informed,
    "report": reported,
    "card": carded,
}


@pytest.mark.parametrize("size", [0, 1, 4096])
@pytest.mark.parametrize("name", WRITERS)
def test_what_was_there_stays(world: Path, tmp_path: Path, name: str, size: int) -> None:
    write = WRITERS[name](world, tmp_path)
    write()
    before = contents(tmp_path)
    assert before
    if name == "card":
        (tmp_path / "README.md").write_text("# Mine\n", encoding="utf-8")
        before = contents(tmp_path)
    with largest_file(size), pytest.raises(OSError, match="File too large"):
        write()
    assert contents(tmp_path) == before
    write()  # and with space again, all is well


@pytest.mark.parametrize("name", WRITERS)
def test_nothing_half_written_takes_a_name(world: Path, tmp_path: Path, name: str) -> None:
    write = WRITERS[name](world, tmp_path)
    with largest_file(64), pytest.raises(OSError, match="File too large"):
        write()
    assert contents(tmp_path) == {}


def train(folder: Path, base: Path, steps: int, at: int | None = None, size: int = 0) -> nn.Module:
    """A short run; at one of its steps the disk is full."""
    model = tiny_bert()
    probe = Probe(evaluate=lambda m: {"score": float(m.classifier.weight.sum())}, schedule=Schedule(every=1))
    monitor = MergeReadyLoop(folder, base=base, probe=probe, measure=Schedule(every=1), picks=Picks())
    monitor.prepare(model, total_steps=steps)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.classifier.weight += 0.01
        if step == at:
            with largest_file(size):
                monitor.step()
        else:
            monitor.step()
    monitor.finish()
    return model


@pytest.mark.parametrize("size", [0, 1500, 6000])
def test_a_run_ends_with_the_reason_and_its_history_can_be_read(
    world: Path, tmp_path: Path, size: int
) -> None:
    with pytest.raises(
        (OSError, SafetensorError), match=r"[Ff]ile too large"
    ):  # the latter from save_pretrained
        train(tmp_path / "run", world / "base", 6, at=4, size=size)
    history = read_history(tmp_path / "run" / "history.jsonl")
    steps = [probe.step for probe in history.probes]
    assert steps in ([1, 2, 3], [1, 2, 3, 4])
    for pick in (tmp_path / "run" / "picks").iterdir():
        if pick.is_dir() and not pick.name.startswith("."):
            open_expert(pick, Base.open(world / "base"))


def test_a_folder_that_cannot_be_written_is_named(world: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder", encoding="utf-8")
    for write in (
        lambda: merge(world / "base", [world / "law"], output=blocker / "merged"),
        lambda: train(blocker / "run", world / "base", 1),
    ):
        with pytest.raises(OSError, match="file"):
            write()
    assert blocker.read_text(encoding="utf-8") == "not a folder"
