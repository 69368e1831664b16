"""Tests of the NeFT probe: arms that differ only in the choice of neurons."""

from __future__ import annotations

from dataclasses import replace

from lorascope.papers import neft as probe
from lorascope.papers import neft as statistics


def test_arms_differ_only_in_the_choice_of_neurons():
    arms = {arm.label: arm.method for arm in probe.arms()}
    nine = arms[statistics.CHANGED]
    for label in (statistics.RANDOM, statistics.PROBED):
        assert replace(arms[label], select_by="changed") == nine
    few = arms[statistics.FEW]
    assert replace(arms[statistics.REVERSED], reversed_share=few.reversed_share) == few
    assert replace(few, parameter_share=nine.parameter_share) == nine
    assert arms[statistics.MOVIES] == arms[statistics.TWEETS] == nine
    assert nine.tune_steps == 100
