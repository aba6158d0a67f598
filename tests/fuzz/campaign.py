"""Reads many broken files; a reader may answer or refuse with an error of ours, and nothing else.

python -m tests.fuzz.campaign --seconds 600      # adds to benchmarks/results/fuzz.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from mergeready.errors import MergeReadyError
from tests.fuzz.mutations import mutate
from tests.fuzz.targets import Target, make_targets

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz.json"
SLOW_SECONDS = 5.0


@dataclass
class Outcomes:
    """What reading broken versions of one file gave."""

    read: int = 0
    refused: int = 0
    findings: dict[str, str] = field(default_factory=dict)


def attack(target: Target, seed: int, outcomes: Outcomes) -> None:
    """Read one broken version; the healthy file is back afterwards."""
    healthy = target.file.read_bytes()
    target.file.write_bytes(mutate(healthy, random.Random(seed)))
    began = time.process_time()  # a machine that is busy with something else is no finding
    try:
        target.read()
        outcomes.read += 1
    except MergeReadyError:
        outcomes.refused += 1
    except Exception as error:  # noqa: BLE001 - whatever else comes out is what is looked for
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "mergeready/" in f.filename]
        where = (
            f"{frames[-1].filename.rpartition('mergeready/')[2]}, {frames[-1].name}" if frames else "the test"
        )
        outcomes.findings.setdefault(f"{type(error).__name__} in {where}", f"seed {seed}: {str(error)[:120]}")
    finally:
        target.file.write_bytes(healthy)
    if time.process_time() - began > SLOW_SECONDS:
        outcomes.findings["slow"] = f"seed {seed}"


def run(seconds: float, first_seed: int) -> dict[str, Outcomes]:
    """Attack all targets in turn until the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        found = {target.name: Outcomes() for target in targets}
        end, seed = time.monotonic() + seconds, first_seed
        while time.monotonic() < end:
            for target in targets:
                attack(target, seed, found[target.name])
            seed += 1
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    found = run(arguments.seconds, arguments.first_seed)
    total = Counter({name: o.read + o.refused for name, o in found.items()})
    RESULT.write_text(
        json.dumps(
            {
                name: {"inputs": total[name], "refused": o.refused, "read": o.read, "findings": o.findings}
                for name, o in found.items()
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )
    print(json.dumps({name: vars(o) for name, o in found.items()}, indent=1))


if __name__ == "__main__":
    main()
