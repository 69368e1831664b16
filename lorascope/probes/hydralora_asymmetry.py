"""Probe of HydraLoRA's motivation: similarity of A and of B between LoRAs trained on different domains.

The paper trains one LoRA per domain, all with the same seed, and plots every factor by t-SNE. The A's of one module
coincide, and the B's separate by domain. But A starts random, B starts at zero, and A changes little, so a shared
initial A (A_0) already explains the figure. Each run is therefore trained twice: with an A_0 that all runs of a
replicate share, and with a separate A_0.

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

from lorascope.analysis.factor_embeddings import Factor, View, clouds, factored_updates
from lorascope.evidence.statistics import asymmetry
from lorascope.inputs import tasks
from lorascope.inputs.task_parts import quarter
from lorascope.methods import LoRA
from lorascope.probes.base import Arm, Probe, factor_settings
from lorascope.runs.run import Run

_RUNS = len(asymmetry.OWN)
"""Number of runs of a set, and of the seeds that a replicate uses."""


def arms() -> list[Arm]:
    """Return the registered arms: two orders of each domain and of each random quarter of the text.

    The runs on domains have a shared and a separate initial A, those on quarters a shared one.
    """
    settings = factor_settings(200) | {"eval_size": 200, "test_size": 200}
    # ``_replicate_arm`` replaces the 0 by the seed of the replicate's first run.
    separate, shared = (LoRA(rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3, init_seed=seed) for seed in (None, 0))
    found: list[Arm] = []
    for labels, method in ((asymmetry.OWN, separate), (asymmetry.COMMON, shared), (asymmetry.QUARTERS, shared)):
        for number, label in enumerate(labels):
            # The first run is in both sets on domains, because the other runs of the shared set start from its A.
            if label in (arm.label for arm in found):
                continue
            on_quarter = labels is asymmetry.QUARTERS
            arm = Arm(
                label=label,
                method=method,
                settings=settings | {"seed": number},
                task="sentiment" if on_quarter else f"sentiment/{asymmetry.DOMAINS[number // 2]}",
                vary=partial(_quarter_arm, number // 2 + 1) if on_quarter else _replicate_arm,
            )
            found.append(arm)
    return found


def _quarter_arm(number: int, arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate on one of four random parts of the text, which the seed deals."""
    return _replicate_arm(replace(arm, task=quarter(tasks.load("sentiment"), number, seed)), seed)


def _replicate_arm(arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate, with a seed that no other run has.

    Runs with a shared A take the initial A of the replicate's first run.
    """
    first = seed * _RUNS  # so that the seeds of two replicates never overlap
    method = arm.method
    if isinstance(method, LoRA) and method.init_seed is not None:
        method = replace(method, init_seed=first)
    return replace(arm, method=method, settings={**arm.settings, "seed": first + arm.settings["seed"]})


COSINES: dict[tuple[str, ...], tuple[tuple[str, Factor, View], ...]] = {
    asymmetry.OWN: (("end", "A", "raw"), ("end", "A", "space"), ("end", "B", "space"), ("start", "A", "space")),
    asymmetry.COMMON: (("end", "A", "raw"), ("end", "B", "raw")),
    asymmetry.QUARTERS: (("end", "B", "raw"),),
}
"""Labels of the arms of a set -> when, factor and view of the cosines that claims use."""


def keep_similarities(run: Run, *others: Run, parts: Sequence[tuple[str, Factor, View]]) -> pd.DataFrame:
    """Return the kept table ``similarities`` of a set of runs; see ``evidence.statistics.asymmetry``.

    Parameters
    ----------
    run : Run
        Last run of the set.
    *others : Run
        Runs before it, in their order.
    parts : sequence of tuple
        When ("start" or "end"), factor and view of the cosines; see ``COSINES``.
    """
    runs, tables = (*others, run), []
    for when, factor, view in parts:
        updates = {
            str(number): factored_updates(one.updates(0 if when == "start" else None))
            for number, one in enumerate(runs)
        }
        for cloud in clouds(updates, dict.fromkeys(updates, ""), (factor,), view):
            first, second = np.triu_indices(len(cloud.flat), 1)
            (slot, one), (other, two) = (
                [part.astype(np.uint16) for part in np.divmod(points, len(runs))] for points in (first, second)
            )
            cosine = cloud.flat[first, second].astype(np.float16)
            columns = {"when": when, "factor": factor, "view": view, "shape": " x ".join(map(str, cloud.shape))}
            places = {"slot": slot, "first": one, "other": other, "second": two}
            tables.append(pd.DataFrame(columns | places | {"cosine": cosine}))
    return pd.concat(tables, ignore_index=True)


PROBE = Probe(
    name="asymmetry",
    title="HydraLoRA's motivation: similarity of A and B between domains",
    source="Tian et al., HydraLoRA, arXiv 2404.19245",
    question="Are the A's of different domains similar because of training, or because of a shared initial A?",
    arms=arms,
    keep={
        (asymmetry.SIMILARITIES, labels[-1]): partial(keep_similarities, parts=parts)
        for labels, parts in COSINES.items()
    },
)
