"""What is published: both archives are built, looked into, and the wheel is installed where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import mergeready

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.network]


def run(*command: str | Path, folder: Path) -> str:
    """What a command prints; nothing of the checkout is importable for it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def new_environment(folder: Path) -> Path:
    """The Python of a fresh environment that has pip and nothing else."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("package")
    python = new_environment(folder / "builder")
    run(python, "-m", "pip", "install", "-q", "build", folder=folder)
    run(python, "-m", "build", "--outdir", folder / "dist", ROOT, folder=folder)
    return folder / "dist"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_wheel_works_where_nothing_else_is_installed(archives: Path, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "user")
    run(python, "-m", "pip", "install", "-q", "--no-deps", only(archives, "*.whl"), folder=tmp_path)
    code = "import mergeready; print(mergeready.__version__, mergeready.__file__)"
    version, place = run(python, "-c", code, folder=tmp_path).split(" ", 1)
    assert version == mergeready.__version__
    assert Path(place).is_relative_to(tmp_path)


def test_the_wheel_holds_all_files_of_the_package_and_no_others(archives: Path) -> None:
    with zipfile.ZipFile(only(archives, "*.whl")) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    kept = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "mergeready", folder=ROOT)
    assert held == set(kept.splitlines())
    assert held >= {
        "mergeready/py.typed",
        "mergeready/recommendations.yaml",
        "mergeready/validation/thresholds.yaml",
        "mergeready/validation/templates/page.html",
        "mergeready/metrics/templates/pairs.html",
        "mergeready/demo/data/suite.parquet",
    }


def test_the_source_archive_holds_what_users_and_packagers_read_and_run(archives: Path) -> None:
    with tarfile.open(only(archives, "*.tar.gz")) as source:
        held = {name.split("/", 1)[1] for name in source.getnames() if "/" in name}
    folders = [name for name in ("mergeready", "recipes", "examples", "tests") if (ROOT / name).is_dir()]
    kept = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, folder=ROOT)
    assert not set(kept.splitlines()) - held
    assert held >= {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "CITATION.cff",
        "constraints.txt",
        "pyproject.toml",
    }
