"""Which half of TSV-M bears long training: leaving out weak directions, or making the rest orthogonal?

    python -m benchmarks.tsv_parts           # fills benchmarks/results/study/tsv_parts
    python -m benchmarks.study_report        # writes the page

The overtraining study's experts, tasks and searches, with a merge that does the first half alone: each expert's
matrices are cut to the directions that TSV-M keeps, and added. All else is as in TSV-M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.late_updates import PICK, STUDY
from mergeready.errors import OptionError
from mergeready.experts.svd import thin_svd
from mergeready.merging.method import MergeMethod
from mergeready.merging.spectral import SpectralMethod
from mergeready.metrics.singular_interference import kept_directions
from mergeready.study.results import Results, Sample
from mergeready.study.run import Runner
from mergeready.study.settings import MergeChoice, load_study
from mergeready.study.tables import plain, signed

FOLDER = Path(__file__).parent / "results/study/tsv_parts"
CUT = "cut_sum"


@dataclass(frozen=True, kw_only=True)
class CutSum(SpectralMethod):
    """The sum of what TSV-M keeps of each expert, as it is. Not registered: it is an experiment, not a method."""

    name: ClassVar[str] = CUT

    def merge_changes(self, changes: Sequence[Tensor], side: int) -> Tensor:
        kept = kept_directions((side, side), len(changes))
        triples = [thin_svd(change, kept) for change in changes]
        return torch.stack([(U * values) @ V for U, values, V in triples]).sum(0)


class CutSumChoice(MergeChoice):
    """Like TSV-M's among a study's methods."""

    def make(self) -> MergeMethod:
        return CutSum()


def runner() -> Runner:
    """The study of the first half."""
    whole = load_study(STUDY)
    choice = CutSumChoice(method="tsv_m", scales=whole.methods["task_arithmetic"].scales)
    settings = whole.model_copy(
        update={"name": "tsv_parts", "steps": [PICK, max(whole.steps)], "methods": {CUT: choice}}
    )
    return Runner(settings, FOLDER, tell=print)


def results() -> Results:
    """What was computed so far."""
    return Results(runner().results())


def sentence(whole: Results, parts: Results) -> str:
    """What the first half alone does from the pick to the end, beside both methods it lies between.

    Args:
        whole: The overtraining study.
        parts: What this module computed.
    """
    arm, end = whole.labels("arm")[0], whole.steps(whole.labels("arm")[0])[-1]

    def change(of: Results, method: str) -> Sample:
        found = of.difference((arm, end, method), (arm, PICK, method))
        if found is None:
            raise OptionError(
                f"{method} was not computed at steps {PICK} and {end}; run benchmarks.tsv_parts."
            )
        return found

    cut, added, orthogonal = change(parts, CUT), change(whole, "task_arithmetic"), change(whole, "tsv_m")
    bears = {
        "leaving out weak directions": cut.minus(added),
        "making the rest orthogonal": orthogonal.minus(cut),
    }
    told = "; ".join(
        f"{what} makes {signed(by)} over seeds, {signed(by, examples=True)} over examples"
        for what, by in bears.items()
    )
    helps = [what for what, by in bears.items() if clearly_more(by)]
    claim = (
        f"So TSV-M bears long training by {' and by '.join(helps)}."
        if helps
        else "Neither is more than seeds and examples could make by chance."
    )
    return (
        "each expert cut to the directions that TSV-M keeps, and all added, without making them orthogonal "
        "(`benchmarks.tsv_parts`; all else as in TSV-M, so what is no matrix is averaged), has "
        f"{plain(parts.sample(arm, PICK, CUT))} at step {PICK} and {plain(parts.sample(arm, end, CUT))} at step {end}, "
        f"{signed(cut)} over seeds; task arithmetic {signed(added)}, TSV-M {signed(orthogonal)}. Of the difference "
        f"between their changes, {told}. {claim}"
    )


def clearly_more(difference: Sample) -> bool:
    """Whether a difference is above 0 by both intervals, over seeds and over examples."""
    lows = [estimate.low for estimate in (difference.over_seeds(), difference.over_examples())]
    return all(low is not None and low > 0 for low in lows)


def main() -> None:
    torch.set_num_threads(1)
    runner().run()


if __name__ == "__main__":
    main()
