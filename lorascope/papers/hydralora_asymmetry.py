"""HydraLoRA's motivation: whether A is shared between domains and B is not, and what the common start explains.

A replicate is a set of runs with one seed: two orders of each domain, or of each random quarter of one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from lorascope.analysis.factor_embeddings import FactorSet
from lorascope.analysis.factor_sharing import neighbour_fraction, sharedness
from lorascope.evidence.statistics.base import Constant, OfRun

DOMAINS = ("tweets", "movies", "products", "news")
_PAIRS = [(domain, order) for domain in DOMAINS for order in (1, 2)]
OWN = tuple(f"LoRA, {domain}, order {order}, separate A_0" for domain, order in _PAIRS)
# The first run is in both sets, because the other runs of the shared set start from its initial A.
COMMON = (OWN[0], *(f"LoRA, {domain}, order {order}, shared A_0" for domain, order in _PAIRS[1:]))
QUARTERS = tuple(f"LoRA, random quarter {n}, order {order}, shared A_0" for n in (1, 2, 3, 4) for order in (1, 2))
SIMILARITIES = "similarities"
"""Kept table ``when, factor, view, shape, slot, first, other, second, cosine``: cosines between the factors of a set.

The table of a set belongs to its last run. ``slot`` and ``other`` number the modules, ``first`` and ``second`` the runs
of the set in their order, two runs per domain.
"""


def factor_sets(table: pd.DataFrame, factor: str, view: str, when: str) -> list[FactorSet]:
    """Rebuild the sets of comparable factors from their cosines, one per shape."""
    rows = table[(table["factor"] == factor) & (table["view"] == view) & (table["when"] == when)]
    found = []
    for _, part in rows.groupby("shape", sort=False):
        slots, runs = int(part["slot"].max()) + 1, int(part["first"].max()) + 1
        cosine = np.full((slots, runs, slots, runs), np.nan)
        places = [part[name].to_numpy() for name in ("slot", "first", "other", "second")]
        cosine[*places] = part["cosine"].to_numpy(np.float64)
        cosine[*places[2:], *places[:2]] = part["cosine"].to_numpy(np.float64)
        names = [str(run // 2) for run in range(runs)]
        found.append(FactorSet((0,), list(map(str, range(slots))), [factor] * slots, names, names, cosine))
    return found


def shared(table: pd.DataFrame, factor: str, view: str, when: str) -> float:
    """Compute the fraction of factors whose nearest factor from another domain belongs to the same module."""
    return sharedness(factor_sets(table, factor, view, when))["sharedness"]


def apart(table: pd.DataFrame, view: str) -> float:
    """Compute the fraction of B's whose nearest B of the same module is of the same domain."""
    return neighbour_fraction(factor_sets(table, "B", view, "end"))


def sharing(arms: Sequence[str], factor: str, view: str, when: str = "end") -> OfRun:
    """Return the sharedness of a factor in a set of runs."""
    return OfRun(partial(shared, factor=factor, view=view, when=when), SIMILARITIES, arms[-1], tuple(arms[:-1]))


def own_domain(arms: Sequence[str], view: str) -> OfRun:
    """Return how many nearest B's are of the same domain in a set of runs."""
    return OfRun(partial(apart, view=view), SIMILARITIES, arms[-1], tuple(arms[:-1]))


# One of the seven other runs is of the same domain: the exact expectation when the domains are permuted.
CHANCE = Constant(1 / 7)

CLAIMS = {
    "asymmetry.space": (sharing(OWN, "A", "space"), sharing(OWN, "B", "space")),
    "asymmetry.picture": (sharing(COMMON, "A", "raw"), sharing(OWN, "A", "raw")),
    "asymmetry.meeting": (sharing(OWN, "A", "space"), sharing(OWN, "A", "space", "start")),
    "asymmetry.apart": (own_domain(COMMON, "raw"), CHANCE),
    "asymmetry.apart_space": (own_domain(OWN, "space"), CHANCE),
    "asymmetry.same_text": (own_domain(COMMON, "raw") - CHANCE, own_domain(QUARTERS, "raw") - CHANCE),
}
