"""Time of singular values from factors: of a whole adapter, and of one module compared with a dense SVD.

python benchmarks/spectra.py
"""

from __future__ import annotations

import argparse

import numpy as np
from paired import compare

from lorascope.updates import LowRank, spectra

SECONDS, SPEEDUP = 1.0, 1000


def updates(count: int, side: int, rank: int, grown: bool) -> list[LowRank]:
    """Return random float32 factors; ``grown`` makes the columns of B almost parallel, as after a few steps."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        B, A = rng.standard_normal((side, rank)), rng.standard_normal((rank, side))
        B = B[:, :1] + 1e-4 * B if grown else B
        made.append(LowRank(B.astype(np.float32), A.astype(np.float32), 2.0))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    for grown, label in ((False, "fresh"), (True, "ill-conditioned B")):
        adapter = updates(224, 4096, 16, grown)
        one = adapter[:1]
        seconds = compare(lambda u=adapter: spectra(u), lambda u=one: spectra(u), arguments.pairs).seconds[0]
        verdict = "met" if seconds <= SECONDS else "MISSED"
        print(f"224 modules, d=4096, rank 16, {label:<18} {seconds:.3f} s      target {SECONDS:.0f} s {verdict}")
    factored = updates(1, 1024, 16, grown=False)
    dense = factored[0].dense()
    ratio = compare(
        lambda: np.linalg.svd(dense, compute_uv=False),
        lambda: [spectra(factored) for _ in range(100)],  # a single one is too short to time
        arguments.pairs,
    )
    speedup = [100 * value for value in (ratio.median, ratio.low, ratio.high)]
    verdict = "met" if speedup[0] >= SPEEDUP else "MISSED"
    print("dense SVD / from factors, d=1024   {:.0f} [{:.0f}, {:.0f}]   target".format(*speedup), SPEEDUP, verdict)


if __name__ == "__main__":
    main()
