from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.suites import fetch as fetching
from benchmarks.suites.build_demo import (
    DATA_FOLDER,
    DEMO_TASKS,
    MAX_FILE_BYTES,
    TEST,
    TRAIN,
    VALIDATION,
    build,
    shorten,
    write_table,
)
from benchmarks.suites.fetch import FetchError, Pin, fetch, pins, unpack
from benchmarks.suites.heads import linear_probe, zero_shot_head
from benchmarks.suites.images import ImageInput
from benchmarks.suites.onnx_weights import read_float32_weights
from benchmarks.suites.sampling import Example, draw, rank_groups, split_pools, text_example
from benchmarks.suites.squeezenet import SqueezeNet, read_weights
from benchmarks.suites.text import TEXT_SUITE, TEXT_TASKS, load_text_task
from benchmarks.suites.text_sources import mail_text, redact
from benchmarks.suites.vision import VISION_TASKS, load_vision_task

# --- archives -------------------------------------------------------------------------------------------------


def _tar(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            bundle.addfile(info)
    return path


def _deb(path: Path, data: bytes) -> Path:
    def member(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return header + content + b"\n" * (len(content) % 2)

    path.write_bytes(b"!<arch>\n" + member("debian-binary", b"2.0\n") + member("data.tar.gz", data))
    return path


@pytest.mark.parametrize("suffix", [".tgz", ".tar.gz", ".whl", ".deb"])
def test_unpack_restores_the_files(tmp_path: Path, suffix: str) -> None:
    archive = tmp_path / f"package{suffix}"
    tar = _tar(tmp_path / "data.bin", {"folder/file.txt": b"content"})
    if suffix == ".whl":
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr("folder/file.txt", b"content")
    elif suffix == ".deb":
        _deb(archive, tar.read_bytes())
    else:
        tar.rename(archive)
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out/folder/file.txt").read_bytes() == b"content"
    assert {path.name for path in tmp_path.iterdir()} <= {"out", archive.name, "data.bin"}, (
        "scratch folder left"
    )


@pytest.mark.parametrize("name", ["../evil.txt", "folder/../../evil.txt", "/../evil.txt"])
def test_unpack_refuses_to_leave_the_folder(tmp_path: Path, name: str) -> None:
    box = tmp_path / "box"
    box.mkdir()
    with zipfile.ZipFile(box / "bad.whl", "w") as bundle:
        bundle.writestr(name, b"x")
    _tar(box / "bad.tgz", {name: b"x"})
    for archive in ("bad.whl", "bad.tgz"):
        with pytest.raises(FetchError, match=r"cannot unpack .*bad"):
            unpack(box / archive, box / "out")
    assert not (box / "out").exists()
    assert not list(tmp_path.rglob("evil.txt"))


def test_unpack_leaves_out_links_that_point_outside(tmp_path: Path) -> None:
    archive = _tar(
        tmp_path / "a.tgz", {"kept.txt": b"x"}, {"bad": "/etc/passwd", "worse": "../../x", "fine": "kept.txt"}
    )
    unpack(archive, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fine", "kept.txt"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.rar", b""), ("a.tgz", b"not a tar"), ("a.whl", b"x"), ("a.deb", b"x")]
)
def test_unpack_names_a_broken_archive(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FetchError, match=f"cannot unpack .*{name}"):
        unpack(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive in a registry that is a local folder; returns the archive."""
    archive = _tar(tmp_path / "toy-1.0.tgz", {"package/data.txt": b"42"})
    sha256 = "0" * 64

    def table() -> dict[tuple[str, str, str], Pin]:
        good = Pin(
            "npm",
            "toy",
            "1.0",
            hashlib.sha256(archive.read_bytes()).hexdigest(),
            0,
            archive.as_uri(),
        )
        bad = Pin("npm", "toy", "2.0", sha256, 0, archive.as_uri())
        lost = Pin("npm", "toy", "3.0", sha256, 0, (tmp_path / "nowhere.tgz").as_uri())
        return {("npm", "toy", pin.version): pin for pin in (good, bad, lost)}

    known = table()
    monkeypatch.setattr(fetching, "pins", lambda: known)
    monkeypatch.setenv("MERGEREADY_BENCH_CACHE", str(tmp_path / "cache"))
    return archive


def test_fetch_downloads_once(registry: Path) -> None:
    folder = fetch("npm", "toy", "1.0")
    assert (folder / "package/data.txt").read_bytes() == b"42"
    registry.unlink()
    assert fetch("npm", "toy", "1.0") == folder


def test_fetch_refuses_other_bytes(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"toy-1.0.tgz has sha256 .*, expected 0000.*delete the file"):
        fetch("npm", "toy", "2.0")
    assert not (tmp_path / "cache/npm").exists()
    assert not (tmp_path / "cache/archives/toy-1.0.tgz").exists()


def test_fetch_tries_again(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fetching.urllib.request.urlopen, []

    def failing(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) < 3:
            raise urllib.error.URLError("reset by peer")
        return real(*arguments, **options)

    monkeypatch.setattr(fetching.urllib.request, "urlopen", failing)
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0)
    assert (fetch("npm", "toy", "1.0") / "package/data.txt").read_bytes() == b"42"
    assert len(calls) == 3


def test_fetch_says_where_to_put_a_file_that_cannot_be_downloaded(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0)
    with pytest.raises(FetchError, match=r"cannot download toy 3.0 .*put the file at .*archives/nowhere.tgz"):
        fetch("npm", "toy", "3.0")
    assert not list((tmp_path / "cache/archives").iterdir()), "a partial download was left"


def test_fetch_lists_pinned_versions(registry: Path) -> None:
    with pytest.raises(FetchError, match=r"npm package toy 9 is not pinned.*npm toy 1.0, npm toy 2.0"):
        fetch("npm", "toy", "9")


def test_pins_are_complete() -> None:
    for pin in pins().values():
        assert pin.kind in {"pypi", "npm", "deb"}
        assert len(pin.sha256) == 64
        assert pin.url.startswith("https://")
        assert pin.size_bytes > 0
    assert len({pin.filename for pin in pins().values()}) == len(pins()), (
        "archives would overwrite each other"
    )


# --- sampling -------------------------------------------------------------------------------------------------


def _examples(count: int = 400, classes: int = 4) -> list[Example[str]]:
    return [text_example(f"text {i}", i % classes, f"group {i // 5}") for i in range(count)]


def test_splits_share_neither_examples_nor_groups() -> None:
    pools = split_pools(_examples())
    groups = [{example.group for example in pool} for pool in (pools.train, pools.validation, pools.test)]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_duplicates_and_contradictions_are_removed() -> None:
    train = [text_example("Same  text", 0), text_example("same text", 0), text_example("unclear", 0)]
    train += [text_example("unclear", 1), text_example("in the test split", 1)]
    pools = split_pools(train, test_examples=[text_example("in the test split", 1)])
    assert [example.value for example in (*pools.train, *pools.validation)] == ["Same text"]
    assert [example.value for example in pools.test] == ["in the test split"]


def test_the_seed_moves_training_but_not_test_examples() -> None:
    pools = split_pools(_examples())
    first, again, other = (draw(pools, train=50, validation=20, test=20, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.test == other.test
    assert first.train != other.train
    assert first.validation != other.validation


def test_a_missed_class_replaces_a_frequent_one() -> None:
    rare = [text_example(f"rare {i}", 1) for i in range(3)]
    pools = split_pools([*(text_example(f"often {i}", 0) for i in range(3000)), *rare])
    for seed in range(5):
        drawn = draw(pools, train=10, validation=5, test=5, seed=seed).train
        assert len(drawn) == 10
        assert {example.label for example in drawn} == {example.label for example in pools.train}


def test_rank_groups_gives_every_class_all_splits() -> None:
    assigned = rank_groups({"few": ["a", "b", "c"], "many": [str(i) for i in range(40)]})
    assert {assigned[group] for group in "abc"} == {"train", "validation", "test"}
    counts = [sum(assigned[str(i)] == split for i in range(40)) for split in ("train", "validation", "test")]
    assert counts == [27, 5, 8]


# --- readers and heads ----------------------------------------------------------------------------------------


def test_mail_text_keeps_subject_and_body_only() -> None:
    raw = (
        b"From: jane@example.org\nTo: joe@example.org\nSubject: Re: [list] Hello\n"
        b"Content-Type: text/html\n\n<style>p {}</style><p>Call +1 (555) 123-4567 or see http://example.org/a</p>\n"
    )
    assert mail_text(raw).split() == ["Hello.", "Call", "or", "see"]
    assert "@" not in redact("a.b@example.org, c@example.com")


def test_shorten_cuts_at_a_space() -> None:
    assert shorten("all human beings are born free", 18) == "all human beings"
    assert shorten("short", 20) == "short"
    assert len(shorten("x" * 50, 20)) == 20


def test_squeezenet_weights_must_be_arrays(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "made",)  # type: ignore[return-value]

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"conv1": [Evil(), Evil()]}))
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        read_weights(tmp_path / "evil.pkl")
    assert not (tmp_path / "made").exists()

    kernel = np.arange(3 * 3 * 2 * 4, dtype=np.float32).reshape(3, 3, 2, 4)
    old_place = pickle.dumps({"a/b": [kernel, np.zeros(4, np.float32)]}, protocol=3)
    (tmp_path / "good.pkl").write_bytes(
        old_place.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    )
    state = read_weights(tmp_path / "good.pkl")
    assert set(state) == {"a.b.weight", "a.b.bias"}
    assert torch.equal(state["a.b.weight"][1, 0], torch.from_numpy(kernel[:, :, 0, 1].copy()))


def test_onnx_weights_are_read_with_the_names_of_their_products(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        assert len(content) < 128
        return bytes([number << 3 | 2, len(content)]) + content

    def integer(number: int, value: int) -> bytes:
        return bytes([number << 3, value])

    weight = torch.arange(6.0).reshape(2, 3)
    tensor = (
        integer(1, 2) + integer(1, 3) + integer(2, 1) + field(8, b"w") + field(9, weight.numpy().tobytes())
    )
    node = field(1, b"x") + field(1, b"w") + field(3, b"/dense/MatMul") + field(4, b"MatMul")
    (tmp_path / "toy.onnx").write_bytes(field(7, field(1, node) + field(5, tensor)))
    tensors, products = read_float32_weights(tmp_path / "toy.onnx")
    assert products == {"w": "/dense/MatMul"}
    assert torch.equal(tensors["w"], weight)


def test_image_input_normalises_and_orders_channels() -> None:
    image = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    rgb = ImageInput(4, (10.0, 10.0, 10.0), (2.0, 2.0, 2.0), bgr=False)
    assert rgb.prepare(image)[0, :, 0, 0].tolist() == [0.0, 5.0, 10.0]
    bgr = ImageInput(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), bgr=True)
    assert bgr.prepare(image, size=2)[0, :, 0, 0].tolist() == pytest.approx([30.0, 20.0, 10.0])
    with pytest.raises(ValueError, match=r"`images` must be uint8 of shape \(n, 3, h, w\)"):
        rgb.prepare(image.float())


def test_squeezenet_works_on_small_images() -> None:
    assert SqueezeNet().features(torch.zeros(2, 3, 64, 64)).shape == (2, 512)


def test_linear_probe_separates_and_reports_bad_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5, generator=generator) + 4 * torch.eye(5)[labels]
    head = linear_probe(features, labels, 3)
    assert head(features).argmax(dim=1).eq(labels).float().mean() > 0.95
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(ValueError, match=r"`labels` must be in 0..1, got 0..2"):
        linear_probe(features, labels, 2)


def test_zero_shot_head_needs_different_phrases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different phrases"):
        zero_shot_head(tmp_path, ("same", "same"))


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(ValueError, match=r"must be one of wordnet_noun, .*got 'nope'"):
        load_text_task("nope")
    with pytest.raises(ValueError, match=r"must be one of mnist, .*got 'nope'"):
        load_vision_task("nope")


# --- the data that ships --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, list[str]]]:
    loaded: dict[str, dict[str, list[str]]] = json.loads(
        (DATA_FOLDER / "tasks.json").read_text(encoding="utf-8")
    )
    return loaded


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    table: list[dict[str, object]] = pq.read_table(DATA_FOLDER / "suite.parquet").to_pylist()
    return table


def test_demo_tasks_have_their_sizes_and_all_classes(
    facts: dict[str, dict[str, list[str]]], rows: list[dict[str, object]]
) -> None:
    assert list(facts) == list(DEMO_TASKS)
    for name, fact in facts.items():
        for split, count in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
            labels = [row["label"] for row in rows if row["task"] == name and row["split"] == split]
            assert len(labels) == count
            if split == "train":
                assert set(labels) == set(range(len(fact["label_names"])))
            assert set(labels) <= set(range(len(fact["label_names"])))
        assert len(fact["label_texts"]) == len(set(fact["label_texts"])) == len(fact["label_names"])
    assert len(rows) == len(facts) * (TRAIN + VALIDATION + TEST)


def test_demo_splits_are_disjoint_and_texts_are_short(rows: list[dict[str, object]]) -> None:
    texts = [(row["task"], str(row["text"]).lower()) for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(0 < len(text) <= 200 and text == " ".join(text.split()) for _, text in texts)


def test_demo_data_carries_its_licences(facts: dict[str, dict[str, list[str]]]) -> None:
    named = {file for fact in facts.values() for file in fact["licence_files"]}
    there = {path.relative_to(DATA_FOLDER).as_posix() for path in (DATA_FOLDER / "LICENSES").iterdir()}
    assert named == there
    assert all("copyright" in (DATA_FOLDER / file).read_text(encoding="utf-8").lower() for file in named)
    assert all(fact[key] for fact in facts.values() for key in ("title", "source", "licence", "changes"))


def test_demo_data_is_small() -> None:
    assert sum(path.stat().st_size for path in DATA_FOLDER.rglob("*") if path.is_file()) <= MAX_FILE_BYTES


def test_demo_table_is_written_the_same_every_time(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    columns = [(str(r["task"]), str(r["split"]), str(r["text"]), int(str(r["label"]))) for r in rows]
    for name in ("a", "b"):
        write_table(columns, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # Another version of Arrow may compress otherwise, but must hold the same rows.
    assert pq.read_table(tmp_path / "a").equals(pq.read_table(DATA_FOLDER / "suite.parquet"))


# --- with the network -----------------------------------------------------------------------------------------


@pytest.mark.network
def test_demo_data_is_what_the_script_builds(tmp_path: Path) -> None:
    build(tmp_path / "data")
    built = {p.relative_to(tmp_path / "data"): p for p in (tmp_path / "data").rglob("*") if p.is_file()}
    shipped = {p.relative_to(DATA_FOLDER): p for p in DATA_FOLDER.rglob("*") if p.is_file()}
    assert set(built) <= set(shipped)
    for name, path in built.items():
        if path.suffix == ".parquet":
            assert pq.read_table(path).equals(pq.read_table(shipped[name]))
        else:
            assert path.read_bytes() == shipped[name].read_bytes()


@pytest.mark.network
@pytest.mark.parametrize("name", TEXT_TASKS)
def test_text_tasks_load(name: str) -> None:
    task, other = load_text_task(name), load_text_task(name, seed=1)
    classes = range(len(task.label_names))
    assert len(task.train[0]) == 1000
    assert set(task.train[1]) == set(task.test[1]) == set(classes)
    assert len(task.label_texts) == len(classes)
    assert task.test == other.test
    assert task.train != other.train
    splits = [{text.lower() for text in texts} for texts, _ in (task.train, task.validation, task.test)]
    assert len(set.union(*splits)) == sum(len(texts) for texts, _ in (task.train, task.validation, task.test))
    assert set(TEXT_SUITE) <= set(TEXT_TASKS)


@pytest.mark.network
@pytest.mark.parametrize("name", VISION_TASKS)
def test_vision_tasks_load(name: str) -> None:
    task, other = load_vision_task(name, size=32), load_vision_task(name, size=32, seed=1)
    images, labels = task.train
    assert images.shape == (1000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert set(labels.tolist()) == set(range(len(task.label_names)))
    assert torch.equal(task.test[0], other.test[0])
    assert not torch.equal(images, other.train[0])


@pytest.mark.network
def test_backbones_load() -> None:
    from transformers import AutoModel

    from benchmarks.suites import backbones

    sizes = {}
    for name, folder in (("l6", backbones.minilm_l6()), ("l3", backbones.minilm_l3())):
        model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    sizes["lite0"] = sum(parameter.numel() for parameter in backbones.efficientnet_lite0().parameters())
    sizes["squeezenet"] = sum(parameter.numel() for parameter in backbones.squeezenet().parameters())
    assert sizes == {"l6": 22_713_216, "l3": 17_389_824, "lite0": 4_652_008, "squeezenet": 1_235_496}
    language_model = backbones.smollm2()
    assert (language_model.folder / language_model.file).is_file()


@pytest.mark.network
def test_zero_shot_head_tells_languages_apart() -> None:
    from benchmarks.suites.backbones import minilm_l6

    task = load_text_task("udhr")
    head = zero_shot_head(minilm_l6(), task.label_texts)
    assert head.shape == (38, 384)
    assert torch.allclose(head.norm(dim=1), torch.ones(38), atol=1e-5)
