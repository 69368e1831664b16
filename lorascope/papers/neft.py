"""NeFT: choice of the trained neurons.

Do the neurons that rotate most in full fine-tuning outperform others, are they stable and task-specific, and how does
their use change?

Source: NeFT (arXiv 2403.11621), section 5.2 and table 2 (quality), section 5.4 and table 6 (overlap), figure 3
(reversed selection), figure 4 (utilization), section 3 and table 1 (choice by linear probes).

Departs:

- A small encoder and two domains of one dataset instead of LLaMA-2 and translation.
- Neurons are chosen after a third of the steps; the authors find choices after a quarter equally good.
- Two controls are this project's own: random neurons of the same number, and the expected overlap of random choices
  with the same number of neurons per module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis import norms, selected_neurons
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.statistics import Accuracy, OfPairs, Reads, Statistic, average
from lorascope.papers.judging.study_statistics import Comparison, Constant, OfTable, pair
from lorascope.papers.lora import FULL, LOW
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import STEPS, Student, planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.runs.run import Run
from lorascope.schema.module_roles import FFN

CHANGED, RANDOM, PROBED = "NeFT, 9%", "NeFT, 9%, random", "NeFT, 9%, linear probes"
FEW, REVERSED = "NeFT, 3%", "NeFT, 3% and 6% reversed"
MOVIES, TWEETS = "NeFT, choice only, movies", "NeFT, choice only, tweets"
SELECTED = "selected"
"""Kept table ``module, size, pool, neuron``: selected neurons, number of neurons of the module and of all modules."""

UTILIZATION = "utilization"
"""Kept table ``role, rank``: rank of every neuron by utilization within its role, in a fixed order."""


def arms() -> list[Arm]:
    """Return the registered arms of the NeFT paper: four choices, fewer neurons, and its choice on two domains."""
    from lorascope import observe
    from lorascope.methods import NeFT

    settings = encoder_settings()
    steps = settings["steps"]
    # Only arms whose utilization ranks are compared record them, and only once.
    recorded = encoder_settings(steps, observe.utilization(every=steps))
    # The tuning before the choice has the middle rate of full fine-tuning, at any rate of the neurons.
    nine = NeFT(parameter_share=0.09, tune_steps=steps // 3, tune_lr=1e-4)
    three = replace(nine, parameter_share=0.03)
    # One step suffices for arms that only choose neurons.
    choice: dict[str, Any] = encoder_settings(1)
    return [
        Arm(label=CHANGED, method=nine, settings=recorded),
        Arm(label=RANDOM, method=replace(nine, select_by="random"), settings=settings),
        Arm(label=PROBED, method=replace(nine, select_by="probed"), settings=settings),
        Arm(label=FEW, method=three, settings=recorded),
        Arm(label=REVERSED, method=replace(three, reversed_share=0.06), settings=recorded),
        Arm(label=MOVIES, method=nine, task="sentiment/movies", settings=choice),
        Arm(label=TWEETS, method=nine, task="sentiment/tweets", settings=choice),
    ]


SPARSE = (truth_names.FEW_NEURONS, truth_names.ALL_NEURONS)
"""Truths of NeFT's pairs: the teacher changes 9 of 96 neurons per feed-forward module, or all of them."""
ROTATED_NEURONS, PLANTED_NEURONS, RANDOM_NEURONS = "NeFT, 108 neurons", "NeFT, planted neurons", "NeFT, random neurons"


def study_arms() -> list[Arm]:
    """Return the arms of NeFT's pairs; full fine-tuning also records the neurons' scores."""
    from lorascope import observe
    from lorascope.methods import Full, NeFT
    from lorascope.papers.setups.planted_truths import changed_neurons

    method = NeFT(num_neurons=108, targets=FFN)
    full = Student(Full(), observers=(observe.neurons(every=STEPS),))
    planted = Student(lambda base, seed: replace(method, neurons=changed_neurons(base, seed)))
    students = {ROTATED_NEURONS: method, RANDOM_NEURONS: replace(method, select_by="random"), FULL: full}
    return [
        *planted_arms(students, SPARSE),
        *planted_arms({PLANTED_NEURONS: planted}, SPARSE[:1]),
    ]


