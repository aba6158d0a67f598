"""Fine-tune experts that merge well: measure, steer and verify composability while you train.

The names below are imported when they are first used: ``import mergeready`` loads neither torch nor any training
framework. The callbacks live in ``mergeready.transformers`` and its siblings, one module a framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeready.errors import MergeReadyError
    from mergeready.experts import Base, BaseIdentity, Expert, TaskVector, open_expert
    from mergeready.experts.factors import KroneckerFactors, sum_factors
    from mergeready.merging import MergedInPlace, MergePlan, merge, merge_adapters, merge_folders, merge_plan
    from mergeready.merging.tune import TunedScale, tune_scale
    from mergeready.metrics.compare import Comparison, compare
    from mergeready.metrics.inspection import Inspection, inspect
    from mergeready.metrics.late_part import LatePart, late_part, without_late_part
    from mergeready.metrics.prediction import Prediction, how_well_predicts
    from mergeready.metrics.subspaces import SubspaceComparison, compare_subspaces
    from mergeready.training.activations import input_grams
    from mergeready.training.adamerging import AdaMerging, adamerging
    from mergeready.training.confidence import Confidence, confidence
    from mergeready.training.curvature import fisher_information
    from mergeready.training.difficulty.cross_fit import cross_fitted_difficulty
    from mergeready.training.difficulty.ids import collate_with_ids, with_example_ids
    from mergeready.training.difficulty.measures import ExampleMeasures, example_measures
    from mergeready.training.difficulty.memorization import (
        Forgetting,
        accuracy_by_subset,
        auc_of_noise,
        easy_and_hard,
        forgetting_by_difficulty,
    )
    from mergeready.training.difficulty.noise import noisy_labels, with_label_noise
    from mergeready.training.difficulty.shares import gradient_norms, share_of_hardest
    from mergeready.training.difficulty.table import DifficultyTable
    from mergeready.training.difficulty.tracker import Difficulty, DifficultyTracker
    from mergeready.training.disentanglement import Disentanglement, disentanglement_error
    from mergeready.training.history import History, read_history
    from mergeready.training.input_gradients import input_gradient_distance
    from mergeready.training.kronecker import kronecker_factors, write_factors
    from mergeready.training.loop import MergeReadyLoop
    from mergeready.training.lora_start import share_lora_a, start_orthogonal
    from mergeready.training.lowest_fisher import lowest_fisher
    from mergeready.training.many_shot import ManyShot, many_shot
    from mergeready.training.monitor import Monitor
    from mergeready.training.peers import Peer
    from mergeready.training.picks import Picks
    from mergeready.training.policies import AllOf, AnyOf, Decision, ExpertPlateau, MergedPlateau, NormBudget
    from mergeready.training.probe import Probe
    from mergeready.training.recalibrate import Recalibration, recalibrate
    from mergeready.training.regmean_pp import regmean_pp
    from mergeready.training.schedule import Schedule
    from mergeready.training.similarity import LinearCka, representation_similarity
    from mergeready.training.surrogates import Surrogates
    from mergeready.training.techniques.distilled_finish import DistilledFinish
    from mergeready.training.techniques.drift_penalty import DriftPenalty
    from mergeready.training.techniques.jacobian_penalty import JacobianPenalty
    from mergeready.training.techniques.kronecker_filter import KroneckerFilter
    from mergeready.training.techniques.kronecker_penalty import KroneckerPenalty
    from mergeready.training.techniques.lora_overlap import LoraOverlap
    from mergeready.training.techniques.lora_start import OrthogonalStart, SharedLoraA
    from mergeready.training.techniques.norm_governor import NormGovernor
    from mergeready.training.techniques.peer_projection import PeerProjection
    from mergeready.training.techniques.plateau_schedule import PlateauSchedule
    from mergeready.training.techniques.sharpness_aware import SharpnessAware
    from mergeready.training.techniques.simulated_merge import SimulatedMerge
    from mergeready.training.techniques.sparse_mask import SparseMask
    from mergeready.training.techniques.train_only import TrainOnly
    from mergeready.training.techniques.weight_average import WeightAverage
    from mergeready.training.train_only import train_only
    from mergeready.validation.share import share_run

__version__ = "0.1.0"

_PLACES = {
    "mergeready.errors": ["MergeReadyError"],
    "mergeready.experts": ["Base", "BaseIdentity", "Expert", "TaskVector", "open_expert"],
    "mergeready.experts.factors": ["KroneckerFactors", "sum_factors"],
    "mergeready.merging": [
        "MergePlan",
        "MergedInPlace",
        "merge",
        "merge_adapters",
        "merge_folders",
        "merge_plan",
    ],
    "mergeready.merging.tune": ["TunedScale", "tune_scale"],
    "mergeready.metrics.compare": ["Comparison", "compare"],
    "mergeready.metrics.inspection": ["Inspection", "inspect"],
    "mergeready.metrics.late_part": ["LatePart", "late_part", "without_late_part"],
    "mergeready.metrics.prediction": ["Prediction", "how_well_predicts"],
    "mergeready.metrics.subspaces": ["SubspaceComparison", "compare_subspaces"],
    "mergeready.training.activations": ["input_grams"],
    "mergeready.training.adamerging": ["AdaMerging", "adamerging"],
    "mergeready.training.confidence": ["Confidence", "confidence"],
    "mergeready.training.curvature": ["fisher_information"],
    "mergeready.training.difficulty.cross_fit": ["cross_fitted_difficulty"],
    "mergeready.training.difficulty.ids": ["collate_with_ids", "with_example_ids"],
    "mergeready.training.difficulty.measures": ["ExampleMeasures", "example_measures"],
    "mergeready.training.difficulty.memorization": [
        "Forgetting",
        "accuracy_by_subset",
        "auc_of_noise",
        "easy_and_hard",
        "forgetting_by_difficulty",
    ],
    "mergeready.training.difficulty.noise": ["noisy_labels", "with_label_noise"],
    "mergeready.training.difficulty.shares": ["gradient_norms", "share_of_hardest"],
    "mergeready.training.difficulty.table": ["DifficultyTable"],
    "mergeready.training.difficulty.tracker": ["Difficulty", "DifficultyTracker"],
    "mergeready.training.disentanglement": ["Disentanglement", "disentanglement_error"],
    "mergeready.training.history": ["History", "read_history"],
    "mergeready.training.input_gradients": ["input_gradient_distance"],
    "mergeready.training.kronecker": ["kronecker_factors", "write_factors"],
    "mergeready.training.loop": ["MergeReadyLoop"],
    "mergeready.training.lora_start": ["share_lora_a", "start_orthogonal"],
    "mergeready.training.lowest_fisher": ["lowest_fisher"],
    "mergeready.training.many_shot": ["ManyShot", "many_shot"],
    "mergeready.training.monitor": ["Monitor"],
    "mergeready.training.peers": ["Peer"],
    "mergeready.training.picks": ["Picks"],
    "mergeready.training.policies": [
        "AllOf",
        "AnyOf",
        "Decision",
        "ExpertPlateau",
        "MergedPlateau",
        "NormBudget",
    ],
    "mergeready.training.probe": ["Probe"],
    "mergeready.training.recalibrate": ["Recalibration", "recalibrate"],
    "mergeready.training.regmean_pp": ["regmean_pp"],
    "mergeready.training.schedule": ["Schedule"],
    "mergeready.training.similarity": ["LinearCka", "representation_similarity"],
    "mergeready.training.surrogates": ["Surrogates"],
    "mergeready.training.techniques.distilled_finish": ["DistilledFinish"],
    "mergeready.training.techniques.drift_penalty": ["DriftPenalty"],
    "mergeready.training.techniques.jacobian_penalty": ["JacobianPenalty"],
    "mergeready.training.techniques.kronecker_filter": ["KroneckerFilter"],
    "mergeready.training.techniques.kronecker_penalty": ["KroneckerPenalty"],
    "mergeready.training.techniques.lora_overlap": ["LoraOverlap"],
    "mergeready.training.techniques.lora_start": ["OrthogonalStart", "SharedLoraA"],
    "mergeready.training.techniques.peer_projection": ["PeerProjection"],
    "mergeready.training.techniques.sparse_mask": ["SparseMask"],
    "mergeready.training.techniques.train_only": ["TrainOnly"],
    "mergeready.training.train_only": ["train_only"],
    "mergeready.validation.share": ["share_run"],
    "mergeready.training.techniques.norm_governor": ["NormGovernor"],
    "mergeready.training.techniques.plateau_schedule": ["PlateauSchedule"],
    "mergeready.training.techniques.sharpness_aware": ["SharpnessAware"],
    "mergeready.training.techniques.simulated_merge": ["SimulatedMerge"],
    "mergeready.training.techniques.weight_average": ["WeightAverage"],
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "AdaMerging",
    "AllOf",
    "AnyOf",
    "Base",
    "BaseIdentity",
    "Comparison",
    "Confidence",
    "Decision",
    "Difficulty",
    "DifficultyTable",
    "DifficultyTracker",
    "Disentanglement",
    "DistilledFinish",
    "DriftPenalty",
    "ExampleMeasures",
    "Expert",
    "ExpertPlateau",
    "Forgetting",
    "History",
    "Inspection",
    "JacobianPenalty",
    "KroneckerFactors",
    "KroneckerFilter",
    "KroneckerPenalty",
    "LatePart",
    "LinearCka",
    "LoraOverlap",
    "ManyShot",
    "MergePlan",
    "MergeReadyError",
    "MergeReadyLoop",
    "MergedInPlace",
    "MergedPlateau",
    "Monitor",
    "NormBudget",
    "NormGovernor",
    "OrthogonalStart",
    "Peer",
    "PeerProjection",
    "Picks",
    "PlateauSchedule",
    "Prediction",
    "Probe",
    "Recalibration",
    "Schedule",
    "SharedLoraA",
    "SharpnessAware",
    "SimulatedMerge",
    "SparseMask",
    "SubspaceComparison",
    "Surrogates",
    "TaskVector",
    "TrainOnly",
    "TunedScale",
    "WeightAverage",
    "accuracy_by_subset",
    "adamerging",
    "auc_of_noise",
    "collate_with_ids",
    "compare",
    "compare_subspaces",
    "confidence",
    "cross_fitted_difficulty",
    "disentanglement_error",
    "easy_and_hard",
    "example_measures",
    "fisher_information",
    "forgetting_by_difficulty",
    "gradient_norms",
    "how_well_predicts",
    "input_gradient_distance",
    "input_grams",
    "inspect",
    "kronecker_factors",
    "late_part",
    "lowest_fisher",
    "many_shot",
    "merge",
    "merge_adapters",
    "merge_folders",
    "merge_plan",
    "noisy_labels",
    "open_expert",
    "read_history",
    "recalibrate",
    "regmean_pp",
    "representation_similarity",
    "share_lora_a",
    "share_of_hardest",
    "share_run",
    "start_orthogonal",
    "sum_factors",
    "train_only",
    "tune_scale",
    "with_example_ids",
    "with_label_noise",
    "without_late_part",
    "write_factors",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACE_OF:
        raise AttributeError(f"module 'mergeready' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
