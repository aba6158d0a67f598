"""A report: every check's verdict, and what was validated against what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergeready.metrics.all_pairs import EstimatedComparison
from mergeready.validation.check import LEVELS, SEVERITIES, Level, Severity, Verdict
from mergeready.weights.json_file import finite

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """What validating an expert found.

    Attributes:
        expert: The expert, as it was named.
        level: The deepest level that was asked for.
        verdicts: One a check, in the order in which they ran.
        facts: Format, base, versions and whatever else a reader needs to repeat it.
        pairs: The expert beside its peers, where there are any.
    """

    expert: str
    level: Level
    verdicts: Sequence[Verdict]
    facts: Mapping[str, Any] = field(default_factory=dict)
    pairs: EstimatedComparison | None = None

    def failures(self, fail_on: Severity = "error") -> list[Verdict]:
        """Failed checks of at least this severity."""
        counted = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
        return [v for v in self.verdicts if v.status == "failed" and v.severity in counted]

    def exit_code(self, fail_on: Severity = "error") -> int:
        """0 where nothing that counts failed, 1 where something did; else 2 where a check could not run.

        That lacks a base, peers or an evaluation fails nothing; that one of them was given and does not open is no
        success either.
        """
        if self.failures(fail_on):
            return 1
        return 2 if any(verdict.could_not_run for verdict in self.verdicts) else 0

    @property
    def levels_checked(self) -> list[Level]:
        """Levels of which at least one check ran."""
        return [
            level
            for level in LEVELS
            if any(v.level == level and v.status != "not checked" for v in self.verdicts)
        ]

    @property
    def is_merge_ready(self) -> bool:
        """Whether every level was checked, by a merge as well, and no error was found. *Not checked* is not passed."""
        return list(LEVELS) == self.levels_checked and self._was_merged and not self.failures("error")

    @property
    def _was_merged(self) -> bool:
        """Whether a merge was judged: cosines and ranges of scales say nothing about what it keeps."""
        return any(
            v.level == LEVELS[-1] and v.severity == "error" and v.status != "not checked"
            for v in self.verdicts
        )

    @property
    def headline(self) -> str:
        """The whole report in one sentence, which claims nothing that was not checked."""
        unchecked = [level for level in LEVELS if level not in self.levels_checked]
        if unchecked:
            *before, last = unchecked
            levels = f"levels of {', '.join(before)} and {last}" if before else f"level of {last}"
            return f"Not a verdict on merging: nothing was checked on the {levels}."
        wrong = [verdict.id for verdict in self.failures("error")]
        if wrong:
            return f"Not merge-ready: {', '.join(wrong)} failed."
        if not self._was_merged:
            return "Not a verdict on merging: what it keeps when merged was not checked."
        return "Merge-ready: every level was checked."

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become null."""
        return {
            "schema": SCHEMA,
            "expert": self.expert,
            "level": self.level,
            "merge_ready": self.is_merge_ready,
            "levels_checked": self.levels_checked,
            "verdicts": [finite(verdict.to_json()) for verdict in self.verdicts],
            "facts": finite(self.facts),
            "pairs": None if self.pairs is None else self.pairs.to_json(),
        }
