"""A plugin for axolotl, which calls its hooks by name; needs axolotl installed.

In the run's YAML::

    plugins:
      - mergeready.axolotl.MergeReadyPlugin
    mergeready:
      peers: [experts/math, experts/code]
      probe:
        merge: [ties]
        schedule: {every: 200}
      stop:
        merged_plateau: {patience: 3}

What ``mergeready:`` takes is :class:`~mergeready.training.settings.RunSettings`. History and picks go to
``<output_dir>/mergeready/``.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from mergeready.training.settings import RunSettings
from mergeready.transformers import MergeReadyCallback


class MergeReadyArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    mergeready: RunSettings | None = None


class MergeReadyPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not typed
    """Adds the callback to the run's trainer, before axolotl's own early stopping."""

    def get_input_args(self) -> str:
        return f"{MergeReadyArgs.__module__}.{MergeReadyArgs.__qualname__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [MergeReadyCallback(**RunSettings.parse(cfg.get("mergeready") or {}).options())]
