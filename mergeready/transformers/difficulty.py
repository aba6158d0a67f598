from __future__ import annotations

from transformers import Trainer

from mergeready.errors import OptionError, UnsupportedError
from mergeready.training.difficulty.ids import (
    ID_FIELD,
    LABEL_FIELD,
    carries_ids,
    collate_with_ids,
    with_example_ids,
)


def carry_ids(trainer: Trainer) -> None:
    """Let the examples of a Trainer's training set carry ids through collator and batch, once.

    Evaluation sets stay as they are.

    Raises:
        OptionError: If there is no training set.
        UnsupportedError: If examples are packed into rows, or one process drives several devices.
    """
    args = trainer.args
    asked = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
    if asked:
        raise UnsupportedError(
            f"`{asked[0]}` puts several examples into one row, so a row's loss is of no single example: turn it off "
            "to track difficulty."
        )
    if args.n_gpu > 1:
        raise UnsupportedError(
            "difficulty cannot be tracked where one process drives several devices: start one each, as torchrun does."
        )
    if trainer.train_dataset is None:
        raise OptionError("tracking difficulty needs the Trainer's `train_dataset`.")
    trainer.train_dataset = with_example_ids(trainer.train_dataset)
    trainer.data_collator = collate_with_ids(trainer.data_collator)
    # The Trainer removes what the model's signature does not name.
    trainer._set_signature_columns_if_needed()
    missing = [name for name in (ID_FIELD, LABEL_FIELD) if name not in trainer._signature_columns]
    trainer._signature_columns += missing


def require_ids(trainer: Trainer) -> None:
    """Check that examples carry ids.

    Raises:
        OptionError: If the callback came too late for that.
    """
    if not carries_ids(trainer.data_collator):
        raise OptionError(
            "the Trainer's examples carry no ids, as the callback was added to it later: pass it in `callbacks`, "
            "or call `callback.attach(trainer)`."
        )
