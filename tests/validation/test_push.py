from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from mergeready.errors import FormatError, OptionError
from mergeready.experts.fingerprint import Fingerprint
from mergeready.validation import validate
from mergeready.validation.push import UploadError, push_report
from mergeready.validation.share import fingerprint_of
from tests.hub import Hub, serving
from tests.validation.experts import CARD, write_base, write_full

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(monkeypatch) as running:
        yield running


@pytest.fixture
def law(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    write_full(tmp_path / "code", seed=2)
    return write_full(tmp_path / "law")


def push(law: Path, **options: object) -> str:
    base = law.parent / "base"
    report = validate(law, base, peers=[law.parent / "code"], level="composition")
    made = fingerprint_of(law, base)
    return push_report(law, "me/law", report, made, base=base, token=TOKEN, **options)


def publish(hub: Hub, card: bytes) -> None:
    """What somebody else uploaded before."""
    hub.made, hub.files["README.md"] = True, card


def test_card_report_and_fingerprint_arrive(hub: Hub, law: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in law.iterdir()}
    assert push(law, base_model="org/base").endswith("0" * 34)
    assert sorted(hub.files) == [
        "README.md", "law.fingerprint.safetensors", "mergeready-report.html", "mergeready-report.json",
    ]  # fmt: skip
    assert len(hub.commits) == 1
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nbase_model: org/base\nlicense: apache-2.0\n")
    assert "# Law" in card
    assert "## Composability" in card
    assert json.loads(hub.files["mergeready-report.json"])["expert"] == "me/law"
    (tmp_path / "x.fingerprint.safetensors").write_bytes(hub.files["law.fingerprint.safetensors"])
    assert Fingerprint.load(tmp_path / "x.fingerprint.safetensors").label == "law"
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"}  # large files are put without one
    assert {path: path.read_bytes() for path in law.iterdir()} == before  # nothing is written here


def test_no_local_path_and_no_token_leave(hub: Hub, law: Path, tmp_path: Path) -> None:
    (law / "model.safetensors").rename(law / "other.safetensors")  # checks that fail name the folder
    report = validate(law, law.parent / "base", level="base")
    assert str(tmp_path) in json.dumps(report.to_json())
    push_report(law, "me/law", report, token=TOKEN)
    for content in hub.files.values():
        assert str(tmp_path).encode() not in content
        assert TOKEN.encode() not in content


def test_the_hubs_card_is_the_one_that_is_kept(hub: Hub, law: Path) -> None:
    publish(hub, CARD.replace("Answers questions", "Answered elsewhere").encode())
    before = hub.sha
    push(law)
    assert hub.parents == [before]  # or what others commit meanwhile would be lost
    card = hub.files["README.md"].decode()
    assert "Answered elsewhere" in card
    assert "Answers questions" not in card
    push(law)
    assert hub.files["README.md"].decode() == card


@pytest.mark.parametrize("status", [403, 404])
def test_a_card_that_cannot_be_fetched_is_not_replaced(hub: Hub, law: Path, status: int) -> None:
    """The library says of a file that did not come that there is none."""
    publish(hub, CARD.replace("Answers questions", "Answered elsewhere").encode())
    hub.hide = status
    with pytest.raises(UploadError):
        push(law)
    assert b"Answered elsewhere" in hub.files["README.md"]


def test_a_card_that_is_no_text_stays(hub: Hub, law: Path) -> None:
    publish(hub, b"---\nlicense: mit\n---\n\xff")
    with pytest.raises(FormatError, match="UTF-8"):
        push(law)
    assert list(hub.files) == ["README.md"]


def test_something_private_in_the_card_stops_it(hub: Hub, law: Path) -> None:
    (law / "README.md").write_text(f"{CARD}\n{TOKEN} in /home/me/run\n", encoding="utf-8")
    with pytest.raises(
        OptionError, match=r"a local path in README.md, an access token in README.md"
    ) as caught:
        push(law)
    assert TOKEN not in str(caught.value)
    assert not hub.files
    assert not hub.made


def test_what_goes_wrong_is_said_without_the_token(hub: Hub, law: Path) -> None:
    hub.refuse = 403
    with pytest.raises(UploadError, match="me/law could not be written") as caught:
        push(law)
    assert TOKEN not in str(caught.value)
    assert re.search("403", str(caught.value))
    with pytest.raises(OptionError, match="hub id"):
        push_report(law, "/home/me/law", validate(law, level="file"))


def test_without_a_network(law: Path) -> None:
    """Tests run offline, so the library refuses by itself."""
    with pytest.raises(UploadError, match="offline"):
        push(law)
