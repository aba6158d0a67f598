from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergeready.errors import OptionError
from mergeready.experts.delta import Dense
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.task_vector import DeltaTaskVector
from mergeready.merging import make_method, merge_folders, merge_plan
from mergeready.merging.parameter import merged_delta
from mergeready.weights.source import TensorInfo, WeightSource
from tests.merging.worlds import World, make_world, state


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_inputs_and_outputs(world: World, tmp_path: Path) -> None:
    experts = [*world.folders, world.adapter_folder]
    options: dict[str, Any] = {"dtype": torch.bfloat16, "shard_bytes": 20_000}
    plan = merge_plan(world.base_folder, experts, **options)
    tensors = state(world.base)
    elements = sum(tensor.numel() for tensor in tensors.values())
    assert [given.label for given in plan.inputs] == [str(world.base_folder), *map(str, experts)]
    assert [given.format for given in plan.inputs] == ["base", "full", "full", "peft"]
    assert [given.parameters for given in plan.inputs] == [len(tensors)] * 3 + [4]
    assert plan.inputs[0].nbytes == 4 * elements
    weights = experts[2] / "adapter_model.safetensors"
    assert plan.inputs[3].nbytes == weights.stat().st_size
    assert plan.write_bytes == 2 * elements
    assert plan.read_bytes == sum(given.nbytes for given in plan.inputs)
    assert [(m.name, m.parameters, m.elements) for m in plan.methods] == [
        ("task_arithmetic", len(tensors), elements)
    ]
    out = merge_folders(world.base_folder, experts, tmp_path / "out", **options)
    assert plan.files == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_methods_by_group(world: World) -> None:
    overrides = {"query": {"method": "tsv_m"}, "LayerNorm": {"method": "average"}}
    plan = merge_plan(world.base_folder, world.folders, "ties", overrides=overrides)
    found = {method.name: method.parameters for method in plan.methods}
    # Ten of layer norms; and two biases, which tsv_m leaves to its method for vectors.
    assert found == {"tsv_m": 2, "average": 12, "ties": len(state(world.base)) - 14}


def test_memory_is_bounded_or_refused(world: World, tmp_path: Path) -> None:
    free = merge_plan(world.base_folder, world.folders, "tsv_m", threads=2)
    need = max(free.needs.values())
    assert need < free.peak_bytes <= 2 * need
    bound = merge_plan(world.base_folder, world.folders, "tsv_m", threads=2, memory=need)
    assert bound.peak_bytes == need
    largest = max(free.needs, key=lambda name: free.needs[name])
    with pytest.raises(
        OptionError, match=rf"`memory` is [\d.]+ \wB, and these .* {largest} \(tsv_m: [\d.]+ \wB\)"
    ):
        merge_folders(world.base_folder, world.folders, tmp_path / "out", "tsv_m", memory=need - 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["ties", "tsv_m"])
def test_neither_threads_nor_memory_change_the_result(world: World, tmp_path: Path, method: str) -> None:
    need = max(merge_plan(world.base_folder, world.folders, method).needs.values())
    results = {
        merge_folders(world.base_folder, world.folders, tmp_path / name, method, **options)
        for name, options in {
            "one": {"threads": 1},
            "two": {"threads": 2},
            "five": {"threads": 5},
            "tight": {"threads": 5, "memory": need},
        }.items()
    }
    assert len({(out / "model.safetensors").read_bytes() for out in results}) == 1
    assert len({(out / "mergeready.json").read_bytes() for out in results}) == 1


def test_nothing_but_samples_is_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = WeightSource.read_flat
    from mergeready.weights.safetensors_folder import SafetensorsFolder

    real = SafetensorsFolder.read_flat

    def counted(self: SafetensorsFolder, name: str, start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return real(self, name, start, stop)

    monkeypatch.setattr(SafetensorsFolder, "read_flat", counted)
    merge_plan(world.base_folder, world.folders)
    assert max(read) <= 1024


class Many(WeightSource):
    """A model of many tensors that hold nothing."""

    def __init__(self, count: int, value: float) -> None:
        self.label, self._value = f"{count} tensors", value
        self._infos = {f"layers.{i}.weight": TensorInfo((64, 64), torch.bfloat16) for i in range(count)}

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return self._infos

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start,), self._value, dtype=torch.bfloat16)


def test_time_grows_with_the_number_of_tensors_only() -> None:
    def seconds(count: int) -> float:
        base, expert = Many(count, 1.0), Many(count, 1.01)
        begun = time.process_time()
        assert merge_plan(base, [expert]).methods[0].parameters == count
        return time.process_time() - begun

    seconds(50)
    few, many = min(seconds(500) for _ in range(2)), seconds(4000)
    assert many < 8 * few * 2.5  # quadratic would be 64 times as much


def test_a_plan_is_checked_like_a_merge(world: World) -> None:
    with pytest.raises(OptionError, match="`experts` is empty"):
        merge_plan(world.base_folder, [])
    with pytest.raises(OptionError, match="there is no merge method"):
        merge_plan(world.base_folder, world.folders, "tis")
    with pytest.raises(OptionError, match="`threads` must be at least 1"):
        merge_plan(world.base_folder, world.folders, threads=0)


class Counted(DeltaTaskVector):
    """Counts the elements that are read of it."""

    read: int = 0

    def flat(self, name: str, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        self.read += stop - start
        return super().flat(name, start, stop, base)


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "breadcrumbs", "dare_ties", "della", "sce", "pcb"]
)
@pytest.mark.parametrize("held", [True, False])
def test_no_method_reads_more_often_than_plans_say(
    method: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not held:  # as if the parameter were too large for values to be kept
        for name in ("method", "pcb", "selection"):
            monkeypatch.setattr(f"mergeready.merging.{name}.can_be_held", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(700, 1000, generator=generator) for _ in range(3)]
    info = TensorInfo((700, 1000), torch.float32)
    vectors = [
        Counted({"w": Dense(value)}, {"w": info}, BaseIdentity({}), str(i)) for i, value in enumerate(values)
    ]
    made = make_method(method)
    assert merged_delta(made, "w", info, vectors, [1.0] * 3) is not None
    passes = [vector.read / info.numel for vector in vectors]
    assert max(passes) <= made.passes + 0.9, passes  # samples, and a piece that is looked at once more
    if held and made.passes > 1:
        assert passes == [1.0] * 3
    elif method in ("task_arithmetic", "ties", "breadcrumbs", "dare_ties", "della"):
        assert made.passes <= min(passes)


SCRIPT = """
import re, sys, threading
from pathlib import Path
from mergeready.merging import merge_folders, merge_plan
base, experts, out, method = sys.argv[1], sys.argv[2:5], sys.argv[5], sys.argv[6]
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
merge_folders(base, experts, out + "-first", "average", threads=1)  # so that libraries have what they keep
plan = merge_plan(base, experts, method, threads=1)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
merge_folders(base, experts, out, method, threads=1)
done.set(); thread.join()
print(peak - before, plan.peak_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "breadcrumbs", "della"])
def test_a_merge_stays_below_the_memory_that_plans_say(method: str, tmp_path: Path) -> None:
    shape = (6000, 1000)
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
        tensor = 1 + 0.01 * torch.randn(shape, generator=generator)
        save_file({"layer.weight": tensor}, tmp_path / name / "model.safetensors")
    folders = [str(tmp_path / name) for name in ("base", "a", "b", "c", "out")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders, method], capture_output=True, text=True, check=True
    )
    used, planned = map(int, done.stdout.split())
    assert 0 < used <= planned
