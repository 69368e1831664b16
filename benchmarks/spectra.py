"""Time of singular values from factors: of a whole adapter, and of one module compared with a dense SVD.

The adapter is one of a 7B model: 224 modules of width 4096, rank 16.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from measurements import MeasuredLine
from paired import compare, report

from lorascope.updates import LowRank, spectra

SECONDS, SPEEDUP, REPEATED = 1.0, 1000, 100


def updates(count: int, side: int, rank: int, grown: bool) -> list[LowRank]:
    """Return random float32 factors; ``grown`` makes the columns of B almost parallel, as after a few steps."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        B, A = rng.standard_normal((side, rank)), rng.standard_normal((rank, side))
        B = B[:, :1] + 1e-4 * B if grown else B
        made.append(LowRank(B.astype(np.float32), A.astype(np.float32), 2.0))
    return made


def lines(pairs: int) -> Iterator[MeasuredLine]:
    """Yield the seconds of an adapter, with a quarter of the pairs, and the speedup of one module."""
    number = max(3, pairs // 4)
    for grown, case in ((False, "well-conditioned B"), (True, "ill-conditioned B")):
        adapter = updates(224, 4096, 16, grown)
        seconds = compare(lambda u=adapter: spectra(u), lambda u=adapter[:1]: spectra(u), number).seconds[0]
        yield MeasuredLine(what="spectra of the adapter", case=case, value=seconds, unit="s", pairs=number, aim=SECONDS)
    factored = updates(1, 1024, 16, grown=False)
    dense = factored[0].dense()
    ratio = compare(
        # Once is too short to time.
        lambda: [spectra(factored) for _ in range(REPEATED)],
        lambda: np.linalg.svd(dense, compute_uv=False),
        number,
    )
    yield ratio.inverse(REPEATED).line("dense SVD / SVD of the factors, width 1024", aim=SPEEDUP, at_least=True)


if __name__ == "__main__":
    report(lines, __doc__)
