"""Chromium without a screen: what it draws, and whether it complains."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")


def screenshot(
    page: Path, picture: Path, *, width: int = 1100, height: int = 1200, dark: bool = False
) -> str:
    """Draw a page into a picture; returns what the browser's console said."""
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},{height}",
            f"--screenshot={picture}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
