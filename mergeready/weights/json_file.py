"""JSON from folders that others made, and for others to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergeready.errors import FormatError


def read_json_object(path: Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        advice: What to do about a broken one, as a sentence.

    Raises:
        FormatError: If it cannot be read, is not JSON, is nested too deeply, or holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "config.json"
        ...     _ = path.write_text('{"a": 1}')
        ...     read_json_object(path)
        {'a': 1}
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            " ".join(filter(None, (f"{path} cannot be read as JSON ({error}).", advice)))
        ) from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def finite(value: Any) -> Any:
    """Plain data with null where a number is not finite, which JSON cannot hold.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