SCORES = "neurons"
"""Kept table ``module, neuron, changed, selected, rotation, displacement, sensitivity, sensitivity_end``."""
_SCORED = f"{FULL}, {truth_names.FEW_NEURONS}"
AT_RANDOM = Constant(100 * 9 / 96)
"""Expected hit rate of random neurons, as many as the teacher changed."""


def keep_neuron_scores(selection: Run, tuned: Run) -> pd.DataFrame:
    """Return the kept table ``neurons`` of a run of full fine-tuning, with NeFT's selection of the same seed."""
    from lorascope.papers.setups.planted_truths import changed_neurons, student

    changed = changed_neurons(student(), int(tuned.meta.seed or 0))
    selected = selected_neurons.to_set(selected_neurons.list_selected(selection))
    columns = {"neuron_cosine": "rotation", "neuron_update": "displacement"}
    tables = []
    for module, numbers in changed.items():
        # A row of the projections in, and a column of the projection out.
        sensitivity = "sensitivity_in" if module.endswith("down_proj") else "sensitivity_out"
        rows = tuned.table[tuned.table["module"] == module]
        by_index = rows.set_index(["quantity", "step", "index"])["value"].sort_index()
        # Rotation and displacement are known at the end, and sensitivity before the first step as well.
        first, last = rows["step"].min(), rows["step"].max()
        table = pd.DataFrame({name: by_index[quantity, last] for quantity, name in columns.items()})
        table = table.assign(sensitivity=by_index[sensitivity, first], sensitivity_end=by_index[sensitivity, last])
        table = table.rename_axis("neuron").reset_index()
        table = table.assign(module=module, changed=table["neuron"].isin(numbers))
        tables.append(table.assign(selected=[(module, neuron) in selected for neuron in table["neuron"]]))
    names = ["module", "neuron", "changed", "selected", "rotation", "displacement", "sensitivity", "sensitivity_end"]
    floats = dict.fromkeys(names[4:], "float32")
    return pd.concat(tables, ignore_index=True)[names].astype(floats | {"neuron": "int16"})


def hit_rate(table: pd.DataFrame, score: str) -> float:
    """Compute the percentage of the neurons with the highest scores that the teacher changed."""
    best = table.nlargest(int(table["changed"].sum()), score, keep="first")
    return float(100 * best["changed"].mean())


def _hits(score: str) -> OfTable:
    return OfTable(partial(hit_rate, score=score), SCORES, _SCORED, (f"{ROTATED_NEURONS}, {truth_names.FEW_NEURONS}",))


_CAN_HIT = _hits("displacement") - AT_RANDOM
JUDGED = {
    "pair.neft": pair(ROTATED_NEURONS, FULL, PLANTED_NEURONS, truths=SPARSE),
    "pair.choice": pair(ROTATED_NEURONS, RANDOM_NEURONS, PLANTED_NEURONS, truths=SPARSE),
    "neurons.found": Comparison(_hits("selected") - AT_RANDOM, positive=_CAN_HIT),
    "neurons.rotation": Comparison(_hits("rotation") - _hits("sensitivity"), positive=_CAN_HIT),
    "neurons.displacement": Comparison(_hits("displacement") - _hits("rotation"), positive=_CAN_HIT),
}
KEPT_TABLES = {SCORES: [((f"{ROTATED_NEURONS}, {truth_names.FEW_NEURONS}", _SCORED), keep_neuron_scores)]}


