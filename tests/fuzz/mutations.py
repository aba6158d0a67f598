"""Changes to files that a crash, a bad disk or somebody with bad intentions could make."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, 1e308)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "../../x",
    "\x00",
    "é" * 9,
    [],
    {},
    [[]],
    {"": {}},
    float("nan"),
)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes after each other."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = rng.choice(MUTATIONS)(content, rng)
    return content


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 16)) if changed else 0):
        changed[_early(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def drop_part(content: bytes, rng: random.Random) -> bytes:
    start = _early(content, rng)
    return content[:start] + content[start + rng.choice((1, 2, 8, 64)) :]


def repeat_part(content: bytes, rng: random.Random) -> bytes:
    start = _early(content, rng)
    part = content[start : start + rng.choice((1, 2, 8, 64))]
    return content[:start] + part * rng.choice((2, 2, 50)) + content[start:]


def insert_noise(content: bytes, rng: random.Random) -> bytes:
    start = _early(content, rng)
    return content[:start] + rng.randbytes(rng.choice((1, 4, 40))) + content[start:]


def change_number(content: bytes, rng: random.Random) -> bytes:
    """Replace a number that is written in digits."""
    places = list(re.finditer(rb"-?\d+", content[:20_000]))
    if not places:
        return content
    place = rng.choice(places)
    return content[: place.start()] + repr(rng.choice(NUMBERS)).encode() + content[place.end() :]


def change_first_word(content: bytes, rng: random.Random) -> bytes:
    """Replace the first eight bytes, where safetensors keep the header's length."""
    size = rng.choice((0, 1, 7, len(content), len(content) - 8, 2**32, 2**63, 2**64 - 1))
    return max(size, 0).to_bytes(8, "little") + content[8:]


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Replace a value or a key somewhere inside JSON: a whole file, a line of it, or a safetensors header."""
    start, stop = _json_part(content, rng)
    try:
        tree = json.loads(content[start:stop])
    except (ValueError, RecursionError):
        return content
    tree = _changed(tree, rng)
    new = json.dumps(tree).encode()
    if start == 8:  # keep the header's length true, so that what is inside gets read
        return len(new).to_bytes(8, "little") + new + content[stop:]
    return content[:start] + new + content[stop:]


def nest(content: bytes, rng: random.Random) -> bytes:
    depth = rng.choice((50, 5_000))
    start = _early(content, rng)
    return content[:start] + b"[" * depth + content[start:]


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, flip_bits, cut, drop_part, repeat_part, insert_noise, change_number, change_first_word,
    change_json, change_json, change_json, nest,
)  # fmt: skip


def _early(content: bytes | bytearray, rng: random.Random) -> int:
    """A place, most often near the start, where formats keep their structure."""
    return rng.randrange(max(1, min(len(content), rng.choice((16, 256, 4096, len(content) or 1)))))


def _json_part(content: bytes, rng: random.Random) -> tuple[int, int]:
    size = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and 8 + size <= len(content):
        return 8, 8 + size
    lines = content.split(b"\n")
    if len(lines) > 2 and all(line.startswith(b"{") for line in lines[:-1]):
        index = rng.randrange(len(lines) - 1)
        start = sum(len(line) + 1 for line in lines[:index])
        return start, start + len(lines[index])
    return 0, len(content)


def _changed(tree: Any, rng: random.Random) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if action < 0.2:
            return {**tree, rng.choice(("", "../x", "a.b", key + "x")): tree[key]}
        return {**tree, key: _changed(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        index = rng.randrange(len(tree))
        return [*tree[:index], _changed(tree[index], rng), *tree[index + 1 :]]
    return rng.choice(VALUES)
