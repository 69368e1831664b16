"""Tests of the LISA training probe: the control of each claim, and arms that differ in only one setting."""

from __future__ import annotations

import re
from dataclasses import replace

import killing
import pytest
from verdicts import effects

import lorascope as ls
from lorascope import observe
from lorascope.inputs import models
from lorascope.methods.base import config
from lorascope.probes import lisa_training as probe
from lorascope.probes.claims import CLAIMS


@pytest.mark.parametrize("quick", [True, False])
def test_arms_differ_only_in_the_draws(quick):
    arms = {arm.label: arm for arm in probe.arms(quick)}
    steps = arms[probe.DRAWN].settings["steps"]
    drawn, once = (config(arms[label].method) for label in (probe.DRAWN, probe.ONCE))
    assert {key for key in drawn if drawn[key] != once[key]} == {"interval"}
    more = {probe.ENDS: "n_active", probe.ONE: "n_active", probe.FOUR: "n_active", probe.SELDOM: "interval"}
    assert not arms.keys() & more.keys() if quick else arms.keys() > more.keys()
    for label, field in more.items() if not quick else ():
        varied = config(arms[label].method)
        assert {key for key in drawn if drawn[key] != varied[key]} == {field}
    assert arms[probe.DRAWN].method.period(steps) * 8 <= steps
    assert arms[probe.ONCE].method.period(steps) == steps
    assert len({arm.method.lr for label, arm in arms.items() if label != probe.ADAPTED}) == 1
    assert all(arm.settings == arms[probe.FULL].settings for arm in arms.values())


def test_docstring_names_the_sources_of_the_claims():
    sources = re.sub(r"\s+", " ", probe.__doc__.partition("Source:")[2].partition("Departs:")[0])
    for id in ("lisa.parity", "lisa.over_lora", "lisa.blocks", "lisa.redrawn"):
        assert CLAIMS[id].source.rpartition(", ")[2] in sources
    assert re.findall(r"tables? (\d+)", sources) == ["2", "10", "12"]


TOY = {
    probe.DRAWN: {"n_active": 1},
    probe.ONCE: {"n_active": 1, "interval": 5},
    probe.ENDS: {"n_active": 0},
    probe.ONE: {"n_active": 1, "interval": 3},
    probe.FOUR: {"n_active": 2},
    probe.SELDOM: {"n_active": 1, "interval": 2},
}


def test_claims_are_judged_with_their_controls(bert, task, tmp_path):
    reached = {probe.DRAWN: 0.80, probe.ONCE: 0.77, probe.ENDS: 0.70, probe.FULL: 0.81, probe.ADAPTED: 0.795}
    reached |= {probe.ONE: 0.79, probe.FOUR: 0.82, probe.SELDOM: 0.78}
    runs = {}
    settings = killing.SETTINGS | {"observe": [observe.norms()]}
    for number, arm in enumerate(probe.arms(False)):
        method = replace(arm.method, **TOY.get(arm.label, {}))
        run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / str(number), **settings)
        run.score.metric = reached[arm.label]
        runs[arm.label] = [run]
    found = probe.PROBE.judge(runs)
    expected = {"parity": 0.80 - 0.79, "redrawn": 0.03, "blocks": 0.10, "over_lora": 0.005, "more": 0.02}
    assert effects(found) == pytest.approx({f"lisa.{name}": effect for name, effect in expected.items()})
    table = found.tables["Draws by block"].set_index("").astype(float)
    assert table.loc[probe.ONCE, ["block 0", "block 1"]].sum() == pytest.approx(1)
    assert table["chance"].tolist() == [0.5, 0.5]
    few = (probe.ENDS, probe.ONE, probe.FOUR, probe.SELDOM)
    quick = probe.PROBE.judge({label: arm for label, arm in runs.items() if label not in few})
    assert effects(found).keys() - effects(quick).keys() == {"lisa.blocks", "lisa.more"}
    heat = found.figures[0].chart.rows()[0][0]
    assert len(heat.x.order) == 5  # one draw per step in such a short run
