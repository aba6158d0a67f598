from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeready.errors import HistoryError, OptionError
from mergeready.training.difficulty.measures import example_measures
from mergeready.training.difficulty.shares import HARDEST, head_gradient_norms, share_of_hardest
from mergeready.training.difficulty.table import DifficultyTable
from mergeready.weights.atomic import new_file
from mergeready.weights.ranks import Ranks

TABLE_NAME = "difficulty.parquet"
STEPS_NAME = "difficulty_steps.json"

_MEASURED = ("loss", "el2n", "confidence", "correct", "gradient")
_SEEN = np.dtype([("step", "<i8"), ("id", "<i8"), *((name, "<f8") for name in _MEASURED)])
_EXAMPLE = np.dtype(
    [
        ("id", "<i8"),
        ("seen", "<i8"),
        ("right", "<i8"),
        ("forgotten", "<i8"),
        ("learned", "<i8"),
        ("first_step", "<i8"),
        ("last_step", "<i8"),
        ("was_right", "<i8"),
        ("loss", "<f8"),
        ("el2n", "<f8"),
        ("confidence", "<f8"),
        ("loss_last", "<f8"),
        ("el2n_early", "<f8"),
    ]
)
_STEP = np.dtype(
    [
        ("step", "<i8"),
        ("examples", "<i8"),
        ("loss", "<f8"),
        ("loss_share", "<f8"),
        ("gradient_share", "<f8"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How a run tracks which examples are hard.

    Attributes:
        early: Up to which step a pass counts for ``el2n_early``. The starting paper (arXiv 2506.14126) takes 32.
        hardest: Which share of a step's examples counts as the hardest, for the shares of loss and gradient that they
            carry.
        shift: Whether position t predicts label t + 1; None to go by the model's name, as causal language models
            shift.
        settle_every: Steps between updates of the table; until then observations wait where they were made.
    """

    early: int = 32
    hardest: float = HARDEST
    shift: bool | None = None
    settle_every: int = 50

    def __post_init__(self) -> None:
        if self.early < 0 or self.settle_every < 1 or not 0 < self.hardest <= 1:
            raise OptionError(
                f"`early` must not be negative, `settle_every` at least 1 and `hardest` in (0, 1], not {self.early}, "
                f"{self.settle_every} and {self.hardest}."
            )


class DifficultyTracker:
    """Learns from the forward passes of a training which examples are hard, and what share of each step they carry.

    Nothing is computed but a softmax of logits that are there anyway. An example that is seen twice within one step
    counts once, by its first pass: later ones may be at perturbed weights, as in sharpness-aware training. Over
    several ranks, observations are exchanged when they are settled, so every rank has the same table, that of one
    process that saw all.

    Memory: 104 bytes an example, and about as much for looking it up; 40 bytes a step.

    Args:
        settings: What to track.
        ranks: The processes of the run.

    Example:
        >>> tracker = DifficultyTracker()
        >>> for step in (1, 2):
        ...     tracker.observe(torch.tensor([7, 8]), torch.eye(2) * step, torch.tensor([0, 0]), step=step)
        >>> table = tracker.table()
        >>> table.id.tolist(), table.correct.tolist()
        ([7, 8], [1.0, 0.0])
    """

    def __init__(self, settings: Difficulty | None = None, ranks: Ranks | None = None) -> None:
        self.settings = settings or Difficulty()
        self.ranks = ranks or Ranks.alone()
        self.step = 1
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._row: dict[int, int] = {}
        self._examples = np.zeros(0, dtype=_EXAMPLE)
        self._steps = np.zeros(0, dtype=_STEP)
        self._counted = 0

    def observe(
        self,
        ids: Tensor,
        logits: Tensor,
        labels: Tensor,
        *,
        inputs: Tensor | None = None,
        bias: bool = True,
        shift: bool = False,
        step: int | None = None,
    ) -> None:
        """Note one forward pass of a training step.

        Args:
            ids: The examples' ids, (examples,).
            logits: As :func:`~mergeready.training.difficulty.measures.example_measures` takes them.
            labels: The same.
            inputs: What the last linear layer was given, (examples, features), for the share of gradients.
            bias: Whether that layer has a bias.
            shift: Whether position t predicts label t + 1; the settings come first.
            step: The step that the pass is part of, counted from 1; by default the one that runs.

        Raises:
            UnsupportedError: If there are no classes to be right about.
            OptionError: If shapes do not fit, as where several examples were packed into one row.
        """
        ids = ids.detach().reshape(-1)
        if len(ids) != len(logits):
            raise OptionError(
                f"{len(ids)} ids do not belong to {len(logits)} rows of logits. If examples are packed into rows, "
                "turn packing off: difficulty is tracked example by example."
            )
        shift = shift if self.settings.shift is None else self.settings.shift
        found = example_measures(logits, labels, shift=shift)
        gradient = torch.full_like(found.loss, torch.nan)
        if inputs is not None and inputs.ndim == 2 and len(inputs) == len(ids):
            gradient = head_gradient_norms(found.el2n, inputs.detach(), bias=bias)
        columns = [found.loss, found.el2n, found.confidence, found.correct.to(found.loss), gradient]
        # Stays where it is: fetching it now would make an accelerator wait.
        self._waiting.append((self.step if step is None else step, ids, torch.stack(columns)))

    def settle(self) -> None:
        """Take all that was observed into the table. A collective: every rank calls it after the same step."""
        own = [_seen(step, ids, values) for step, ids, values in self._waiting]
        self._waiting = []
        mine = np.concatenate(own) if own else np.zeros(0, dtype=_SEEN)
        found = np.concatenate([np.frombuffer(part, dtype=_SEEN) for part in self.ranks.each(mine.tobytes())])
        found = found[np.argsort(found["step"], kind="stable")]
        borders = np.flatnonzero(np.diff(found["step"])) + 1
        for group in np.split(found, borders):
            self._add(group)

    def table(self) -> DifficultyTable:
        """What is known of every example. Settles first."""
        self.settle()
        found = self._examples[: len(self._row)]
        found = found[np.argsort(found["id"])]
        seen = found["seen"]
        return DifficultyTable(
            loss=found["loss"] / seen,
            el2n=found["el2n"] / seen,
            confidence=found["confidence"] / seen,
            correct=found["right"] / seen,
            **{
                name: found[name].copy()
                for name in (
                    "id",
                    "seen",
                    "loss_last",
                    "el2n_early",
                    "forgotten",
                    "learned",
                    "first_step",
                    "last_step",
                )
            },
        )

    def steps(self) -> dict[str, NDArray[Any]]:
        """By step: number of examples, mean loss, and the shares of loss and gradient that its hardest carry.

        Settles first. Gradients are those of the last layer, in closed form; NaN where no such layer could be found.
        """
        self.settle()
        return {name: self._steps[name][: self._counted].copy() for name in _STEP.names or ()}

    def write(self, folder: Path) -> None:
        """Write ``difficulty.parquet`` and ``difficulty_steps.json``, on the first rank. A collective."""
        table, steps = self.table(), self.steps()
        plain = {
            name: [None if value != value else value for value in values.tolist()]  # NaN is no JSON
            for name, values in steps.items()
        }

        def on_disk() -> None:
            table.write(folder / TABLE_NAME)
            with new_file(folder / STEPS_NAME) as temporary:
                temporary.write_text(json.dumps(plain, allow_nan=False) + "\n", encoding="utf-8")

        self.ranks.on_first(on_disk)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, JSON-ready: some 50 to 100 bytes an example. Settles first."""
        self.settle()
        return {
            "examples": _packed(self._examples[: len(self._row)]),
            "steps": _packed(self._steps[: self._counted]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an earlier run.

        Raises:
            HistoryError: If the state is damaged.
        """
        self._examples = _unpacked(state.get("examples"), _EXAMPLE)
        self._steps = _unpacked(state.get("steps"), _STEP)
        self._counted = len(self._steps)
        self._row = {int(example): row for row, example in enumerate(self._examples["id"])}
        self._waiting = []

    def _add(self, group: NDArray[Any]) -> None:
        """One step's observations, in order of ranks."""
        _, first = np.unique(group["id"], return_index=True)
        group = group[np.sort(first)]
        group = group[np.isfinite(group["loss"])]  # where no position counts there is nothing to be learned
        if not len(group):
            return
        step = int(group["step"][0])
        rows = self._rows(group["id"], step)
        table, right = self._examples, group["correct"].astype(np.int64)
        table["seen"][rows] += 1
        table["right"][rows] += right
        table["forgotten"][rows] += (table["was_right"][rows] == 1) & (right == 0)
        table["was_right"][rows] = right
        table["learned"][rows] = np.where(
            (table["learned"][rows] < 0) & (right == 1), step, table["learned"][rows]
        )
        table["last_step"][rows] = step
        table["loss_last"][rows] = group["loss"]
        for name in ("loss", "el2n", "confidence"):
            table[name][rows] += group[name]
        if step <= self.settings.early:
            table["el2n_early"][rows] = group["el2n"]
        self._add_step(step, group)

    def _add_step(self, step: int, group: NDArray[Any]) -> None:
        share, gradient = self.settings.hardest, group["gradient"]
        carried = share_of_hardest(gradient, share) if np.isfinite(gradient).all() else np.nan
        loss = share_of_hardest(group["loss"].clip(min=0), share)
        if self._counted == len(self._steps):
            self._steps = np.concatenate([self._steps, np.zeros(max(self._counted, 256), dtype=_STEP)])
        self._steps[self._counted] = (step, len(group), group["loss"].mean(), loss, carried)
        self._counted += 1

    def _rows(self, ids: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        new = [int(example) for example in ids if int(example) not in self._row]
        needed = len(self._row) + len(new)
        if needed > len(self._examples):
            more = np.zeros(max(needed, 2 * len(self._examples)) - len(self._examples), dtype=_EXAMPLE)
            self._examples = np.concatenate([self._examples, more])
        for example in new:
            row = self._row[example] = len(self._row)
            self._examples[row] = np.zeros((), dtype=_EXAMPLE)
            self._examples["id"][row], self._examples["first_step"][row] = example, step
            self._examples["learned"][row], self._examples["el2n_early"][row] = -1, np.nan
        return np.array([self._row[int(example)] for example in ids], dtype=np.int64)


def _seen(step: int, ids: Tensor, values: Tensor) -> NDArray[Any]:
    made = np.zeros(len(ids), dtype=_SEEN)
    made["step"], made["id"] = step, ids.cpu().numpy()
    for name, column in zip(_MEASURED, values.double().cpu().numpy(), strict=True):
        made[name] = column
    return made


def _packed(rows: NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(rows.tobytes(), 1)).decode("ascii")


def _unpacked(text: object, dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        content = zlib.decompress(base64.b64decode(str(text), validate=True))
        return np.frombuffer(content, dtype=dtype).copy()
    except (ValueError, zlib.error) as error:
        raise HistoryError(
            f"the saved difficulties are damaged ({error}); resume from another checkpoint."
        ) from error
