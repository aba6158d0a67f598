"""Faces of free fonts from Debian packages, each with its style and its family."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from benchmarks.suites.fetch import fetch, pins
from benchmarks.suites.sampling import Split, fraction, rank_groups

STYLES = ("sans", "serif", "mono", "script")
FACES_PER_FAMILY = 6  # a family with forty weights would otherwise be half of the task

# Style of all faces of a package, looked up without the prefix "fonts-".
_PACKAGE_STYLES = {
    "sans": """adf-gillius adf-switzera adf-universalis adf-verana averia-sans-gwf b612 beteckna cabin cantarell
        clear-sans comfortaa crosextra-carlito dejavu-core dosis go junction jura karla lato league-spartan
        liberation2 manrope national-park open-sans play quicksand roboto-unhinted sora""",
    "serif": """adf-accanthis adf-baskervald adf-berenis adf-irianis adf-romande adf-tribun arapey
        averia-serif-gwf cardo century-catalogue crosextra-caladea ebgaramond essays1743 fanwood gfs-artemisia
        gfs-didot goudybookletter lindenhill oldstandard prociono quattrocento roboto-slab sil-gentium-basic
        summersby""",
    "mono": """3270 agave anonymous-pro courier-prime fantasque-sans firacode gnutypewriter hack inconsolata
        jetbrains-mono league-mono monofur mononoki""",
    "script": """breip bwht dancingscript dkg-handwriting ecolier-court femkeklaver isabella joscelyn
        kaushanscript kristi leckerli-one lobster lobstertwo rufscript""",
}

# File names that say otherwise. Verana's faces without "Sans" have serifs.
_FILE_STYLES = ((r"Mono", "mono"), (r"Serif|^Verana-", "serif"), (r"RomandeADFScript", "script"))

# Faces for another script, or with small capitals in place of lower-case letters.
_LEFT_OUT = re.compile(r"Tamil|Smallcaps|StyleStd|\[wght\]")


@dataclass(frozen=True, slots=True)
class Face:
    """One font file."""

    path: Path
    style: str
    family: str
    split: Split


@functools.cache
def faces() -> tuple[Face, ...]:
    """All faces in a fixed order; a family is a package, and belongs to one split only."""
    style_of = {f"fonts-{name}": style for style, names in _PACKAGE_STYLES.items() for name in names.split()}
    families: dict[str, list[str]] = {style: [] for style in STYLES}
    for family, style in sorted(style_of.items()):
        families[style].append(family)
    splits = rank_groups(families)
    versions = {name: version for kind, name, version in pins() if kind == "deb"}
    return tuple(
        Face(path, _style(path, style_of[family]), family, splits[family])
        for family in sorted(style_of)
        for path in _files(fetch("deb", family, versions[family]))
    )


def _files(folder: Path) -> list[Path]:
    """At most ``FACES_PER_FAMILY`` readable font files, one a face name, chosen by a hash of the name."""
    by_name: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.[ot]tf")):
        # A link to a file that Debian keeps in another package dangles here.
        if path.exists() and not _LEFT_OUT.search(path.stem) and _latin(path):
            by_name.setdefault(path.stem, path)
    chosen = sorted(by_name, key=fraction)[:FACES_PER_FAMILY]
    return [by_name[name] for name in sorted(chosen)]


def _latin(path: Path) -> bool:
    """Whether two letters of the face have ink and differ, which the box of a missing glyph does not."""
    font = ImageFont.truetype(str(path), 32, layout_engine=ImageFont.Layout.BASIC)
    masks = [bytes(font.getmask(letter)) for letter in "gR"]
    return all(any(mask) for mask in masks) and masks[0] != masks[1]


def _style(path: Path, default: str) -> str:
    return next((style for pattern, style in _FILE_STYLES if re.search(pattern, path.stem)), default)
