"""Checks by level, from the file alone to merging with others; their report, its page and its model card section."""

from mergeready.validation import (  # noqa: F401 - each registers its checks
    base_checks,
    behaviour_checks,
    card_checks,
    composition_checks,
    delta_checks,
    file_checks,
    folder_checks,
    licence_checks,
    spectrum_checks,
    vocabulary_checks,
)
from mergeready.validation.check import CHECKS, Check, Verdict
from mergeready.validation.evaluation import Evaluation
from mergeready.validation.report import Report
from mergeready.validation.run import validate

__all__ = ["CHECKS", "Check", "Evaluation", "Report", "Verdict", "validate"]
