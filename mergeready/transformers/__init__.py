"""The transformers shell: translates Trainer events for the monitor, and holds no logic of its own."""

from mergeready.transformers.callback import FOLDER_NAME, MergeReadyCallback

__all__ = ["FOLDER_NAME", "MergeReadyCallback"]
