"""Tests of the NeFT probe: arms that differ only in the choice of neurons, and kept selections."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorascope.analysis import selected_neurons
from lorascope.papers import neft
from lorascope.papers.figures.excerpt import EXCERPTS
from lorascope.papers.judging import kept_runs, registration
from lorascope.runs.run import Run


def test_arms_differ_only_in_the_choice_of_neurons():
    arms = {arm.label: arm.method for arm in neft.arms()}
    nine = arms[neft.CHANGED]
    for label in (neft.RANDOM, neft.PROBED):
        assert replace(arms[label], select_by="changed") == nine
    few = arms[neft.FEW]
    assert replace(arms[neft.REVERSED], reversed_share=few.reversed_share) == few
    assert replace(few, parameter_share=nine.parameter_share) == nine
    assert arms[neft.MOVIES] == arms[neft.TWEETS] == nine
    assert nine.tune_steps == 100


@pytest.fixture(scope="module")
def evidence():
    return kept_runs.read(registration.FILE.parent / "evidence").of_main_machine()


@pytest.mark.parametrize("seed", [100, 101])
def test_kept_selections_of_one_tuning_have_the_first_neurons_in_common(evidence, seed):
    """Runs of a seed share the tuning phase, so the larger selections have only the 3% that rotated most in common."""
    selections, tuning = {}, set()
    for arm in (neft.FEW, neft.CHANGED, neft.REVERSED):
        run = Run.read(registration.FILE.parent / "evidence" / EXCERPTS / evidence.run(arm, seed) / "2-masked")
        selections[arm] = selected_neurons.to_set(selected_neurons.list_trained(run))
        tuning.add(run.meta.method["reference"]["run"])
    assert len(tuning) == 1
    assert selections[neft.FEW] == selections[neft.CHANGED] & selections[neft.REVERSED]
    assert len(selections[neft.FEW]) == 1775
