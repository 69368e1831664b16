"""Probe of HydraLoRA's motivation: similarity of A and of B between LoRAs trained on different domains.

The paper trains one LoRA per domain, all with the same seed, and plots every factor by t-SNE. The A's of one module
coincide, and the B's separate by domain. But A starts random, B starts at zero, and A changes little, so a shared
initial A (A_0) already explains the figure. Each run is therefore trained twice: with an A_0 that all runs of a
replicate share, and with a separate A_0.

Source: HydraLoRA (arXiv 2404.19245), section 2.3 and figure 3; the objection to a single seed: Ban & Ji (arXiv
2509.25414).

Departs:

- The paper concludes that A learns what the domains have in common. Runs with a shared A_0 cannot test this: before the
  first step, the nearest A of every A already belongs to the same module. ``PICTURE`` therefore compares runs with a
  shared A_0 and runs with separate A_0's, and ``SHARED`` tests the paper's conclusion with separate A_0's.
- A small encoder on four domains of one task instead of LLaMA-2-7B on subsets of Dolly, and no run on all domains.
- Every run has a separate classifier head and data order. The head is new here, unlike that of a language model, and a
  shared one would make the B's similar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from lorascope import observe
from lorascope.analysis.factor_embeddings import Factor, View, clouds, factored_updates
from lorascope.analysis.factor_sharing import numbers
from lorascope.evidence.statistics import asymmetry
from lorascope.inputs import tasks
from lorascope.inputs.sources import DOMAINS
from lorascope.inputs.task_parts import quarter
from lorascope.methods import LoRA
from lorascope.probes.base import (
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    format_mean,
    registered_factors,
)
from lorascope.probes.seed_statistics import BySeed, Runs, Statistic
from lorascope.runs.run import Run

COMMON, OWN = "shared initial A", "separate initial A's"
BEFORE, AFTER = "before training", "after training"
_PAIRS = [(domain, order) for domain in DOMAINS for order in (1, 2)]
_QUICK = ("tweets", "products")  # the smallest domains, because a quick run spends most of its time reading text
_OWN = {pair: f"LoRA, {pair[0]}, order {pair[1]}, separate A_0" for pair in _PAIRS}
# The first run is in both sets, because the other runs of the shared set start from its initial A.
_COMMON = {pair: f"LoRA, {pair[0]}, order {pair[1]}, shared A_0" for pair in _PAIRS} | {_PAIRS[0]: _OWN[_PAIRS[0]]}
SETS = {COMMON: _COMMON, OWN: _OWN}


def arms(quick: bool) -> list[Arm]:
    """Return the arms: LoRA for each domain in two data orders, with shared and with separate initial A's.

    There are 15 arms, or 7 in a quick run with two domains.
    """
    steps = 6 if quick else 200
    settings = encoder_settings(quick) | {"steps": steps, "eval_every": 0, "eval_size": 50, "test_size": 200}
    settings |= {"observe": [observe.factors(every=steps)]}
    made = {}
    for start, labels in SETS.items():
        for number, ((domain, _), label) in enumerate(labels.items()):
            if quick and domain not in _QUICK:
                continue
            # ``_replicate_arm`` replaces the 0 by the seed of the replicate's first run.
            method = LoRA(rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3, init_seed=0 if start == COMMON else None)
            made[label] = Arm(
                label=label,
                method=method,
                settings=settings | {"seed": number},
                task=f"sentiment/{domain}",
                cost=0.8,
                vary=_replicate_arm,
            )
    return list(made.values())


def registered() -> list[Arm]:
    """Return the registered arms: those of a full run, and two orders of each random quarter of the whole text."""
    settings = registered_factors(200) | {"eval_size": 200, "test_size": 200}
    shared = LoRA(rank=8, alpha=8.0, init_seed=0)
    quarters = [
        Arm(
            label=label,
            method=shared,
            settings=settings | {"seed": number},
            vary=partial(_quarter_arm, number // 2 + 1),
        )
        for number, label in enumerate(asymmetry.QUARTERS)
    ]
    domains = [replace(arm, settings=settings | {"seed": arm.settings["seed"]}) for arm in arms(quick=False)]
    return [*domains, *quarters]


def _quarter_arm(number: int, arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate on one of four random parts of the text, which the seed deals."""
    return _replicate_arm(replace(arm, task=quarter(tasks.load("sentiment"), number, seed)), seed)


