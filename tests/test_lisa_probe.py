"""The probe of LISA's training: what each claim is compared with, and arms that differ in one thing alone."""

from __future__ import annotations

from dataclasses import replace

import killing
import pytest

import lorascope as ls
from lorascope import models, observe
from lorascope.method import config
from lorascope.probes import lisa_training as probe


@pytest.mark.parametrize("quick", [True, False])
def test_arms_differ_in_the_draws_alone(quick):
    arms = {arm.label: arm for arm in probe.arms(quick)}
    steps = arms[probe.DRAWN].settings["steps"]
    drawn, once = (config(arms[label].method) for label in (probe.DRAWN, probe.ONCE))
    assert {key for key in drawn if drawn[key] != once[key]} == {"interval"}
    assert (probe.ENDS in arms) != quick
    if not quick:
        ends = config(arms[probe.ENDS].method)
        assert {key for key in drawn if drawn[key] != ends[key]} == {"n_active"}
    assert arms[probe.DRAWN].method.period(steps) * 8 <= steps
    assert arms[probe.ONCE].method.period(steps) == steps
    assert len({arm.method.lr for label, arm in arms.items() if label != probe.ADAPTED}) == 1
    assert all(arm.settings == arms[probe.FULL].settings for arm in arms.values())


def test_each_claim_is_judged_against_its_control(bert, task, tmp_path):
    reached = {probe.DRAWN: 0.80, probe.ONCE: 0.77, probe.ENDS: 0.70, probe.FULL: 0.81, probe.ADAPTED: 0.795}
    runs = {}
    settings = killing.SETTINGS | {"observe": [observe.norms()]}
    for number, arm in enumerate(probe.arms(False)):
        method = replace(arm.method, n_active=arm.method.n_active and 1) if "block" in arm.label else arm.method
        run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / str(number), **settings)
        run.meta["test"]["metric"] = reached[arm.label]
        runs[arm.label] = [run]
    found = probe.judge(runs)
    assert {verdict.claim: verdict.effect for verdict in found.verdicts} == pytest.approx(
        {probe.PARITY: 0.80 - 0.79, probe.REDRAWN: 0.03, probe.BLOCKS: 0.10, probe.OVER_LORA: 0.005}
    )
    table = found.tables["Draws by block"].set_index("").astype(float)
    assert table.loc[probe.ONCE, ["block 0", "block 1"]].sum() == pytest.approx(1)
    assert table["chance"].tolist() == [0.5, 0.5]
    quick = probe.judge({label: kept for label, kept in runs.items() if label != probe.ENDS})
    assert {verdict.claim for verdict in found.verdicts} - {verdict.claim for verdict in quick.verdicts} == {
        probe.BLOCKS
    }
    heat = found.exhibits[0].chart.rows()[0][0]
    assert len(heat.x.order) == 5  # a draw a step, in so short a run
