"""Speedup of intruder dimensions on a base with known SVD, compared with the SVDs of the definition.

python benchmarks/intruders.py
"""

from __future__ import annotations

import argparse

import numpy as np
from paired import compare

from lorascope.analysis.intruders import bases, intruders
from lorascope.updates import Dense, LowRank
from lorascope.updates.linalg import one_thread

SIDE, RANK, K, SPEEDUP = 1024, 16, 10, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    W0 = rng.standard_normal((SIDE, SIDE)) / SIDE**0.5
    adapter = LowRank(rng.standard_normal((SIDE, RANK)), rng.standard_normal((RANK, SIDE)), 0.01)
    base = bases({"m": W0})
    U0 = base["m"].U
    matrix = W0 + adapter.dense()

    def two_decompositions() -> None:
        before, after = np.linalg.svd(W0)[0], np.linalg.svd(matrix)[0]
        np.abs(before.T @ after[:, :K]).max(axis=0)

    def one_decomposition() -> None:
        np.abs(U0.T @ np.linalg.svd(matrix)[0][:, :K]).max(axis=0)

    contestants = {
        "two SVDs / low-rank": (two_decompositions, adapter, SPEEDUP),
        "one SVD, base known / low-rank": (one_decomposition, adapter, SPEEDUP),
        "one SVD, base known / dense": (one_decomposition, Dense(adapter.dense()), 1),
    }
    with one_thread():
        for label, (definition, update, target) in contestants.items():
            ratio = compare(definition, lambda u=update: intruders(base, {"m": u}, K), arguments.pairs, warmup=1)
            verdict = "met" if ratio.low >= target else "MISSED"
            print(
                f"{label:<32} d={SIDE}  {ratio.median:.0f} [{ratio.low:.0f}, {ratio.high:.0f}]  "
                f"target {target} {verdict}  {ratio.seconds[0]:.2f} / {ratio.seconds[1]:.3f} s, {ratio.pairs} pairs"
            )


if __name__ == "__main__":
    main()
