"""Time of ``import lorascope``: CPU seconds of a process minus those of an interpreter that imports nothing.

The time of ``import torch`` is what is saved because lorascope imports it only where it trains.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
from measurements import MeasuredLine
from paired import median_interval, report

AIM = 0.3


def cpu_seconds(code: str) -> float:
    """Return the user and system time of ``python -c code``."""
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"python -c {code!r} failed")
    return usage.ru_utime + usage.ru_stime


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the seconds of both imports."""
    codes = {"pass": None, "import lorascope": AIM, "import torch": None}
    for code in codes:
        cpu_seconds(code)
    times = np.array([[cpu_seconds(code) for code in codes] for _ in range(pairs)])
    for number, (code, aim) in enumerate(codes.items()):
        if number:
            value, low, high = median_interval(times[:, number] - times[:, 0])
            yield MeasuredLine(what=f"`{code}`", value=value, low=low, high=high, unit="s", pairs=pairs, aim=aim)


if __name__ == "__main__":
    report(lines, __doc__)
