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

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis.factor_embeddings import factored_updates
from lorascope.analysis.factor_sharing import numbers
from lorascope.analysis.seed_intervals import t_interval
from lorascope.inputs.sources import DOMAINS
from lorascope.methods import LoRA
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim, Verdict
from lorascope.runs.run import Run

COMMON, OWN = "shared initial A", "separate initial A's"
BEFORE, AFTER = "before training", "after training"
_PAIRS = [(domain, order) for domain in DOMAINS for order in (1, 2)]
_QUICK = ("tweets", "products")  # the smallest domains, because a quick run spends most of its time reading text
_OWN = {pair: f"LoRA, {pair[0]}, order {pair[1]}, separate A_0" for pair in _PAIRS}
# The first run is in both sets, because the other runs of the shared set start from its initial A.
_COMMON = {pair: f"LoRA, {pair[0]}, order {pair[1]}, shared A_0" for pair in _PAIRS} | {_PAIRS[0]: _OWN[_PAIRS[0]]}
SETS = {COMMON: _COMMON, OWN: _OWN}

_SHARED = "fraction of A's whose nearest A from another domain belongs to the same module"
_IDENTITY = "fraction of B's whose nearest B of the same module is from the same domain"
_PERMUTED = "mean of this fraction when the domains of the runs are permuted"
_SECTION = "section 2.3, figure 3"

SHARED = Claim(
    sentence="A is more similar between domains than B, with separate initial A's.",
    statistic=f"{_SHARED}; separate A_0's, raw arrays",
    control="the same for the B's of the same runs",
    margin=0.1,
    source=_SECTION,
)
SHARED_SPACE = Claim(
    sentence="The row space of A is more similar between domains than the column space of B.",
    statistic=f"{_SHARED}; separate A_0's, by overlap of row spaces",
    control="the same for the B's of the same runs, by overlap of column spaces",
    margin=0.1,
    source=_SECTION,
)
PICTURE = Claim(
    sentence="The A's of one module coincide in the paper's figure because of their shared initial A.",
    statistic=f"{_SHARED}; shared A_0, raw arrays",
    control="the same with separate A_0's, on the same data in the same orders",
    margin=0.1,
    source=_SECTION,
)
MEETING = Claim(
    sentence="Training makes the A's of different domains more similar.",
    statistic=f"{_SHARED}; separate A_0's, by overlap of row spaces, after training",
    control="the same before training",
    margin=0.1,
    source=_SECTION,
)
APART = Claim(
    sentence="B's of the same domain are more similar than B's of different domains.",
    statistic=f"{_IDENTITY}; shared A_0, raw arrays",
    control=_PERMUTED,
    margin=0.1,
    source=_SECTION,
)
APART_SPACE = Claim(
    sentence="Column spaces of B are more similar within a domain than between domains, with separate initial A's.",
    statistic=f"{_IDENTITY}; separate A_0's, by overlap of column spaces",
    control=_PERMUTED,
    margin=0.1,
    source=_SECTION,
)


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


