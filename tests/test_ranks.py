"""Ranks of tests: what they would each spend most of their time with is done before they are forked."""

from __future__ import annotations

import sys

from tests.ranks import run_ranks


def missing() -> list[str]:
    frameworks = ("torch", "transformers", "accelerate", "peft", "lightning")
    return [name for name in frameworks if name not in sys.modules]


def test_ranks_begin_with_every_framework_imported() -> None:
    assert run_ranks(missing, 1) == [[]]
