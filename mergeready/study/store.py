"""Where a study keeps what it computed: one JSON file a run and a cell, each complete or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergeready.weights.atomic import new_file
from mergeready.weights.json_file import read_json_object


class Store:
    """The results of a study on disk.

    Args:
        folder: Where they are.

    Example:
        >>> from tempfile import mkdtemp
        >>> store = Store(Path(mkdtemp()))
        >>> store.write("cells", "plain/0/8/ties-2", {"digest": "d", "scale": 1.0})
        >>> store.read("cells", "plain/0/8/ties-2", "d")["scale"], store.read("cells", "plain/0/8/ties-2", "other")
        (1.0, None)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, kind: str, key: str, digest: str) -> dict[str, Any] | None:
        """What was kept under a key; None if nothing, or the result of other settings.

        Raises:
            FormatError: If the file is broken.
        """
        path = self._path(kind, key)
        if not path.is_file():
            return None
        content = read_json_object(path, "Remove it to compute it again.")
        return content if content.get("digest") == digest else None

    def write(self, kind: str, key: str, content: dict[str, Any]) -> None:
        """Keep a result; the file is replaced in one step."""
        path = self._path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(
                json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n",
                encoding="utf-8",
            )

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"
