from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mergeready.errors import FormatError, OptionError
from mergeready.weights.atomic import new_file
from mergeready.weights.json_file import read_json_object

_WHOLE = ("id", "seen", "forgotten", "learned", "first_step", "last_step")


@dataclass(frozen=True, eq=False)
class DifficultyTable:
    """What is known of each example's difficulty; one array a column, in order of ids.

    Attributes:
        id: The example, int64.
        seen: How often it was seen in training.
        loss: Mean cross-entropy over these passes, in nats.
        loss_last: That of the last one.
        el2n: Mean ‖softmax(z) − onehot(y)‖₂.
        el2n_early: That of the last pass within the first steps, 32 by default; NaN if there was none.
        confidence: Mean probability of the true class.
        correct: Share of passes in which the true class was the likeliest.
        forgotten: Forgetting events: how often it was right, and wrong at the next pass (Toneva et al., arXiv
            1812.05159).
        learned: First step at which it was right; -1 for never.
        first_step: Step of the first pass.
        last_step: Step of the last pass.
    """

    id: NDArray[np.int64]
    seen: NDArray[np.int64]
    loss: NDArray[np.float64]
    loss_last: NDArray[np.float64]
    el2n: NDArray[np.float64]
    el2n_early: NDArray[np.float64]
    confidence: NDArray[np.float64]
    correct: NDArray[np.float64]
    forgotten: NDArray[np.int64]
    learned: NDArray[np.int64]
    first_step: NDArray[np.int64]
    last_step: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.id)

    @classmethod
    def of_one_pass(
        cls,
        ids: ArrayLike,
        *,
        loss: NDArray[np.float64],
        el2n: NDArray[np.float64],
        confidence: NDArray[np.float64],
        correct: NDArray[np.bool_],
    ) -> DifficultyTable:
        """A table of examples that were each seen once, at step 0, in any order.

        Raises:
            OptionError: If an id occurs twice, or columns differ in length.
        """
        known = np.asarray(ids, dtype=np.int64)
        order = np.argsort(known)
        if any(len(column) != len(known) for column in (loss, el2n, confidence, correct)):
            raise OptionError(f"a column does not have one number for each of {len(known)} ids.")
        if (np.diff(known[order]) == 0).any():
            raise OptionError("an id occurs twice: an example has one row.")
        known, correct = known[order], correct[order]
        loss, el2n, confidence = (column[order] for column in (loss, el2n, confidence))
        zeros = np.zeros(len(known), dtype=np.int64)
        return cls(
            id=known,
            seen=zeros + 1,
            loss=loss,
            loss_last=loss,
            el2n=el2n,
            el2n_early=el2n,
            confidence=confidence,
            correct=correct.astype(np.float64),
            forgotten=zeros,
            learned=np.where(correct, 0, -1),
            first_step=zeros,
            last_step=zeros,
        )

    def column(self, name: str, ids: ArrayLike) -> NDArray[np.float64]:
        """One column for some examples, in their order; NaN for those that were never seen.

        Raises:
            OptionError: If there is no such column.

        Example:
            >>> one = np.array([0.5])
            >>> table = DifficultyTable.of_one_pass([7], loss=one, el2n=one, confidence=one, correct=one > 1)
            >>> table.column("loss", [7, 8]).tolist()
            [0.5, nan]
        """
        if name not in _COLUMNS:
            raise OptionError(f"there is no column {name!r}, only {', '.join(_COLUMNS)}.")
        wanted = np.asarray(ids, dtype=np.int64)
        if not len(self.id):
            return np.full(wanted.shape, math.nan)
        place = np.searchsorted(self.id, wanted).clip(max=len(self.id) - 1)
        return np.where(self.id[place] == wanted, getattr(self, name)[place], math.nan)

    def write(self, path: Path) -> None:
        """Write the table: ``.parquet``, or ``.json`` with a list a column.

        Raises:
            OptionError: If the suffix is another.
        """
        columns = {name: getattr(self, name) for name in _COLUMNS}
        if path.suffix not in (".parquet", ".json"):
            raise OptionError(f"a table is written as .parquet or .json, not {path.name}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            if path.suffix == ".parquet":
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
            else:
                plain = {
                    name: [None if isinstance(v, float) and math.isnan(v) else v for v in values.tolist()]
                    for name, values in columns.items()
                }
                temporary.write_text(json.dumps(plain, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> DifficultyTable:
        """Read what :meth:`write` wrote.

        Raises:
            FormatError: If it is no such table.
        """
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                found = pyarrow.parquet.read_table(path).to_pydict()
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise FormatError(f"{path} cannot be read as Parquet ({error}).") from error
        else:
            found = read_json_object(path)
        missing = [name for name in _COLUMNS if name not in found]
        if missing:
            raise FormatError(f"{path} is no table of difficulties: it has no column {', '.join(missing)}.")
        try:
            columns = {name: _values(name, found[name]) for name in _COLUMNS}
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{path} holds columns that are no lists of numbers ({error}).") from error
        if len({column.shape for column in columns.values()}) > 1 or (np.diff(columns["id"]) <= 0).any():
            raise FormatError(
                f"{path} is no table of difficulties: its rows are not one an id, in order of ids."
            )
        return cls(**columns)


def _values(name: str, column: list[Any]) -> NDArray[Any]:
    if name in _WHOLE:
        return np.array(column, dtype=np.int64)
    return np.array([math.nan if value is None else value for value in column], dtype=np.float64)


_COLUMNS = tuple(field.name for field in fields(DifficultyTable))
