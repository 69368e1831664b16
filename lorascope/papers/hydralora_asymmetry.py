"""HydraLoRA's motivation: similarity of A and of B between LoRAs trained on different domains.

Are the A's of different domains similar because of training, or because of a shared initial A? The paper trains one
LoRA per domain, all with the same seed, and plots every factor by t-SNE. The A's of one module coincide, and the B's
separate by domain. But A starts random, B starts at zero, and A changes little, so a shared initial A (A_0) already
explains the figure. Each run is therefore trained twice: with an A_0 that all runs of a replicate share, and with a
separate A_0. A replicate is a set of runs with one seed: two orders of each domain, or of each random quarter of one
text.

Source: HydraLoRA (arXiv 2404.19245), section 2.3 and figure 3; the objection to a single seed: Ban & Ji (arXiv
2509.25414).

Departs:

- The paper concludes that A learns what the domains have in common. Runs with a shared A_0 cannot test this: before the
  first step, the nearest A of every A already belongs to the same module. The claim ``asymmetry.picture`` therefore
  compares runs with a shared A_0 and runs with separate A_0's, and ``asymmetry.space`` tests the paper's conclusion
  with separate A_0's.
- A small encoder on four domains of one task instead of LLaMA-2-7B on subsets of Dolly.
- Every run has a separate classifier head and data order. The head is new here, unlike that of a language model, and a
  shared one would make the B's similar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from lorascope.analysis.factor_embeddings import Factor, FactorSet, View, build_factor_sets, factored_updates
from lorascope.analysis.factor_sharing import neighbour_fraction, sharedness
from lorascope.papers.judging.statistics import Constant, OfRun
from lorascope.papers.probe import Arm, Probe, factor_settings
from lorascope.runs.run import Run

DOMAINS = ("tweets", "movies", "products", "news")
_PAIRS = [(domain, order) for domain in DOMAINS for order in (1, 2)]
OWN = tuple(f"LoRA, {domain}, order {order}, separate A_0" for domain, order in _PAIRS)

# The first run is in both sets, because the other runs of COMMON start from its initial A.
COMMON = (OWN[0], *(f"LoRA, {domain}, order {order}, shared A_0" for domain, order in _PAIRS[1:]))
QUARTERS = tuple(f"LoRA, random quarter {n}, order {order}, shared A_0" for n in (1, 2, 3, 4) for order in (1, 2))
SIMILARITIES = "similarities"
"""Kept table ``when, factor, view, shape, slot, first, other, second, cosine``: cosines between the factors of a set.

The table of a set belongs to its last run. ``slot`` and ``other`` number the modules, ``first`` and ``second`` the runs
of the set in their order, two runs per domain.
"""

_RUNS = len(OWN)
"""Number of runs of a set, and of the seeds that a replicate uses."""


def arms() -> list[Arm]:
    """Return the registered arms on HydraLoRA's asymmetry: two orders of each domain and of each random quarter.

    The runs on domains have a shared and a separate initial A, those on quarters a shared one.
    """
    from lorascope.methods import LoRA

    settings = factor_settings(200) | {"eval_size": 200, "test_size": 200}
    # ``_replicate_arm`` replaces the 0 by the seed of the replicate's first run.
    separate, shared = (LoRA(rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3, init_seed=seed) for seed in (None, 0))
    by_label: dict[str, Arm] = {}
    for labels, method in ((OWN, separate), (COMMON, shared), (QUARTERS, shared)):
        for number, label in enumerate(labels):
            arm = Arm(
                label=label,
                method=method,
                settings=settings | {"seed": number},
                task=f"sentiment/{DOMAINS[number // 2]}",
                vary=_replicate_arm,
            )
            if labels is QUARTERS:
                arm = replace(arm, task="sentiment", vary=partial(_quarter_arm, number // 2 + 1))
            by_label.setdefault(label, arm)  # the first run of OWN is in COMMON as well
    return list(by_label.values())


def _quarter_arm(number: int, arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate on one of four random parts of the text, which the seed deals."""
    from lorascope.inputs import tasks
    from lorascope.inputs.task_parts import quarter

    return _replicate_arm(replace(arm, task=quarter(tasks.load("sentiment"), number, seed)), seed)


