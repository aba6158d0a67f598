"""How task vectors grow and interfere: accumulators over pieces of parameters, and what their sums mean."""

from mergeready.metrics.gram import GramAccumulator
from mergeready.metrics.groups import GROUPS, group_of, layer_of
from mergeready.metrics.growth import growth_per_step
from mergeready.metrics.norms import NormAccumulator
from mergeready.metrics.rounding import RoundingAccumulator
from mergeready.metrics.sign_conflict import SignConflictAccumulator, chance_conflict
from mergeready.metrics.stream import Accumulator, Chunk, accumulate
from mergeready.metrics.top_mass import TopMassAccumulator

__all__ = [
    "GROUPS",
    "Accumulator",
    "Chunk",
    "GramAccumulator",
    "NormAccumulator",
    "RoundingAccumulator",
    "SignConflictAccumulator",
    "TopMassAccumulator",
    "accumulate",
    "chance_conflict",
    "group_of",
    "growth_per_step",
    "layer_of",
]
