"""Everything that is made from a study's results: Parquet, tables and figures."""

from __future__ import annotations

from pathlib import Path

from mergeready.study.figures import draw_study
from mergeready.study.results import Results
from mergeready.study.run import Runner
from mergeready.study.table import write_parquet
from mergeready.study.tables import tables
from mergeready.weights.atomic import new_file


def write_report(runner: Runner) -> list[Path]:
    """Write ``results.parquet``, ``tables.md`` and ``figures/`` beside the cells, from the cells alone.

    Returns:
        The files.
    """
    contents, settings = runner.results(), runner.settings
    results = Results(contents)
    runner.folder.mkdir(parents=True, exist_ok=True)
    parquet, text = runner.folder / "results.parquet", runner.folder / "tables.md"
    write_parquet(contents, parquet)
    with new_file(text) as temporary:
        temporary.write_text(tables(results, settings.name), encoding="utf-8")
    return [parquet, text, *draw_study(results, runner.folder / "figures")]
