"""Techniques: what changes training so that the expert merges better, one file each."""

from mergeready.training.techniques import (
    drift_penalty,
    jacobian_penalty,
    kronecker_penalty,
    lora_overlap,
    lora_start,
    peer_projection,
    sparse_mask,
    train_only,
)

__all__ = [
    "drift_penalty",
    "jacobian_penalty",
    "kronecker_penalty",
    "lora_overlap",
    "lora_start",
    "peer_projection",
    "sparse_mask",
    "train_only",
]
