"""Tests of the NeFT probe: arms that differ only in the choice of neurons, and kept selections."""

from __future__ import annotations

from dataclasses import replace

from lorascope.papers import neft


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
