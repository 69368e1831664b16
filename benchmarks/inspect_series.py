"""Time of ``lorascope inspect`` for 20 checkpoints of a 7B adapter, compared with one of them.

The times are CPU seconds of whole processes, which take turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from inspect_adapter import FALL, SHAPES, inspect, interval, measure, write
from measurements import MeasuredLine
from paired import report

CHECKPOINTS = 20


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the ratio and the memory; a process has an eighth of the pairs as repeats."""
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root, "out", f"checkpoint-{100 * (i + 1)}") for i in range(CHECKPOINTS)]
        for place, folder in enumerate(folders):
            folder.mkdir(parents=True)
            # The spectrum changes, so that no update equals the last one.
            write(folder, SHAPES["7B, rank 16"], FALL["gentle"] + place / CHECKPOINTS)
        both = [inspect(folder) for folder in (folders[-1], folders[0].parent)]
        rounds = np.array([[measure(words) for words in both] for _ in range(max(3, pairs // 8))])
    one, series = rounds[:, 0], rounds[:, 1]
    yield interval(f"{CHECKPOINTS} checkpoints / one of them", "", series[:, 0] / one[:, 0], aim=CHECKPOINTS)
    yield interval("peak memory of all", "", series[:, 1], "MB")


if __name__ == "__main__":
    report(lines, __doc__)
