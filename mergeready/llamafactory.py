"""Runs LLaMA-Factory with the callback: its YAML has no place for callbacks, its Python entry point has.

Write a ``mergeready:`` section into the run's YAML and start it with ``python -m mergeready.llamafactory run.yaml`` in
place of ``llamafactory-cli train run.yaml``; several processes with
``torchrun --nproc-per-node 8 -m mergeready.llamafactory run.yaml``::

    model_name_or_path: org/base
    stage: sft
    output_dir: saves/law
    mergeready:
      peers: [experts/math, experts/code]
      probe:
        merge: [ties]
      stop:
        merged_plateau: {patience: 3}

What ``mergeready:`` takes is :class:`~mergeready.training.settings.RunSettings`. History and picks go to
``<output_dir>/mergeready/``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError, MergeReadyError
from mergeready.training.settings import RunSettings
from mergeready.transformers import MergeReadyCallback
from mergeready.weights.yaml_text import read_yaml


def run(path: Path) -> None:
    """Train as a LLaMA-Factory configuration says, with the callback that its ``mergeready`` section describes.

    Raises:
        FormatError: If the file holds no settings by name.
        OptionError: If the section is not understood. Nothing was started.
    """
    content: Any = read_yaml(path)
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold settings by name, as LLaMA-Factory's YAML does.")
    settings = RunSettings.parse(content.pop("mergeready", None) or {})
    callback = MergeReadyCallback(**settings.options())

    from llamafactory.train.tuner import run_exp

    run_exp(args=content, callbacks=[callback])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: one YAML file."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) != 1:
        sys.stderr.write("usage: python -m mergeready.llamafactory RUN.yaml\n")
        return 2
    try:
        run(Path(given[0]))
    except (MergeReadyError, FileNotFoundError) as error:
        sys.stderr.write(f"mergeready: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
