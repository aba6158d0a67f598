"""Checks by level, from the file alone to merging with others; their report, its page and its model card section."""

from mergeready.validation import base_checks, card_checks, delta_checks, file_checks  # noqa: F401 - register
from mergeready.validation.check import CHECKS, Check, Verdict
from mergeready.validation.report import Report
from mergeready.validation.run import validate

__all__ = ["CHECKS", "Check", "Report", "Verdict", "validate"]
