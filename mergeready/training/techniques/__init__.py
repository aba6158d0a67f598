"""Techniques: what changes training so that the expert merges better, one file each."""

from mergeready.training.techniques import drift_penalty

__all__ = ["drift_penalty"]
