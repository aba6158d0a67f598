from __future__ import annotations

from mergeready.errors import OptionError


def growth_per_step(step: int, norm: float, earlier_step: int = 0, earlier_norm: float = 0.0) -> float:
    """Growth of ‖τ‖ per training step since an earlier measurement; since the base by default.

    Raises:
        OptionError: If the earlier step is not earlier.

    >>> growth_per_step(30, 2.5, earlier_step=20, earlier_norm=2.0)
    0.05
    """
    if step <= earlier_step:
        raise OptionError(f"growth needs an earlier step than {step}, not {earlier_step}.")
    return (norm - earlier_norm) / (step - earlier_step)
