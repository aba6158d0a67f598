from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mergeready import Monitor, Peer, Probe, Schedule
from mergeready.training.history import History
from mergeready.validation import Report, validate
from mergeready.validation.check import Verdict
from mergeready.validation.page import write_page
from mergeready.validation.pictures import figures, save_pngs
from tests.browser import needs_chromium, screenshot
from tests.training import small
from tests.validation.test_behaviour_checks import evaluation, world

__all__ = ["world"]


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, History]:
    """The page of an expert with peers, an evaluation and a training run."""
    root = tmp_path_factory.mktemp("page")
    peers = [Peer(world / "task-1", small.Evaluation(1), "law"), Peer(world / "task-2", name="code")]
    probe = Probe(merge=["ties", "average"], evaluate=small.Evaluation(0), schedule=Schedule(every=10))
    monitor = Monitor(base=world / "base", peers=peers, probe=probe, measure=Schedule(every=5))
    model = small.Net()
    monitor.start(model, root / "run", total_steps=20)
    small.train(model, 0, 20, monitor.on_step)
    report = validate(
        world / "task-0", world / "base", peers=[world / "task-1", world / "task-2"], evaluation=evaluation()
    )
    return write_page(root / "report.html", report, monitor.history), report, monitor.history


class Tags(HTMLParser):
    """Opens and closes every tag, and notes what a page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.asked += [
            value
            for key, value in attrs
            if key in ("src", "href", "xlink:href", "action") and value and value[0] != "#"
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_asks_for_nothing_and_is_well_formed(made: tuple[Path, Report, History]) -> None:
    text = made[0].read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    assert not tags.asked
    assert len(tags.ids) == len(set(tags.ids))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "<script" not in text


def test_it_says_what_the_report_says(made: tuple[Path, Report, History]) -> None:
    path, report, _ = made
    text = path.read_text(encoding="utf-8")
    assert report.headline in text
    for verdict in report.verdicts:
        assert verdict.id in text
    assert text.count("<svg") == 6  # two methods with two figures each, growth, interference
    failures = [v for v in report.verdicts if v.status == "failed"]
    assert text.count("<details open>") == len(failures)


def test_figures_take_the_pages_colours(made: tuple[Path, Report, History]) -> None:
    text = made[0].read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "<metadata>" not in svg


def test_texts_are_escaped(tmp_path: Path) -> None:
    verdict = Verdict(
        id="X1",
        level="file",
        severity="error",
        title="<b>",
        status="failed",
        message="<script>alert(1)</script>",
    )
    report = Report(expert="a/<img src=x>", level="file", verdicts=[verdict])
    text = write_page(tmp_path / "x.html", report).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_the_folder_one_is_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_page("x.html", Report(expert=".", level="file", verdicts=[])).read_text(encoding="utf-8")
    assert f"<h1>{tmp_path.name}</h1>" in text


def test_a_report_without_run_or_peers_has_no_figures(world: Path, tmp_path: Path) -> None:
    path = write_page(tmp_path / "x.html", validate(world / "task-0", world / "base", level="base"))
    text = path.read_text(encoding="utf-8")
    assert "<svg" not in text
    assert "Figures" not in text


def test_pictures_for_the_card(made: tuple[Path, Report, History], tmp_path: Path) -> None:
    paths = save_pngs(figures(made[2], made[1].pairs), tmp_path)
    assert len(paths) == 6
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert image.convert("L").getextrema() != (255, 255)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1100, 390])
def test_a_browser_opens_it_without_complaint(
    made: tuple[Path, Report, History], tmp_path: Path, width: int
) -> None:
    assert screenshot(made[0], tmp_path / "page.png", width=width) == ""
    with Image.open(tmp_path / "page.png") as image:
        assert image.size[0] == width
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 50


@pytest.mark.slow
@needs_chromium
def test_paper_shows_what_is_closed_on_the_screen(tmp_path: Path) -> None:
    verdict = Verdict(
        id="X1", level="file", severity="error", title="it is", status="passed", message="word " * 4000
    )
    page = write_page(tmp_path / "x.html", Report(expert="law", level="file", verdicts=[verdict]))
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'x.pdf'}", page.as_uri(),
        ],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    pages = re.findall(rb"/Type\s*/Page\b", (tmp_path / "x.pdf").read_bytes())
    assert len(pages) > 3