def _replicate_arm(arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate, with a seed that no other run has.

    Runs with a shared A take the initial A of the replicate's first run.
    """
    from lorascope.methods import LoRA

    first = seed * _RUNS  # so that the seeds of two replicates never overlap
    method = arm.method
    if isinstance(method, LoRA) and method.init_seed is not None:  # a shared initial A
        method = replace(method, init_seed=first)
    return replace(arm, method=method, settings={**arm.settings, "seed": first + arm.settings["seed"]})


def factor_sets(table: pd.DataFrame, factor: str, view: str, when: str) -> list[FactorSet]:
    """Rebuild, for HydraLoRA's asymmetry, the sets of comparable factors from their cosines, one per shape."""
    rows = table[(table["factor"] == factor) & (table["view"] == view) & (table["when"] == when)]
    sets = []
    for _, of_shape in rows.groupby("shape", sort=False):
        slots, runs = int(of_shape["slot"].max()) + 1, int(of_shape["first"].max()) + 1
        # The table has one triangle without the diagonal, which no statistic reads.
        cosine = np.full((slots, runs, slots, runs), np.nan)
        slot, first, other, second = of_shape[["slot", "first", "other", "second"]].to_numpy().T
        cosine[slot, first, other, second] = of_shape["cosine"].to_numpy(np.float64)
        cosine[other, second, slot, first] = of_shape["cosine"].to_numpy(np.float64)
        names = [str(run // 2) for run in range(runs)]  # of the domains, each of which has two runs
        sets.append(FactorSet((0,), list(map(str, range(slots))), [factor] * slots, names, names, cosine))
    return sets


def shared(table: pd.DataFrame, factor: str, view: str, when: str) -> float:
    """Compute, for the asymmetry, the fraction of factors whose nearest one of another domain is of the same module."""
    return sharedness(factor_sets(table, factor, view, when))["sharedness"]


def apart(table: pd.DataFrame, view: str) -> float:
    """Compute, for the asymmetry, the fraction of B's whose nearest B of the same module is of the same domain."""
    return neighbour_fraction(factor_sets(table, "B", view, "end"))


def sharing(arms: Sequence[str], factor: str, view: str, when: str = "end") -> OfRun:
    """Return the sharedness of A or B in a set of runs, for a claim on their asymmetry."""
    return OfRun(partial(shared, factor=factor, view=view, when=when), SIMILARITIES, arms[-1], tuple(arms[:-1]))


def own_domain(arms: Sequence[str], view: str) -> OfRun:
    """Return how many nearest B's are of the same domain in a set of runs, for a claim on the asymmetry of A and B."""
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


COSINES: dict[tuple[str, ...], tuple[tuple[str, Factor, View], ...]] = {
    OWN: (("end", "A", "raw"), ("end", "A", "space"), ("end", "B", "space"), ("start", "A", "space")),
    COMMON: (("end", "A", "raw"), ("end", "B", "raw")),
    QUARTERS: (("end", "B", "raw"),),
}
"""Labels of the arms of a set -> when, factor and view of the cosines that claims use."""


def keep_similarities(run: Run, *earlier: Run, cosines: Sequence[tuple[str, Factor, View]]) -> pd.DataFrame:
    """Return the kept table ``similarities`` of a set of runs, on the asymmetry of A and B; see ``SIMILARITIES``.

    Parameters
    ----------
    run : Run
        Last run of the set.
    *earlier : Run
        Runs before it, in their order.
    cosines : sequence of tuple
        When ("start" or "end"), factor and view of the cosines; see ``COSINES``.
    """
    runs, tables = (*earlier, run), []
    for when, factor, view in cosines:
        step = 0 if when == "start" else None
        updates = {str(number): factored_updates(of_set.updates(step)) for number, of_set in enumerate(runs)}
        # The domains do not matter for cosines.
        for cloud in build_factor_sets(updates, dict.fromkeys(updates, ""), (factor,), view):
            pairs = np.triu_indices(len(cloud.flat), 1)
            (slot, other), (first, second) = (index.astype(np.uint16) for index in np.divmod(pairs, len(runs)))
            shape = " x ".join(map(str, cloud.shape))
            table = pd.DataFrame({"when": when, "factor": factor, "view": view, "shape": shape, "slot": slot})
            cosine = cloud.flat[pairs].astype(np.float16)
            tables.append(table.assign(first=first, other=other, second=second, cosine=cosine))
    return pd.concat(tables, ignore_index=True)


PROBE = Probe(
    name="asymmetry",
    title="HydraLoRA's motivation: similarity of A and B between domains",
    source="Tian et al., HydraLoRA, arXiv 2404.19245",
    question="Are the A's of different domains similar because of training, or because of a shared initial A?",
    arms=arms,
    keep={
        (SIMILARITIES, labels[-1]): partial(keep_similarities, cosines=cosines) for labels, cosines in COSINES.items()
    },
)
