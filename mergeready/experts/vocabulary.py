from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError
from mergeready.weights.json_file import read_json_object


@dataclass(frozen=True)
class Vocabulary:
    """Which token has which id, as the files of a tokenizer say, added tokens included.

    Attributes:
        ids: Token to id.
    """

    ids: Mapping[str, int]

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """The vocabulary of a model's folder; None where no file there gives all tokens.

        Raises:
            FormatError: If a file cannot be understood.
        """
        ids = dict(_tokens(folder))
        if not ids:
            return None
        return cls(ids | _ids(folder / "added_tokens.json"))

    @property
    def tokens(self) -> dict[int, str]:
        """Id to token."""
        return {index: token for token, index in self.ids.items()}


def _tokens(folder: Path) -> Iterator[tuple[str, int]]:
    path = folder / "tokenizer.json"
    content = _json(path)
    if content is not None:
        try:
            yield from _of_tokenizer(content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"{path} is not a tokenizer as `tokenizers` saves it ({error!r}).") from error
        return
    if (folder / "vocab.json").is_file():
        yield from _ids(folder / "vocab.json").items()
    elif (folder / "vocab.txt").is_file():
        try:
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        except ValueError as error:
            raise FormatError(f"{folder / 'vocab.txt'} is not text ({error}).") from error
        yield from ((token, index) for index, token in enumerate(lines) if token)


def _of_tokenizer(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, Mapping):
        yield from ((str(token), int(index)) for token, index in vocabulary.items())
    else:  # unigram: pairs of token and score, in the order of ids
        yield from ((str(token), index) for index, (token, _) in enumerate(vocabulary))
    for token in content.get("added_tokens") or ():
        yield str(token["content"]), int(token["id"])


def _ids(path: Path) -> dict[str, int]:
    content = _json(path) or {}
    if not all(isinstance(index, int) for index in content.values()):
        raise FormatError(f"{path} does not map tokens to ids.")
    return content


def _json(path: Path) -> dict[str, Any] | None:
    return read_json_object(path) if path.is_file() else None