def _replicate_arm(arm: Arm, seed: int) -> Arm:
    """Return the arm of a replicate, with a seed that no other run has.

    Runs with a shared A take the initial A of the replicate's first run.
    """
    first = seed * len(_PAIRS)  # so that the seeds of two replicates never overlap
    method = arm.method
    if isinstance(method, LoRA) and method.init_seed is not None:
        method = replace(method, init_seed=first)
    return replace(arm, method=method, settings={**arm.settings, "seed": first + arm.settings["seed"]})


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Judge the similarity of A's and of B's between domains, before and after training, with both kinds of A_0."""
    found = _measure_sharing(runs)

    def over_seeds(name: str, start: str, factor: str, view: str, when: str = AFTER) -> dict[int, float]:
        rows = found[(found[["start", "when", "factor", "view"]] == [start, when, factor, view]).all(axis=1)]
        return dict(zip(rows["replicate"], rows[name], strict=True))

    def shared(*where: str) -> dict[int, float]:
        return over_seeds("sharedness", *where)

    def judge_identity(claim: Claim, start: str, view: str) -> Verdict:
        return claim.judge(*(over_seeds(name, start, "B", view) for name in ("neighbour", "neighbour_chance")))

    verdicts = [
        SHARED.judge(shared(OWN, "A", "raw"), shared(OWN, "B", "raw")),
        SHARED_SPACE.judge(shared(OWN, "A", "space"), shared(OWN, "B", "space")),
        PICTURE.judge(shared(COMMON, "A", "raw"), shared(OWN, "A", "raw")),
        MEETING.judge(shared(OWN, "A", "space"), shared(OWN, "A", "space", BEFORE)),
        judge_identity(APART, COMMON, "raw"),
        judge_identity(APART_SPACE, OWN, "space"),
    ]
    common, own = (_updates_by_domain(found[0]) for found in _sets(runs).values())
    figures = [
        make_report_figure("factor_embedding", plots.factor_embedding(common, control=own, seeds=(0, 1))),
        make_report_figure("factor_embedding", plots.factor_embedding(common, control=own, view="space")),
    ]
    notes = [
        f"Held fixed: model, task, batch size, number of steps. A seed is a replicate of {len(runs)} runs. Each run "
        "has a separate classifier head and data order. The replicate's first run provides the shared initial A.",
        "Relative change of A, |A - A_0| / |A_0|, mean over modules and runs: "
        + "; ".join(f"{_relative_change(replicates)} with {start}" for start, replicates in _sets(runs).items())
        + ".",
        "The figures show the first replicate: runs with a shared initial A above, and the control with separate "
        "initial A's below. No claim uses the figures.",
    ]
    return Findings(verdicts, figures, {"Similarity between and within domains": table(found)}, notes)


def _sets(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, tuple[str, Run]]]]:
    """Return the runs of each set and replicate: id -> (domain, run)."""
    found = {}
    for start, labels in SETS.items():
        arms = [(domain, runs[label]) for (domain, _), label in labels.items() if label in runs]
        replicates = range(len(arms[0][1]))
        found[start] = [{of[seed].id: (domain, of[seed]) for domain, of in arms} for seed in replicates]
    return found


def _measure_sharing(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Compute ``numbers`` for each set and replicate, after training and, only for A, before training (B is zero)."""
    tables = []
    for start, replicates in _sets(runs).items():
        for seed, members in enumerate(replicates):
            domains = {id: domain for id, (domain, _) in members.items()}
            first, last = (
                {id: factored_updates(run.updates(step)) for id, (_, run) in members.items()} for step in (0, None)
            )
            parts = {BEFORE: numbers(first, domains, ("A",), ("raw", "space")), AFTER: numbers(last, domains)}
            tables += [part.assign(start=start, when=when, replicate=seed) for when, part in parts.items()]
    return pd.concat(tables, ignore_index=True)


def table(found: pd.DataFrame) -> pd.DataFrame:
    """Tabulate all numbers: mean over replicates ± half the 95% t-interval, and the largest p-value."""
    rows, keys = [], ["start", "when", "factor", "view"]
    for key, part in found.groupby(keys, sort=False):

        def format_mean(name: str, digits: int = 2, part: pd.DataFrame = part) -> str:
            values = part[name].to_numpy(np.float64)
            return "" if np.isnan(values).any() else t_interval(values).format(digits)

        rows.append(
            dict(zip(keys, key, strict=True))
            | {"nearest: same module": format_mean("sharedness"), "chance": format_mean("sharedness_chance")}
            | {"cosine": format_mean("cosine"), "angle (degrees)": format_mean("angle", 0)}
            | {"nearest: same domain": format_mean("neighbour"), "permuted": format_mean("neighbour_chance")}
            | {"p (nearest)": f"{part['neighbour_p'].max():.3f}", "silhouette": format_mean("silhouette")}
            | {"p (silhouette)": f"{part['silhouette_p'].max():.3f}"}
        )
    return pd.DataFrame(rows)


def _updates_by_domain(runs: Mapping[str, tuple[str, Run]]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for domain, run in runs.values():
        found.setdefault(domain, []).append(run)
    return found


def _relative_change(replicates: Sequence[Mapping[str, tuple[str, Run]]]) -> str:
    """Format ``|A - A_0| / |A_0|``, mean over modules and runs."""
    changes = []
    for members in replicates:
        for _, run in members.values():
            first, last = factored_updates(run.updates(0)), factored_updates(run.updates())
            changes += [np.linalg.norm(last[name].A - first[name].A) / np.linalg.norm(first[name].A) for name in last]
    return f"{np.mean(changes):.2f}"


PROBE = register(
    Probe(
        name="asymmetry",
        title="HydraLoRA's motivation: similarity of A and B between domains",
        source="Tian et al., HydraLoRA, arXiv 2404.19245",
        question="Are the A's of different domains similar because of training, or because of a shared initial A?",
        quick_budget=40,
        arms=arms,
        judge=judge,
        seeds=4,
        former_labels={
            f"LoRA, {domain}, order {order}, an A each": _OWN[domain, order]  # prose: ok
            for domain, order in _PAIRS
        }
        | {f"LoRA, {domain}, order {order}, one A for all": _COMMON[domain, order] for domain, order in _PAIRS[1:]},
    )
)
