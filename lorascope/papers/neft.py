"""NeFT: choice of the trained neurons.

Does NeFT beat full fine-tuning, and random neurons, where a teacher changes 9% of the neurons, and gain less where it
changes all? Do rotation, displacement and sensitivity find the changed neurons?

Source: NeFT (arXiv 2403.11621), equation 1 (rotation), tables 1 and 2 (quality), section 5.3 (choice of neurons).

Departs:

- A small decoder on planted teachers instead of LLaMA-2 and translation.
- Random neurons of the same number are a control of this project.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pandas as pd

from lorascope.analysis import selected_neurons
from lorascope.papers.arms import Arm
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.study_statistics import Comparison, Constant, OfTable, pair
from lorascope.papers.lora import FULL
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import STEPS, Student, planted_arms
from lorascope.runs.run import Run
from lorascope.schema.module_roles import FFN

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


PAPER = PaperStudy(
    name="NeFT",
    authors="Xu et al.",
    question="Does NeFT find the neurons that have to change, and does training only them help?",
)
run = PAPER.run
