"""Vocabularies as the `tokenizers` library writes them, and in the older files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models

from mergeready.errors import FormatError
from mergeready.experts.vocabulary import Vocabulary

WORDS = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
MODELS = {
    "word level": models.WordLevel(WORDS, unk_token="<unk>"),
    "word piece": models.WordPiece(WORDS, unk_token="<unk>"),
    "bpe": models.BPE(WORDS, [("a", "b")]),
    "unigram": models.Unigram([(word, -1.0) for word in WORDS], 0, byte_fallback=False),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_the_library_says(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(MODELS[kind])
    tokenizer.add_tokens(["law", AddedToken("<x>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.read(tmp_path)
    assert vocabulary is not None
    assert dict(vocabulary.ids) == tokenizer.get_vocab(with_added_tokens=True)
    assert vocabulary.tokens[5] == "<x>"


def test_older_files(tmp_path: Path) -> None:
    assert Vocabulary.read(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("<unk>\na\nb\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"law": 3}))
    assert Vocabulary.read(tmp_path) == Vocabulary({"<unk>": 0, "a": 1, "b": 2, "law": 3})
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "c": 1}))
    assert Vocabulary.read(tmp_path) == Vocabulary({"a": 0, "c": 1, "law": 3})


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "x"}}}']
)
def test_broken_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Vocabulary.read(tmp_path)
