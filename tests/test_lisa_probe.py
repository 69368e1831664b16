"""Tests of the LISA training probe: arms that differ in only one setting."""

from __future__ import annotations

from lorascope.methods.method import config
from lorascope.papers import lisa


def test_arms_differ_only_in_the_draws():
    arms = {arm.label: arm for arm in lisa.training_arms()}
    drawn = config(arms[lisa.DRAWN].method)
    for label, field in {lisa.ONCE: "interval", lisa.ENDS: "n_active", lisa.FOUR: "n_active"}.items():
        varied = config(arms[label].method)
        assert {key for key in drawn if drawn[key] != varied[key]} == {field}
        assert arms[label].settings == arms[lisa.DRAWN].settings
    steps = arms[lisa.DRAWN].settings["steps"]
    assert arms[lisa.DRAWN].method.period(steps) * 8 <= steps
    assert arms[lisa.ONCE].method.period(steps) == steps
