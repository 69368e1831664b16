"""Time of ``lorascope inspect`` for many checkpoints of a large adapter, compared with one of them.

python benchmarks/inspect_series.py --shapes 7b --checkpoints 20

Prints wall-clock and CPU seconds and peak memory of both processes, and the ratio of their CPU seconds, which should
be at most the number of checkpoints.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from inspect_adapter import FALL, SHAPES, measure, programs, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["7b"])
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as root:
            folders = [Path(root, "out", f"checkpoint-{100 * (i + 1)}") for i in range(arguments.checkpoints)]
            for place, folder in enumerate(folders):
                folder.mkdir(parents=True)
                # The spectrum changes, so that no update equals the last one.
                write(folder, SHAPES[name], FALL["gentle"] + place / len(folders))
            words = [programs(folder, peers=False)["lorascope"] for folder in (folders[-1], folders[0].parent)]
            # The least of several is what the program takes; the rest is other work of the machine.
            one, series = np.min([[measure(each) for each in words] for _ in range(arguments.repeats)], axis=0)
        ratio = float(series[1] / one[1])
        for count, (wall, cpu, memory) in ((1, one), (len(folders), series)):
            print(f"{name} {count:>3} checkpoints  wall {wall:.2f} s  CPU {cpu:.2f} s  peak {memory:.0f} MB")
        met = "met" if ratio <= len(folders) else "MISSED"
        print(f"{name} ratio {ratio:.1f}, target {len(folders)} {met}", flush=True)


if __name__ == "__main__":
    main()
