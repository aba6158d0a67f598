from __future__ import annotations

from collections.abc import Iterable

from mergeready.errors import UnsupportedError, listing
from mergeready.training.techniques.trained import Trained


def require_whole(what: str, weights: Iterable[Trained]) -> None:
    """Raise unless this rank holds all of some parameters.

    Raises:
        UnsupportedError: If some are sharded; all are listed.
    """
    sharded = [weight.name for weight in weights if weight.block.sizes != weight.block.shape]
    if sharded:
        raise UnsupportedError(
            f"{what} works on whole matrices, and these are sharded: {listing(sharded, 4)}. Use DDP."
        )
