"""Speedup of intruder dimensions on a base with known SVD, compared with the SVDs of the definition.

The update has rank 16, the weight 1024 x 1024 entries. On one thread.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from measurements import MeasuredLine
from paired import compare, report

from lorascope.analysis.intruders import decompose_weights, find_intruders
from lorascope.updates import Dense, LowRank
from lorascope.updates.linalg import one_thread

SIDE, RANK, K, SPEEDUP = 1024, 16, 10, 10


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the speedup for each definition and form; a dense SVD takes seconds, so there is an eighth of the pairs."""
    rng = np.random.default_rng(0)
    W0 = rng.standard_normal((SIDE, SIDE)) / SIDE**0.5
    adapter = LowRank(rng.standard_normal((SIDE, RANK)), rng.standard_normal((RANK, SIDE)), 0.01)
    base = decompose_weights({"m": W0})
    U0 = base["m"].U
    matrix = W0 + adapter.dense()

    def two_decompositions() -> None:
        before, after = np.linalg.svd(W0)[0], np.linalg.svd(matrix)[0]
        np.abs(before.T @ after[:, :K]).max(axis=0)

    def one_decomposition() -> None:
        np.abs(U0.T @ np.linalg.svd(matrix)[0][:, :K]).max(axis=0)

    contestants = {
        "two dense SVDs / ours, low rank": (two_decompositions, adapter, SPEEDUP),
        "one dense SVD, the base's known / ours, low rank": (one_decomposition, adapter, SPEEDUP),
        "one dense SVD, the base's known / ours, dense update": (one_decomposition, Dense(adapter.dense()), 1),
    }
    with one_thread():
        for label, (definition, update, aim) in contestants.items():
            ratio = compare(
                definition, lambda u=update: find_intruders(base, {"m": u}, K), max(3, pairs // 8), warmup=1
            )
            yield ratio.line(label, aim=aim, at_least=True)


if __name__ == "__main__":
    report(lines, __doc__)
