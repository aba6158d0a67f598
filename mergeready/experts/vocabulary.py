from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError


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
        added = _json(folder / "added_tokens.json") or {}
        return cls(ids | {str(token): int(index) for token, index in added.items()})

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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path} is not a tokenizer as `tokenizers` saves it ({error!r}).") from error
        return
    vocabulary = _json(folder / "vocab.json")
    if vocabulary is not None:
        yield from ((str(token), int(index)) for token, index in vocabulary.items())
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        yield from ((token, index) for index, token in enumerate(lines) if token)


def _of_tokenizer(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = content["model"].get("vocab", {})
    if isinstance(vocabulary, Mapping):
        yield from ((str(token), int(index)) for token, index in vocabulary.items())
    else:  # unigram: pairs of token and score, in the order of ids
        yield from ((str(token), index) for index, (token, _) in enumerate(vocabulary))
    for token in content.get("added_tokens") or ():
        yield str(token["content"]), int(token["id"])


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds no JSON object.")
    return content
