"""What an expert is: a base, deltas relative to it, and the formats that hold them."""

from mergeready.experts.base import Base
from mergeready.experts.delta import Delta, Dense, LowRank, Rows, dense
from mergeready.experts.identity import BaseIdentity
from mergeready.experts.live import LiveExpert
from mergeready.experts.open import Expert, ExpertLike, open_expert
from mergeready.experts.task_vector import DeltaTaskVector, FullTaskVector, TaskVector, squared_norms

__all__ = [
    "Base",
    "BaseIdentity",
    "Delta",
    "DeltaTaskVector",
    "Dense",
    "Expert",
    "ExpertLike",
    "FullTaskVector",
    "LiveExpert",
    "LowRank",
    "Rows",
    "TaskVector",
    "dense",
    "open_expert",
    "squared_norms",
]
