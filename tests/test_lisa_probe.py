"""Tests of the LISA training probe: arms that differ in only one setting."""

from __future__ import annotations

from lorascope.methods.method import config
from lorascope.papers import lisa as probe
from lorascope.papers import lisa as statistics


def test_arms_differ_only_in_the_draws():
    arms = {arm.label: arm for arm in probe.training_arms()}
    drawn = config(arms[statistics.DRAWN].method)
    for label, field in {statistics.ONCE: "interval", statistics.ENDS: "n_active", statistics.FOUR: "n_active"}.items():
        varied = config(arms[label].method)
        assert {key for key in drawn if drawn[key] != varied[key]} == {field}
        assert arms[label].settings == arms[statistics.DRAWN].settings
    steps = arms[statistics.DRAWN].settings["steps"]
    assert arms[statistics.DRAWN].method.period(steps) * 8 <= steps
    assert arms[statistics.ONCE].method.period(steps) == steps
