"""A copy of the package with more files, in which a test shows that nothing else has to be edited."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).parent


def build(folder: Path, files: Mapping[str, Path]) -> Path:
    """Link the package into a folder, with files at more places in it, such as ``methods/yours.py``."""
    package = TESTS.parent / "lorascope"
    shutil.copytree(package, folder / "lorascope", copy_function=os.symlink, ignore=shutil.ignore_patterns("*cache*"))
    for place, file in files.items():
        (folder / "lorascope" / place).symlink_to(file)
    return folder


def run_tests(folder: Path, *arguments: str) -> int:
    """Run tests with the package of a folder and return how many passed, all of which must."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={folder / 'temporary'}"]
    done = subprocess.run(
        [*command, *arguments], cwd=TESTS, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])
