"""What can go wrong, by kind. Every message names the thing and says how to mend it."""

from collections.abc import Iterable


class MergeReadyError(Exception):
    """Root of all errors that mergeready raises on purpose."""


class FormatError(MergeReadyError):
    """A file or folder cannot be read as what it claims to be."""


class MismatchError(MergeReadyError):
    """Names or shapes of an expert do not fit the base."""


class BaseMismatchError(MismatchError):
    """An expert belongs to another base than the one it is used with."""


class UnsupportedError(MergeReadyError):
    """Something that cannot be merged or monitored exactly, and is therefore refused."""


class NotTrainedError(MergeReadyError):
    """An expert that equals its base: there is nothing to merge."""


class NonFiniteError(MergeReadyError):
    """NaN or infinite values where numbers are needed."""


class OptionError(MergeReadyError, ValueError):
    """An argument outside its allowed range."""


class OutputExistsError(MergeReadyError, FileExistsError):
    """The output is already there and nobody said that it may be replaced."""


class BusyError(MergeReadyError):
    """Another process is at work on the same output."""


class LostRankError(MergeReadyError):
    """Another process of the same job ended before its part was done."""


class EvaluationError(MergeReadyError):
    """An evaluation function raised, or returned something that is no measurement."""


class HistoryError(MergeReadyError):
    """The record of a run does not fit the run."""


def listing(items: Iterable[str], limit: int = 12) -> str:
    """Join names for a message: all of them when few, else the first ones and a count.

    >>> listing(["a", "b", "c"], limit=2)
    'a, b, and 1 more'
    """
    names = list(items)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"
