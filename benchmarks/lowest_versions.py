"""The fast tests with the oldest versions of everything that pyproject.toml allows.

    python -m benchmarks.lowest_versions --torch 2.13.0+cpu --find-links /folder/of/wheels

Direct dependencies, with all extras, are pinned to their lower bounds and installed by ``uv`` (``pip install uv``) in a
fresh environment, and the tests run room by room. Results are kept after each room, and the command goes on where it
stopped while the versions are the same. torch is pinned to what ``--torch`` says, since old releases bring gigabytes of
CUDA libraries: its own lower bound is not tested here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "lowest_versions.json"


def bounds() -> dict[str, str]:
    """Every dependency of pyproject.toml, extras included, by its normalised name: what it must be."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]
    found = (re.fullmatch(r"([\w.-]+)(?:\[.*\])?(.*)", requirement) for requirement in wanted)
    pairs = ((normal(match[1]), match[2]) for match in found if match)
    return {name: bound for name, bound in pairs if name != "mergeready"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(uv: str, torch: str, options: list[str], folder: Path) -> Path:
    """The lowest versions, in a file that pip and uv read."""
    constraint, resolved = folder / "constraint.txt", folder / "lowest.txt"
    # A resolver left alone takes the newest of what they need themselves, and moves them up to fit.
    found = {name: re.match(r">=([\w.]+)", bound) for name, bound in bounds().items() if name != "torch"}
    pins = [f"{name}=={lowest[1]}" for name, lowest in found.items() if lowest]
    constraint.write_text("\n".join([f"torch=={torch}", *pins]) + "\n", encoding="utf-8")
    command = [uv, "pip", "compile", "-q", "--extra", "dev", "--no-annotate"]
    command += [
        "--python",
        sys.executable,
        "-c",
        str(constraint),
        *options,
        "pyproject.toml",
        "-o",
        str(resolved),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return resolved


def install(uv: str, resolved: Path, options: list[str], folder: Path) -> Path:
    """A fresh environment with these versions and this checkout."""
    python = folder / "environment" / "bin" / "python"
    if not python.is_file():
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(python.parents[1])], check=True)
    pip = [uv, "pip", "install", "-q", "--python", str(python)]
    subprocess.run([*pip, *options, "-r", str(resolved)], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    return python


def rooms() -> dict[str, list[str]]:
    """What is tested at once: each folder of tests/, the files beside them, and the package's own examples."""
    folders = sorted(path for path in (ROOT / "tests").iterdir() if any(path.glob("**/test_*.py")))
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    found = {path.name: [str(path.relative_to(ROOT))] for path in folders if path.is_dir()}
    return {**found, "files beside them": files, "docstrings": ["mergeready"]}


def test(python: Path, paths: list[str]) -> dict[str, Any]:
    """Outcomes of the fast tests below some paths."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", *paths, "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.is_file():
            raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
        cases = list(ElementTree.parse(report).iter("testcase"))
    broken = {f"{c.get('classname')}::{c.get('name')}": c for c in cases if failure(c) is not None}
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(broken) - skipped,
        "skipped": skipped,
        "failed": {name: str(failure(case).get("message"))[:300] for name, case in broken.items()},  # type: ignore[union-attr]
    }


def failure(case: ElementTree.Element) -> ElementTree.Element | None:
    found = case.find("failure")
    return case.find("error") if found is None else found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", required=True, help="the version of torch to test with")
    parser.add_argument("--find-links", help="where further wheels lie, such as torch's")
    parser.add_argument("--uv", default=shutil.which("uv") or "uv", help="the uv command")
    parser.add_argument(
        "--folder", type=Path, help="keep the environment here instead of in a temporary folder"
    )
    parser.add_argument("--rooms", nargs="*", help="only these, anew")
    given = parser.parse_args()
    options = ["--find-links", given.find_links] if given.find_links else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        resolved = resolve(given.uv, given.torch, options, folder)
        python = install(given.uv, resolved, options, folder)
        lines = re.findall(r"^([\w.-]+)==(\S+)", resolved.read_text(encoding="utf-8"), re.MULTILINE)
        installed = {normal(name): version for name, version in lines}
        versions = {n: {"bound": b, "tested": installed[n]} for n, b in sorted(bounds().items())}
        content: dict[str, Any] = {"python": sys.version.split()[0], "versions": versions, "rooms": {}}
        if RESULT.is_file():
            before = json.loads(RESULT.read_text(encoding="utf-8"))
            if before["versions"] == versions:
                content["rooms"] = before["rooms"]
        for room, paths in rooms().items():
            if room in content["rooms"] and not (given.rooms and room in given.rooms):
                continue
            if given.rooms and room not in given.rooms:
                continue
            content["rooms"][room] = found = test(python, paths)
            RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            print(f"{room}: {found['passed']} passed, {len(found['failed'])} failed", flush=True)


if __name__ == "__main__":
    main()
