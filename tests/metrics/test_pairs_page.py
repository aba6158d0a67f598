from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergeready.errors import OptionError
from mergeready.metrics.all_pairs import AllPairs
from mergeready.metrics.compatible import groups, most_compatible
from mergeready.metrics.pairs_page import write_pairs_page
from tests.browser import needs_chromium, screenshot


def some_pairs(count: int = 40) -> AllPairs:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(count, 300)) + np.repeat(rng.normal(size=(count // 8, 300)), 8, axis=0)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosine = (unit @ unit.T).astype(np.float32)
    sign = np.arccos(cosine.clip(-1, 1)) / np.pi
    sign[0, 1] = sign[1, 0] = np.nan
    labels = [f"experts/{'</script><b>' if i == 3 else ''}task-{i}" for i in range(count)]
    return AllPairs(
        labels, rng.uniform(1, 30, count), cosine, sign.astype(np.float32), np.full_like(cosine, 0.01)
    )


def data_of(path: Path) -> dict[str, object]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_it_holds_the_figures_and_asks_for_nothing(tmp_path: Path) -> None:
    pairs = some_pairs()
    path = write_pairs_page(tmp_path / "x.html", pairs, groups(pairs.cosine))
    data = data_of(path)
    assert data["labels"][3].endswith("task-3")
    assert data["cosine"][2][5] == pytest.approx(float(pairs.cosine[2, 5]), abs=1e-4)
    assert data["sign"][0][1] is None
    assert data["partners"][7] == most_compatible(pairs.sign_conflict, pairs.cosine, 7, 10)
    assert sorted(data["order"]) == list(range(40))
    text = path.read_text(encoding="utf-8")
    assert "5 groups of similar experts; 0 similar to no other." in text
    assert "standard error at most 0.01" in text
    assert text.count("</script>") == 2  # a label cannot close it
    assert not re.search(r'(src|href)="', text)
    assert "url(" not in text


def test_too_many(tmp_path: Path) -> None:
    count = 201
    pairs = AllPairs([str(i) for i in range(count)], np.ones(count), np.eye(count), np.eye(count))
    with pytest.raises(OptionError, match="200"):
        write_pairs_page(tmp_path / "x.html", pairs, groups(pairs.cosine))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_chromium
def test_a_browser_runs_it(tmp_path: Path) -> None:
    pairs = some_pairs()
    path = write_pairs_page(tmp_path / "x.html", pairs, groups(pairs.cosine))
    # An error in the page's script would end it before it has filled the table.
    probe = (
        "<script>console.log('partners', document.querySelectorAll('#partners tr').length)</script></body>"
    )
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    said = screenshot(path, tmp_path / "x.png")
    assert "partners 10" in said
    assert said.count("CONSOLE") == 1
    with Image.open(tmp_path / "x.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 200
