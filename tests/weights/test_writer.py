from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification

from mergeready.errors import FormatError, OptionError, OutputExistsError
from mergeready.weights import FolderWriter, SafetensorsFolder, StateDictSource, WeightSource
from mergeready.weights.open import _HUB_FILES
from mergeready.weights.safetensors_file import DTYPES
from mergeready.weights.source import TensorInfo
from tests.models import tiny_bert
from tests.weights.test_safetensors_file import SHAPES, bits, random_bits

INDEX = "model.safetensors.index.json"


def write_all(writer: FolderWriter, source: WeightSource) -> None:
    for name in writer.infos:
        writer.write(name, source.read(name))


def write(output: Path, tensors: dict[str, Tensor], **options: object) -> None:
    source = StateDictSource(tensors)
    with FolderWriter(output, source.infos, **options) as writer:
        write_all(writer, source)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


SOME = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4)}


def test_every_dtype_and_shape_is_read_back_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        f"{name} {shape}": random_bits(shape, dtype, seed)
        for seed, (name, dtype) in enumerate(DTYPES.items())
        for shape in SHAPES
    }
    write(tmp_path / "out", tensors, metadata={"made by": "a test"})
    assert names(tmp_path / "out") == ["model.safetensors"]
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(bits(read[name]), bits(tensor)), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "a test"}


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_transformers_loads_it(tmp_path: Path, shard_bytes: int) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    write(tmp_path / "out", model.state_dict(), shard_bytes=shard_bytes, companions=tmp_path / "base")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), shard_bytes=st.integers(1, 200))
def test_shards_hold_the_same_and_keep_to_their_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_bytes: int
) -> None:
    tensors = {f"t{i}": torch.full((length,), float(i)) for i, length in enumerate(lengths)}
    out = tmp_path_factory.mktemp("shards") / "out"
    write(out, tensors, shard_bytes=shard_bytes)
    read = SafetensorsFolder(out)
    assert list(read.infos) == list(tensors)
    assert all(torch.equal(read.read(name), tensors[name]) for name in tensors)
    for file in read.files:
        sizes = [info.nbytes for info in file.infos.values()]
        assert sum(sizes) <= shard_bytes or len([size for size in sizes if size]) == 1
    if (out / INDEX).exists():
        index = json.loads((out / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert index["weight_map"].keys() == tensors.keys()


@given(data=st.data())
def test_pieces_in_any_order_from_any_thread(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tensors = {"a": torch.randn(40, 7), "b": torch.randn(111), "c": torch.randn(())}
    jobs = []
    for name, tensor in tensors.items():
        cuts = data.draw(st.lists(st.integers(0, tensor.numel()), max_size=6))
        borders = sorted({0, *cuts, tensor.numel()})
        jobs += [(name, start, stop) for start, stop in pairwise(borders)]
    jobs = data.draw(st.permutations(jobs))
    out = tmp_path_factory.mktemp("pieces") / "out"
    with FolderWriter(out, StateDictSource(tensors).infos) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda j: writer.write(j[0], tensors[j[0]].reshape(-1)[j[1] : j[2]], j[1]), jobs))
    read = load_file(out / "model.safetensors")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_values_are_cast_to_the_dtype_of_the_file(tmp_path: Path) -> None:
    exact = torch.randn(50)
    with FolderWriter(tmp_path / "out", {"x": TensorInfo((50,), torch.bfloat16)}) as writer:
        writer.write("x", exact)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], exact.bfloat16())


def test_values_may_need_gradients_or_be_views(tmp_path: Path) -> None:
    view = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    write(tmp_path / "out", {"x": view})
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_no_tensors_make_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "out", {})
    assert load_file(tmp_path / "out" / "model.safetensors") == {}


def test_weights_of_further_modules_come_along(tmp_path: Path) -> None:
    """Sentence encoders do not load without those that their list of modules names."""
    for name in ("2_Dense", "3_Other", "4_Pickled"):
        (tmp_path / "base" / name).mkdir(parents=True)
        kind = "pytorch_model.bin" if name == "4_Pickled" else "model.safetensors"
        (tmp_path / "base" / name / kind).write_text("weights")
    named = [{"path": ""}, {"path": "2_Dense"}, {"path": "../base/3_Other"}, {"path": "4_Pickled"}, {}, "x"]
    (tmp_path / "base" / "modules.json").write_text(json.dumps(named))
    write(tmp_path / "out", SOME, companions=tmp_path / "base")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == "weights"
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["2_Dense"]
    (tmp_path / "base" / "modules.json").write_text("[")
    write(tmp_path / "plain", SOME, companions=tmp_path / "base")
    assert not (tmp_path / "plain" / "2_Dense").exists()


