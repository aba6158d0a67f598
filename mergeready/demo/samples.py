"""Data for recipes and examples that need no download: the demo's texts, and letters drawn with shipped fonts."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from mergeready.demo.tasks import load_tasks
from mergeready.errors import OptionError

_FACES = {
    "sans": "DejaVuSans",
    "sans bold": "DejaVuSans-Bold",
    "mono": "DejaVuSansMono",
    "serif": "DejaVuSerif",
    "serif bold": "DejaVuSerif-Bold",
    "serif italic": "DejaVuSerif-Italic",
    "math": "STIXGeneral",
    "math italic": "STIXGeneralItalic",
}
_LETTERS = "ABCDEFGHKLMNPRST"


def texts(task: str) -> DatasetDict:
    """One of the demo's text tasks: columns ``text`` and ``label``.

    Args:
        task: ``wordnet_noun``, ``wordnet_topic``, ``emoji_name`` or ``udhr`` (language).

    Raises:
        OptionError: If there is no such task.

    Example:
        >>> sorted(texts("wordnet_noun"))
        ['test', 'train', 'validation']
    """
    tasks = {found.name: found for found in load_tasks()}
    if task not in tasks:
        raise OptionError(f"the demo has no task {task!r}, only {', '.join(tasks)}.")
    chosen = tasks[task]
    names = ClassLabel(names=list(chosen.label_texts))
    features = Features({"text": Value("string"), "label": names})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"text": list(split.texts), "label": list(split.labels)}, features=features
            )
            for name, split in chosen.splits.items()
        }
    )


def definitions(task: str = "wordnet_noun") -> DatasetDict:
    """The same as texts to write: a prompt that asks, and a completion that answers."""

    def asked(row: dict[str, Any]) -> dict[str, str]:
        return {"prompt": f"{row['text']}\nThis is", "completion": f" {name(row['label'])}."}

    data = texts(task)
    name = data["train"].features["label"].int2str
    return data.map(asked, remove_columns=["text", "label"])


def letters(task: str = "letter", count: int = 640) -> DatasetDict:
    """Pictures of letters, 32 pixels wide: which letter it is, or which typeface.

    Args:
        task: ``letter`` or ``face``.
        count: Training examples; a quarter of that for validation and for testing.

    Raises:
        OptionError: If there is no such task.
    """
    if task not in ("letter", "face"):
        raise OptionError(f"letters have the tasks letter and face, not {task!r}.")
    names = list(_LETTERS) if task == "letter" else list(_FACES)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    made = {}
    for seed, (split, size) in enumerate(
        {"train": count, "validation": count // 4, "test": count // 4}.items()
    ):
        rng = np.random.default_rng(seed)
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for letter, face in zip(
            rng.integers(len(_LETTERS), size=size), rng.integers(len(_FACES), size=size), strict=True
        ):
            rows["image"].append(_picture(_LETTERS[letter], list(_FACES.values())[face], rng))
            rows["label"].append(int(letter if task == "letter" else face))
        made[split] = Dataset.from_dict(rows, features=features)
    return DatasetDict(made)


def _picture(letter: str, face: str, rng: np.random.Generator) -> Any:
    from matplotlib import get_data_path
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    paper, ink = int(rng.integers(150, 255)), int(rng.integers(0, 90))
    picture = Picture.new("L", (32, 32), paper)
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{face}.ttf", int(rng.integers(18, 27)))
    place = (16 + int(rng.integers(-3, 4)), 16 + int(rng.integers(-3, 4)))
    ImageDraw.Draw(picture).text(place, letter, fill=ink, font=font, anchor="mm")
    return picture.rotate(float(rng.uniform(-12, 12)), fillcolor=paper).convert("RGB")
