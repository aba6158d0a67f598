"""Techniques: what changes training so that the expert merges better, one file each."""

from mergeready.training.techniques import (
    distilled_finish,
    drift_penalty,
    jacobian_penalty,
    kronecker_filter,
    kronecker_penalty,
    lora_overlap,
    lora_start,
    norm_governor,
    peer_projection,
    plateau_schedule,
    sharpness_aware,
    simulated_merge,
    sparse_mask,
    train_only,
    weight_average,
)

__all__ = [
    "distilled_finish",
    "drift_penalty",
    "jacobian_penalty",
    "kronecker_filter",
    "kronecker_penalty",
    "lora_overlap",
    "lora_start",
    "norm_governor",
    "peer_projection",
    "plateau_schedule",
    "sharpness_aware",
    "simulated_merge",
    "sparse_mask",
    "train_only",
    "weight_average",
]
