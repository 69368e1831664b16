"""Benchmarks: measured lines with their aims, and the scripts that measure them.

A benchmark is a script in the folder ``benchmarks`` of the repository with a function ``lines(pairs)`` that yields
``MeasuredLine``s.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorascope.files.printable import printable
from lorascope.files.typed_json import read_json

PAIRS = 40
LARGEST_EXCESS = 1.03
"""Factor by which the end of an interval may miss the aim that the median reaches."""
BUSY = 0.5
"""Cores in use above which other work on the machine may have changed the times."""
_PACKAGES = ("lorascope", "torch", "numpy", "transformers", "peft", "safetensors")
_FUNCTION = re.compile(r"^def lines\(", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class MeasuredLine:
    """A measured number.

    Parameters
    ----------
    what : str
        What is measured, such as ``"LoRA step / PEFT's LoRA step"``.
    case : str
        Under which conditions, such as ``"8 x 16 tokens"``.
    value : float
        Median.
    low, high : float, optional
        Interval of 95%.
    unit : str
        Unit of the value, empty for a ratio.
    pairs : int
        Number of timed pairs, or of repeats.
    aim : float, optional
        Largest value, or smallest value if ``at_least``.
    at_least : bool
        Whether larger values are better.
    """

    what: str
    case: str = ""
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    pairs: int
    aim: float | None = None
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """``"met"`` if the value reaches the aim and its interval misses it by 3% at most, ``"missed"``, or no aim."""
        if self.aim is None:
            return "no aim"
        if self.at_least:
            met = self.value >= self.aim and (self.low is None or self.low >= self.aim / LARGEST_EXCESS)
        else:
            met = self.value <= self.aim and (self.high is None or self.high <= self.aim * LARGEST_EXCESS)
        return "met" if met else "missed"

    @property
    def measured(self) -> str:
        """The value with its interval and unit."""
        interval = "" if self.low is None or self.high is None else f" [{_digits(self.low)}, {_digits(self.high)}]"
        unit = "%" if self.unit == "%" else f" {self.unit}".rstrip()
        return f"{_digits(self.value)}{interval}{unit}"

    @property
    def goal(self) -> str:
        """The aim, such as ``"at most 1.02"``."""
        if self.aim is None:
            return "none"
        return f"{'at least' if self.at_least else 'at most'} {self.aim:g} {self.unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All lines of one script.

    Parameters
    ----------
    date : str
        Day of the measurement.
    machine : str
        Processor and number of cores.
    versions : dict of str
        Versions of Python and of the packages.
    load : float
        Cores in use during the second before the script; above 0.5 other work ran on the machine.
    lines : list of Line
    """

    date: str
    machine: str
    versions: dict[str, str]
    load: float
    lines: list[MeasuredLine]


def find_scripts(folder: Path) -> dict[str, Path]:
    """Return the benchmarks of a folder by name."""
    return {
        file.stem: file for file in sorted(folder.glob("*.py")) if _FUNCTION.search(file.read_text(encoding="utf-8"))
    }


def begin() -> Measurement:
    """Return the measurement that begins now on this machine, without lines."""
    import psutil

    cores = os.cpu_count() or 1
    return Measurement(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=f"{_processor()}, {cores} cores",
        versions={"python": platform.python_version()} | dict(_installed()),
        load=round(psutil.cpu_percent(interval=1) / 100 * cores, 1),
        lines=[],
    )


def run_script(script: Path, pairs: int) -> Iterator[MeasuredLine]:
    """Run a benchmark in its own process, and yield its lines as they are measured.

    Raises
    ------
    ChildProcessError
        If the script fails; the message is the last line of its output.
    """
    words = [sys.executable, str(script), "--json", "--pairs", str(pairs)]
    # A thread that waits without pause would count as CPU time. Scripts with more threads set their number.
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", env=os.environ | threads
        ) as process,
    ):
        for text in process.stdout or ():
            yield MeasuredLine(**json.loads(text))
        code = process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if code:
        raise ChildProcessError(said[-1] if said else f"exit code {code}")


def read(file: Path) -> dict[str, Measurement]:
    """Return the stored measurements by script; none if there is no file."""
    return read_json(file, dict[str, Measurement]) if file.exists() else {}


def write(file: Path, measurements: Mapping[str, Measurement]) -> None:
    """Store measurements by script."""
    file.write_text(json.dumps(to_json(measurements), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def to_json(measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """Return measurements by script as JSON values, with the verdict of each line."""
    found = {name: asdict(measurements[name]) for name in sorted(measurements)}
    for name, each in found.items():
        for line, values in zip(measurements[name].lines, each["lines"], strict=True):
            values["verdict"] = line.verdict
    return found


def text(line: MeasuredLine) -> str:
    """Return a line for the terminal."""
    what = f"{line.what}, {line.case}" if line.case else line.what
    verdict = "" if line.aim is None else f"   {line.verdict}, aim {line.goal}"
    return f"{what:<72} {line.measured:<24}{verdict}".rstrip()


def _digits(value: float) -> str:
    """Format a number with three digits, and with three decimals below 2, where ratios are compared."""
    decimals = 3 if value < 2 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _processor() -> str:
    """Return the name of the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return printable(found[1]) if found else platform.processor() or platform.machine()


def _installed() -> Iterator[tuple[str, str]]:
    """Yield the installed packages that the times depend on, without local versions such as ``+cpu``."""
    for package in _PACKAGES:
        try:
            yield package, version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
