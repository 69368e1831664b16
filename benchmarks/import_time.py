"""Time of ``import lorascope``: CPU seconds of a process minus an interpreter that imports nothing.

Run ``python benchmarks/import_time.py [--pairs 40]``. The torch row is the time saved because lorascope does not import
torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import numpy as np

SECONDS = 0.3


def cpu_seconds(code: str) -> float:
    """Return the user and system time of ``python -c code``."""
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"python -c {code!r} failed")
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    codes = ("pass", "import lorascope", "import torch")
    for code in codes:
        cpu_seconds(code)
    times = np.array([[cpu_seconds(code) for code in codes] for _ in range(pairs)])
    costs = times[:, 1:] - times[:, :1]
    low, lorascope, high = np.quantile(costs[:, 0], [0.25, 0.5, 0.75])
    verdict = "met" if lorascope <= SECONDS else "MISSED"
    print(f"import lorascope  {lorascope:.3f} s [quartiles {low:.3f}, {high:.3f}]  target {SECONDS} s {verdict}")
    print(f"import torch      {np.median(costs[:, 1]):.3f} s, {pairs} pairs")
    print(f"lorascope / torch {np.median(costs[:, 0] / costs[:, 1]):.4f}")


if __name__ == "__main__":
    main()
