"""HydraLoRA's motivation: do LoRAs trained apart share their A, and does their B tell the domains apart?

The paper trains one LoRA a domain, all from one seed, and draws every factor by t-SNE: the A of one module coincide,
the B part by domain. But A starts at random, B at zero, and A moves little, so that one initial A alone draws that
picture. So each run is made twice: from an A that all runs of a replicate have in common, and from an A of its own.

Source: HydraLoRA (arXiv 2404.19245), section 2.3 and figure 3; the doubt about one seed: Ban & Ji (arXiv 2509.25414).

Departs: the paper reads from the figure that A learns what is common to the texts. That cannot be asked of runs that
have their A_0 in common: it alone makes every A the nearest of its module's, before the first step, and leaves training
nothing to add. So ``PICTURE`` asks how much of what one A_0 draws is owed to it, against runs with an A_0 each, and
``SHARED`` asks the paper's question where no A_0 can answer it. A small encoder on four domains of one task stands in
place of LLaMA-2-7B on subsets of Dolly, and no run on all of the text. Every run has a head and an order of the text of
its own, since here, unlike a language model's, the head is new: a common one would have made B alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import observe, plots
from lorascope.analysis.factor_embeddings import factored_updates
from lorascope.analysis.factor_sharing import numbers
from lorascope.analysis.seed_intervals import t_interval
from lorascope.inputs.sources import DOMAINS
from lorascope.methods import LoRA
from lorascope.probes.base import Arm, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.runs.run import Run

COMMON, OWN = "one A for all", "an A each"
BEFORE, AFTER = "before training", "after training"
_PAIRS = [(domain, order) for domain in DOMAINS for order in (1, 2)]
_QUICK = ("tweets", "products")  # the domains with the least text, since a quick run mostly reads it
_OWN = {pair: f"LoRA, {pair[0]}, order {pair[1]}, {OWN}" for pair in _PAIRS}
# What the first run draws is what the others have in common: it is one of both sets.
_COMMON = {pair: f"LoRA, {pair[0]}, order {pair[1]}, {COMMON}" for pair in _PAIRS} | {_PAIRS[0]: _OWN[_PAIRS[0]]}
SETS = {COMMON: _COMMON, OWN: _OWN}

_SHARED = "share of A whose nearest A of another domain is the same module's"
_SECTION = "section 2.3, figure 3"

SHARED = Claim(
    sentence="A is shared between domains more than B is, whatever A starts from.",
    statistic=f"{_SHARED}; an A_0 each, arrays as they are",
    control="the same for B, of the same runs",
    margin=0.1,
    source=_SECTION,
)
SHARED_SPACE = Claim(
    sentence="The row space of A is shared between domains more than the column space of B is.",
    statistic=f"{_SHARED}; an A_0 each, by overlap of row spaces",
    control="the same for B by column spaces, of the same runs",
    margin=0.1,
    source=_SECTION,
)
PICTURE = Claim(
    sentence="That the A of one module coincide in the figure is owed to their common A_0.",
    statistic=f"{_SHARED}; one A_0 for all, arrays as they are",
    control="the same with an A_0 each, of the same texts in the same orders",
    margin=0.1,
    source=_SECTION,
)
MEETING = Claim(
    sentence="Training brings the A of different domains together.",
    statistic=f"{_SHARED}; an A_0 each, by overlap of row spaces",
    control="the same before the first step",
    margin=0.1,
    source=_SECTION,
)
APART = Claim(
    sentence="B tells the domains apart.",
    statistic="share of B whose nearest B of its module is of its domain; one A_0 for all, arrays as they are",
    control="the same with the domains of the runs permuted",
    margin=0.1,
    source=_SECTION,
)
APART_SPACE = Claim(
    sentence="The column space of B tells the domains apart, whatever A starts from.",
    statistic="share of B whose nearest B of its module is of its domain; an A_0 each, by overlap of column spaces",
    control="the same with the domains of the runs permuted",
    margin=0.1,
    source=_SECTION,
)


def arms(quick: bool) -> list[Arm]:
    """A LoRA for each domain and two orders of its text, from a common A and from its own: 15 runs, 7 if quick."""
    steps = 6 if quick else 200
    settings = encoder_settings(quick) | {"steps": steps, "eval_every": 0, "eval_size": 50, "test_size": 200}
    settings |= {"observe": [observe.factors(every=steps)]}
    made = {}
    for start, labels in SETS.items():
        for number, ((domain, _), label) in enumerate(labels.items()):
            if quick and domain not in _QUICK:
                continue
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
    """Seeds that no two runs share, but for an A that is common to a replicate: that of its first run's seed."""
    first = seed * len(_PAIRS)
    method = arm.method
    if isinstance(method, LoRA) and method.init_seed is not None:
        method = replace(method, init_seed=first)
    return replace(arm, method=method, settings={**arm.settings, "seed": first + arm.settings["seed"]})


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Sharedness of A against B, against an A_0 each and before training, and of B its domain against permuted ones."""
    found = _measure_sharing(runs)

    def over_seeds(name: str, start: str, factor: str, view: str, when: str = AFTER) -> dict[int, float]:
        rows = found[(found[["start", "when", "factor", "view"]] == [start, when, factor, view]).all(axis=1)]
        return dict(zip(rows["replicate"], rows[name], strict=True))

    def shared(*place: str) -> dict[int, float]:
        return over_seeds("sharedness", *place)

    def apart(claim: Claim, start: str, view: str) -> Any:
        return claim.judge(*(over_seeds(name, start, "B", view) for name in ("neighbour", "neighbour_chance")))

    verdicts = [
        SHARED.judge(shared(OWN, "A", "raw"), shared(OWN, "B", "raw")),
        SHARED_SPACE.judge(shared(OWN, "A", "space"), shared(OWN, "B", "space")),
        PICTURE.judge(shared(COMMON, "A", "raw"), shared(OWN, "A", "raw")),
        MEETING.judge(shared(OWN, "A", "space"), shared(OWN, "A", "space", BEFORE)),
        apart(APART, COMMON, "raw"),
        apart(APART_SPACE, OWN, "space"),
    ]
    common, own = (_updates_by_domain(found[0]) for found in _sets(runs).values())
    exhibits = [
        exhibit("factor_embedding", plots.factor_embedding(common, control=own, seeds=(0, 1))),
        exhibit("factor_embedding", plots.factor_embedding(common, control=own, view="space")),
    ]
    notes = [
        f"Held fixed: model, task, batch size, number of steps. A seed is a replicate of {len(runs)} runs. Each run "
        "has its own head and order of the text; the A of the common set is that of its first run.",
        f"A moved by {' and by '.join(map(_relative_change, _sets(runs).values()))} of its initial norm, with one A "
        "for all and an A each.",
        "The pictures show the first replicate, with the runs of the common A above and those with an A each, the "
        "control, below. They enter no claim; the numbers depend on no picture.",
    ]
    return Findings(verdicts, exhibits, {"Sharedness and identity": table(found)}, notes)


def _sets(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, tuple[str, Run]]]]:
    """Of each set and replicate the runs: id -> (domain, run)."""
    found = {}
    for start, labels in SETS.items():
        held = [(domain, runs[label]) for (domain, _), label in labels.items() if label in runs]
        replicates = range(len(held[0][1]))
        found[start] = [{of[seed].id: (domain, of[seed]) for domain, of in held} for seed in replicates]
    return found


def _measure_sharing(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """``numbers`` of each set and replicate, before (of A alone: there is no B yet) and after training."""
    tables = []
    for start, replicates in _sets(runs).items():
        for seed, held in enumerate(replicates):
            domains = {id: domain for id, (domain, _) in held.items()}
            first, last = (
                {id: factored_updates(run.updates(step)) for id, (_, run) in held.items()} for step in (0, None)
            )
            parts = {BEFORE: numbers(first, domains, ("A",), ("raw", "space")), AFTER: numbers(last, domains)}
            tables += [part.assign(start=start, when=when, replicate=seed) for when, part in parts.items()]
    return pd.concat(tables, ignore_index=True)


def table(found: pd.DataFrame) -> pd.DataFrame:
    """All numbers, mean over replicates with half the interval; of p-values the largest."""
    rows, places = [], ["start", "when", "factor", "view"]
    for place, part in found.groupby(places, sort=False):

        def told(name: str, digits: int = 2, part: pd.DataFrame = part) -> str:
            values = part[name].to_numpy(np.float64)
            return "" if np.isnan(values).any() else t_interval(values).format(digits)

        rows.append(
            dict(zip(places, place, strict=True))
            | {"same module nearest": told("sharedness"), "by chance": told("sharedness_chance")}
            | {"cosine": told("cosine"), "angle (degrees)": told("angle", 0)}
            | {"own domain nearest": told("neighbour"), "if permuted": told("neighbour_chance")}
            | {"p": f"{part['neighbour_p'].max():.3f}", "silhouette": told("silhouette")}
            | {"p of it": f"{part['silhouette_p'].max():.3f}"}
        )
    return pd.DataFrame(rows)


def _updates_by_domain(runs: Mapping[str, tuple[str, Run]]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for domain, run in runs.values():
        found.setdefault(domain, []).append(run)
    return found


def _relative_change(replicates: Sequence[Mapping[str, tuple[str, Run]]]) -> str:
    """|A - A_0| / |A_0|, mean over modules and runs."""
    shares = []
    for held in replicates:
        for _, run in held.values():
            first, last = factored_updates(run.updates(0)), factored_updates(run.updates())
            shares += [np.linalg.norm(last[name].A - first[name].A) / np.linalg.norm(first[name].A) for name in last]
    return f"{np.mean(shares):.2f}"


PROBE = register(
    Probe(
        name="asymmetry",
        title="HydraLoRA's motivation: what A and B learn",
        source="Tian et al., HydraLoRA, arXiv 2404.19245",
        question="Do LoRAs of different domains share their A, by more than one initial A draws by itself?",
        quick_budget=40,
        arms=arms,
        judge=judge,
        seeds=4,
    )
)