def test_whatever_tokenizers_are_made_of_comes_along(tmp_path: Path) -> None:
    """Marian's two sentence pieces, the merges of PhoBERT: without them a merged model has no tokenizer."""
    files = (Path(transformers.__file__).parent / "models").glob("*/tokenization_*.py")
    tables = [re.search(r"^VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.M | re.S) for path in files]
    wanted = {name for table in tables if table for name in re.findall(r': "([^"/]+)"', table[1])}
    assert {"source.spm", "bpe.codes", "vocab.json"} <= wanted
    (tmp_path / "base").mkdir()
    for name in wanted:
        (tmp_path / "base" / name).write_text("x")
    write(tmp_path / "out", SOME, companions=tmp_path / "base")
    assert wanted - set(names(tmp_path / "out")) == set()
    assert [name for name in wanted if not any(fnmatch(name, pattern) for pattern in _HUB_FILES)] == []


def test_companions_come_along_and_nothing_else(tmp_path: Path) -> None:
    wanted = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "preprocessor_config.json",
        "LICENSE",
        "NOTICE.txt",
        "modules.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ]
    unwanted = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        INDEX,
        "pytorch_model.bin",
        "vocab.bin",
        "tokenizer/model.safetensors",
        "vocab_embeddings.pt",
        "tokenizer.onnx",
        "tf_model.h5",
        "README.md",
        "modeling_custom.py",
        "tokenization_custom.py",
        "training_args.bin",
        "optimizer.pt",
        "mergeready.json",
        "a/b/config.json",
        ".git/config",
    ]
    for name in wanted + unwanted:
        path = tmp_path / "base" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    write(tmp_path / "out", SOME, companions=tmp_path / "base")
    copied = {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert copied == {*wanted, "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == f"content of {name}" for name in wanted)


def test_an_existing_output_is_refused_untouched(tmp_path: Path) -> None:
    write(tmp_path / "out", SOME)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="out exists"):
        write(tmp_path / "out", {"other": torch.zeros(1)})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert names(tmp_path) == ["out"]


def test_overwriting_keeps_the_old_until_the_new_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "out", {"old": torch.zeros(2)})
    (tmp_path / "out" / "note.txt").write_text("old")
    source = StateDictSource(SOME)
    with FolderWriter(tmp_path / "out", source.infos, overwrite=True) as writer:
        write_all(writer, source)
        assert list(SafetensorsFolder(tmp_path / "out").infos) == ["old"]
    assert list(SafetensorsFolder(tmp_path / "out").infos) == ["a", "b"]
    assert names(tmp_path / "out") == ["model.safetensors"]
    assert names(tmp_path) == ["out"]


def fail_at_the_end(output: Path, error: type[BaseException], overwrite: bool) -> None:
    source = StateDictSource(SOME)
    with FolderWriter(output, source.infos, overwrite=overwrite) as writer:
        write_all(writer, source)
        raise error


def write_too_little(output: Path) -> None:
    with FolderWriter(output, StateDictSource(SOME).infos) as writer:
        writer.write("a", torch.zeros(5))
        writer.write("b", torch.zeros(4))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_inside_leaves_no_trace(
    tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    if overwrite:
        write(tmp_path / "out", {"old": torch.ones(2)})
    with pytest.raises(error):
        fail_at_the_end(tmp_path / "out", error, overwrite)
    assert names(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or load_file(tmp_path / "out" / "model.safetensors")["old"].tolist() == [1, 1]


def test_an_incomplete_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="out cannot be finished: 1 tensors were left incomplete, first a"):
        write_too_little(tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_leaves_nothing_and_the_old_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, after: int
) -> None:
    if overwrite:
        write(tmp_path / "out", {"old": torch.ones(2)})
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    tensors = {f"t{i}": torch.ones(10) for i in range(5)}
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "out", tensors, overwrite=overwrite, shard_bytes=80)
    assert len(calls) == after + 1
    assert names(tmp_path) == (["out"] if overwrite else [])
    assert not overwrite or load_file(tmp_path / "out" / "model.safetensors")["old"].tolist() == [1, 1]


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:5], offset))
    write(tmp_path / "out", SOME)
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(read[name], SOME[name]) for name in SOME)


KILLED = """
import sys, torch
from pathlib import Path
from mergeready.weights import FolderWriter, TensorInfo
infos = {"a": TensorInfo((1000,), torch.float32), "b": TensorInfo((1000,), torch.float32)}
root = Path(sys.argv[1])
with FolderWriter(root / "new", infos) as new, FolderWriter(root / "old", infos, overwrite=True) as old:
    new.write("a", torch.ones(1000))
    old.write("a", torch.ones(1000))
    print("half", flush=True)
    sys.stdin.read()
"""


def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    write(tmp_path / "old", {"old": torch.ones(2)})
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["old"]
    assert all(".partial-" in name for name in names(tmp_path) if name.startswith("."))
    assert load_file(tmp_path / "old" / "model.safetensors")["old"].tolist() == [1, 1]
    write(tmp_path / "new", SOME)  # what was left is not in the way


def test_options_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    for shard_bytes in (0, -1):
        with pytest.raises(OptionError, match="shard_bytes"):
            FolderWriter(tmp_path / "out", {}, shard_bytes=shard_bytes)
    with pytest.raises(FormatError, match=r"complex128.*x"):
        FolderWriter(tmp_path / "out", {"x": TensorInfo((1,), torch.complex128)})
    assert names(tmp_path) == []