def overlap(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the overlap of two selections of the NeFT paper, as a fraction of the smaller one."""
    return len(first.merge(second, on=["module", "neuron"])) / min(len(first), len(second))


def pooled_chance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the chance overlap of NeFT's selections: random, from all modules together."""
    # A neuron of the smaller selection is in the larger one with this probability.
    return max(len(first), len(second)) / float(first["pool"].iloc[0])


def module_chance(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Compute the chance overlap of NeFT's selections: random, with as many neurons in every module."""
    counts, other_counts = (table["module"].astype("str").value_counts() for table in (first, second))
    sizes = pd.concat([first, second]).astype({"module": "str"}).groupby("module")["size"].first()
    return float((counts * other_counts / sizes).sum() / min(len(first), len(second)))


@dataclass(frozen=True)
class ShiftFrom(Statistic):
    """NeFT paper's ``mean_shift`` of an arm's utilization ranks from another arm's with the same seed: (seed,)."""

    reference: str
    arm: str

    def reads(self) -> Reads:
        return {(UTILIZATION, self.reference): (), (UTILIZATION, self.arm): ()}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        shifts = []
        for seed in seeds:
            before, after = (evidence.table(UTILIZATION, arm, seed) for arm in (self.reference, self.arm))
            shifts.append(mean_shift(before, after))
        return np.array(shifts)


def mean_shift(before: pd.DataFrame, after: pd.DataFrame) -> float:
    """Compute, for a claim on NeFT, the mean absolute shift of utilization ranks, as a fraction of ranks in a role."""
    sizes = after.groupby("role")["rank"].transform("size")
    shifts = (after["rank"].astype("float64") - before["rank"].astype("float64")).abs()
    return float((shifts / sizes).mean())


CLAIMS = {
    "neft.over_full": (Accuracy(CHANGED), Accuracy(FULL)),
    "neft.over_lora": (Accuracy(CHANGED), Accuracy(LOW)),
    "neft.choice": (Accuracy(CHANGED), Accuracy(RANDOM)),
    "neft.reversed": (Accuracy(CHANGED), Accuracy(REVERSED)),
    "neft.probed": (Accuracy(PROBED), Accuracy(RANDOM)),
    "neft.stable": (OfPairs(overlap, SELECTED, CHANGED, CHANGED), OfPairs(pooled_chance, SELECTED, CHANGED, CHANGED)),
    "neft.layers": (OfPairs(overlap, SELECTED, CHANGED, CHANGED), OfPairs(module_chance, SELECTED, CHANGED, CHANGED)),
    "neft.task": (
        average(OfPairs(overlap, SELECTED, arm, arm) for arm in (MOVIES, TWEETS)),
        OfPairs(overlap, SELECTED, MOVIES, TWEETS),
    ),
    "neft.use": (ShiftFrom(FEW, REVERSED), ShiftFrom(FEW, CHANGED)),
}


def keep_selected(run: Run) -> pd.DataFrame:
    """Return the kept table ``selected`` of the NeFT paper; see ``SELECTED``."""
    neurons = selected_neurons.list_selected(run)[["module", "neuron"]].astype({"module": "str", "neuron": "uint16"})
    sizes = selected_neurons.count_selectable(run)
    # minilm has fewer than 65,536 neurons, so 16 bits are enough for numbers and ranks.
    neurons = neurons.assign(size=neurons["module"].map(sizes).astype("uint16"), pool=sizes.total())
    return neurons.sort_values(["module", "neuron"], ignore_index=True)[["module", "size", "pool", "neuron"]]


def keep_utilization(run: Run) -> pd.DataFrame:
    """Return the kept table ``utilization`` of the NeFT paper, after the last step; see ``UTILIZATION``."""
    rows = norms.last_recorded(run.table[run.table["quantity"] == "utilisation"]).astype(
        {"module": "str", "role": "str"}
    )
    # In a fixed order, because the kept table has no names of neurons and two runs are compared row by row.
    rows = rows.sort_values(["role", "module", "index"], ignore_index=True)
    rank = rows.groupby("role")["value"].rank(method="first", ascending=False)
    return rows[["role"]].assign(rank=rank.astype("uint16"))


PROBE = Probe(
    name="neft",
    title="NeFT: choice of the trained neurons",
    source="Xu et al., NeFT, arXiv 2403.11621",
    question="Do the neurons that rotate most in full fine-tuning outperform others, and are they task-specific?",
    arms=arms,
    keep={(SELECTED, label): keep_selected for label in (CHANGED, MOVIES, TWEETS)}
    | {(UTILIZATION, label): keep_utilization for label in (CHANGED, FEW, REVERSED)},
)

PAPER = PaperStudy(
    name="NeFT",
    authors="Xu et al.",
    question="Does NeFT find the neurons that have to change, and does training only them help?",
)
run = PAPER.run
