"""The report as one self-contained HTML page: no network, light and dark, readable on a phone and on paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mergeready.metrics.labels import own_name
from mergeready.training.history import History
from mergeready.validation.check import LEVELS, Status
from mergeready.validation.pictures import figures, to_svg
from mergeready.validation.report import Report
from mergeready.weights.atomic import new_file

_SIGNS: Mapping[Status, str] = {"passed": "✓", "failed": "✗", "not checked": "–"}
_LEVEL_TITLES = {
    "file": "Its files",
    "base": "Its base and its change",
    "behaviour": "What it does",
    "composition": "What merging does",
}


def write_page(path: str | Path, report: Report, history: History | None = None) -> Path:
    """Write a report's page.

    Args:
        path: The HTML file.
        report: What validating found.
        history: The expert's training run, for its curves.

    Raises:
        OSError: If it cannot be written; an older page is left as it was then.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _code
    source = (files("mergeready.validation") / "templates" / "page.html").read_text(encoding="utf-8")
    html = environment.from_string(source).render(**_content(report, history))
    with new_file(Path(path)) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return Path(path)


def _content(report: Report, history: History | None) -> dict[str, Any]:
    drawn = figures(history, report.pairs).items()
    counts = {status: sum(v.status == status for v in report.verdicts) for status in _SIGNS}
    return {
        "name": own_name(report.expert),
        "headline": report.headline,
        "ready": report.is_merge_ready,
        "counts": counts,
        "errors": report.failures("error"),
        "signs": _SIGNS,
        "levels": [
            (_LEVEL_TITLES[level], [v for v in report.verdicts if v.level == level])
            for level in LEVELS
            if any(v.level == level for v in report.verdicts)
        ],
        "figures": [(title, to_svg(draw, f"figure{i}")) for i, (title, draw) in enumerate(drawn)],
        "facts": _rows(report.facts),
    }


def _code(text: str) -> Any:
    """Text with what stands between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def _rows(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            rows += _rows(value, f"{prefix}{key} ")
        elif value not in (None, [], ""):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}".replace("_", " "), shown))
    return rows