def _replicate_arm(arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate, with a seed that no other run has.

    Runs with a shared A take the initial A of the replicate's first run.
    """
    first = seed * len(_PAIRS)  # so that the seeds of two replicates never overlap
    method = arm.method
    if isinstance(method, LoRA) and method.init_seed is not None:
        method = replace(method, init_seed=first)
    return replace(arm, method=method, settings={**arm.settings, "seed": first + arm.settings["seed"]})


KEYS = ["start", "when", "factor", "view"]  # of a row of ``numbers``


class Similarity(NamedTuple):
    """Runs of a replicate by set and domain, and the numbers of each set and replicate."""

    sets: dict[str, list[list[tuple[str, Run]]]]
    found: pd.DataFrame


def collect(runs: Runs) -> Similarity:
    """Compute ``numbers`` for each set and replicate, after training and, only for A, before training (B is zero)."""
    sets, tables = {}, []
    for start, labels in SETS.items():
        arms = [(domain, runs[label]) for (domain, _), label in labels.items() if label in runs]
        sets[start] = [[(domain, of[seed]) for domain, of in arms] for seed in range(len(arms[0][1]))]
        for seed, members in enumerate(sets[start]):
            domains = {run.id: domain for domain, run in members}
            first, last = ({run.id: factored_updates(run.updates(at)) for _, run in members} for at in (0, None))
            parts = {BEFORE: numbers(first, domains, ("A",), ("raw", "space")), AFTER: numbers(last, domains)}
            tables += [part.assign(start=start, when=when, replicate=seed) for when, part in parts.items()]
    return Similarity(sets, pd.concat(tables, ignore_index=True))


@dataclass(frozen=True)
class Number(Statistic):
    """One of the ``numbers`` of a set, by replicate."""

    name: str
    start: str
    factor: str
    view: str
    when: str = AFTER

    def __call__(self, data: Similarity) -> BySeed:
        rows = data.found[(data.found[KEYS] == [self.start, self.when, self.factor, self.view]).all(axis=1)]
        return dict(zip(rows["replicate"], rows[self.name], strict=True))


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


def figures(data: Similarity) -> list[ReportFigure]:
    """Draw the factors of the first replicate, as arrays and by their spaces."""
    common, own = (
        {domain: [r for d, r in sets[0] if d == domain] for domain, _ in sets[0]} for sets in data.sets.values()
    )
    return [
        draw("factor_embedding", common, control=own, seeds=(0, 1)),
        draw("factor_embedding", common, control=own, view="space"),
    ]


def table(found: pd.DataFrame) -> pd.DataFrame:
    """Tabulate all numbers: mean over replicates ± half the 95% t-interval, and the largest p-value."""
    titles = {"sharedness": "nearest: same module", "sharedness_chance": "chance", "cosine": "cosine"}
    titles |= {"angle": "angle (degrees)", "neighbour": "nearest: same domain", "neighbour_chance": "permuted"}
    titles |= {"neighbour_p": "p (nearest)", "silhouette": "silhouette", "silhouette_p": "p (silhouette)"}

    def summarize(values: pd.Series) -> str:
        if str(values.name).endswith("_p"):
            return f"{values.max():.3f}"
        return "" if values.isna().any() else format_mean(values, 0 if values.name == "angle" else 2)

    rows = found.groupby(KEYS, sort=False)[[*titles]].agg(summarize)
    return rows.rename(columns=titles).reset_index()


def relative_change(run: Run) -> float:
    """Compute ``|A - A_0| / |A_0|``, mean over modules."""
    first, last = factored_updates(run.updates(0)), factored_updates(run.updates())
    norm = np.linalg.norm
    return float(np.mean([norm(last[name].A - first[name].A) / norm(first[name].A) for name in last]))


def notes(data: Similarity) -> list[str]:
    """Return the notes, with the change of A in each set."""
    changes = {
        start: np.mean([relative_change(run) for members in replicates for _, run in members])
        for start, replicates in data.sets.items()
    }
    different = {run.id for replicates in data.sets.values() for _, run in replicates[0]}
    return [
        "Held fixed: model, task, batch size, number of steps. A seed is a replicate of "
        f"{len(different)} runs. Each run has a separate classifier head and data order. The replicate's first run "
        "provides the shared initial A.",
        "Relative change of A, |A - A_0| / |A_0|, mean over modules and runs: "
        + "; ".join(f"{change:.2f} with {start}" for start, change in changes.items())
        + ".",
        "The figures show the first replicate: runs with a shared initial A above, and the control with separate "
        "initial A's below. No claim uses the figures.",
    ]


PROBE = Probe(
    name="asymmetry",
    title="HydraLoRA's motivation: similarity of A and B between domains",
    source="Tian et al., HydraLoRA, arXiv 2404.19245",
    question="Are the A's of different domains similar because of training, or because of a shared initial A?",
    quick_budget=40,
    arms=arms,
    registered=registered,
    keep={
        (asymmetry.SIMILARITIES, labels[-1]): partial(keep_similarities, parts=parts)
        for labels, parts in COSINES.items()
    },
    collect=collect,
    claims={
        "asymmetry.raw": (Number("sharedness", OWN, "A", "raw"), Number("sharedness", OWN, "B", "raw")),
        "asymmetry.space": (Number("sharedness", OWN, "A", "space"), Number("sharedness", OWN, "B", "space")),
        "asymmetry.picture": (Number("sharedness", COMMON, "A", "raw"), Number("sharedness", OWN, "A", "raw")),
        "asymmetry.meeting": (Number("sharedness", OWN, "A", "space"), Number("sharedness", OWN, "A", "space", BEFORE)),
        "asymmetry.apart": (Number("neighbour", COMMON, "B", "raw"), Number("neighbour_chance", COMMON, "B", "raw")),
        "asymmetry.apart_space": (
            Number("neighbour", OWN, "B", "space"),
            Number("neighbour_chance", OWN, "B", "space"),
        ),
    },
    figures=figures,
    tables=lambda data: {"Similarity between and within domains": table(data.found)},
    notes=notes,
    seeds=4,
    former_labels={
        f"LoRA, {domain}, order {order}, an A each": _OWN[domain, order]  # prose: ok
        for domain, order in _PAIRS
    }
    | {f"LoRA, {domain}, order {order}, one A for all": _COMMON[domain, order] for domain, order in _PAIRS[1:]},
)
