"""Updates of VeRA: frozen random factors, shared by all modules, scaled by two trained vectors.

    dW = diag(b) B diag(d) A

A and B are not stored, but drawn again: A (rank, largest in) and then B (largest out, rank) from one stream of 32-bit
words, uniform with He's bound sqrt(6 / fan_in). A module uses the first columns of A and the first rows of B.

Source: VeRA (arXiv 2310.11454), equation 2; drawn as in PEFT, whose generator is torch's MT19937.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from lorascope.array_types import Float
from lorascope.updates.low_rank import LowRank
from lorascope.updates.weight_update import Shapes


@lru_cache(maxsize=4)
def projections(
    seed: int, rank: int, widest_in: int, widest_out: int
) -> tuple[Float[np.ndarray, "rank widest_in"], Float[np.ndarray, "widest_out rank"]]:
    """Draw random projections A and B in float32, as ``uniform_`` of torch does on the CPU with this seed."""
    words = np.random.RandomState(seed)
    A = uniform_like_torch(words, (rank, widest_in), np.sqrt(6.0 / widest_in))
    B = uniform_like_torch(words, (widest_out, rank), np.sqrt(6.0 / rank))
    return A, B


def uniform_like_torch(
    words: np.random.RandomState, shape: tuple[int, ...], bound: float | None = None
) -> Float[np.ndarray, "..."]:
    """Draw random projections in float32 as torch does on the CPU: ``uniform_(-bound, bound)``, or ``rand`` if None."""
    # torch uses as many bits of a word as the significand of float32 has.
    bits = words.randint(0, 1 << 32, size=math.prod(shape), dtype=np.uint32) & np.uint32((1 << 24) - 1)
    values = bits * 2.0**-24
    if bound is not None:
        limit = float(np.float32(bound))
        values = values * (2 * limit) - limit  # rounded once, as by a fused multiply-add
    return values.astype(np.float32).reshape(shape)


class RandomProjection(LowRank, form="random_projection"):
    """Random projection with trained scales: the update diag(lambda_b) B diag(lambda_d) A, as one pair of factors."""

    required = frozenset({"lambda_b", "lambda_d", "projection"})
    constants = frozenset({"projection"})

    @classmethod
    def from_factors(cls, factors: Mapping[str, Any], scale: float = 1.0, exact: bool = True) -> RandomProjection:
        """Build an update from ``lambda_b`` (out,), ``lambda_d`` (rank,) and ``projection``.

        ``projection`` contains the seed of A and B, the largest in and largest out of all modules, and in of this one.
        """
        stored = {name: factors[name] for name in ("lambda_b", "lambda_d", "projection")}
        b, d, projection = stored.values()
        seed, widest_in, widest_out, inner = (int(value) for value in projection)
        A, B = projections(seed, len(d), widest_in, widest_out)
        return cls(b[:, None] * B[: len(b)], d[:, None] * A[:, :inner], stored=stored)

    @classmethod
    def fits(cls, shapes: Shapes, floats: Mapping[str, bool], arrays: Mapping[str, np.ndarray]) -> bool:
        """See `Update.fits`."""
        match shapes:
            case {"lambda_b": (outer,), "lambda_d": (rank,), "projection": (4,)} if (
                arrays["projection"].dtype.kind == "i"
            ):
                seed, widest_in, widest_out, inner = arrays["projection"].tolist()
                sound = 0 <= seed < 1 << 32 and 0 < inner <= widest_in and outer <= widest_out
                # The size is limited because A and B are drawn in memory.
                return sound and rank * max(widest_in, widest_out) <= 1 << 28
        return False
