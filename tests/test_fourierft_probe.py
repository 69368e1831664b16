"""Tests of the FourierFT probe: the control of each claim, and equal parameters where the arms claim them."""

from __future__ import annotations

import re
from dataclasses import replace

import killing
import pytest
from tiny import tiny
from verdicts import effects

import lorascope as ls
from lorascope import observe
from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models
from lorascope.probes import fourierft as probe


def test_arms_with_equal_parameters_have_equal_counts():
    model_of = {"num_hidden_layers": 1, "hidden_size": 384, "num_attention_heads": 12}
    counts = {}
    for arm in probe.arms(True):
        model = tiny("bert", **model_of)
        arm.method.attach(model)
        counts[arm.label] = [sum(p.numel() for p in delta.parameters()) for delta in attached_deltas(model).values()]
    assert counts[probe.DEFAULT] == counts[probe.EQUAL] == [1536] * 2
    assert counts[probe.MANY] == counts[probe.LARGE] == [6144] * 2
    assert counts[probe.FEW] == [48] * 2
    for label in (probe.RANDOM, probe.ORTHOGONAL, probe.ZEROS):
        assert counts[label] == counts[probe.DEFAULT]


def test_band_arms_exist_only_in_full_runs_and_differ_only_in_the_band():
    quick, full = ({arm.label: arm for arm in probe.arms(quick)} for quick in (True, False))
    assert set(full) - set(quick) == set(probe.BANDS)
    for label, center in probe.BANDS.items():
        assert full[label].method == replace(full[probe.DEFAULT].method, center=center, width=100)
        assert full[label].settings == full[probe.DEFAULT].settings


def test_best_elsewhere_chooses_by_the_other_seeds():
    """Choosing by each seed itself would give 9, 8, 9."""
    arms = [{0: 9.0, 1: 1.0, 2: 0.0}, {0: 3.0, 1: 8.0, 2: 3.0}, {0: 3.0, 1: 5.0, 2: 9.0}]
    assert probe.best_elsewhere(arms) == {0: 3.0, 1: 5.0, 2: 3.0}
    assert probe.best_elsewhere([{4: 0.5}, {4: 0.7}]) == {4: 0.7}


def test_claims_are_judged_with_their_controls(bert, task, tmp_path):
    reached = {
        probe.DEFAULT: 0.80, probe.FEW: 0.70, probe.MANY: 0.83, probe.RANDOM: 0.77, probe.ORTHOGONAL: 0.79,
        probe.ZEROS: 0.81, probe.EQUAL: 0.76, probe.LARGE: 0.815, probe.HYDRA: 0.5,
    } | dict(zip(probe.BANDS, (0.72, 0.79, 0.77), strict=True))  # fmt: skip
    runs = {}
    settings = killing.SETTINGS | {"observe": [observe.norms(), observe.factors()]}
    for number, arm in enumerate(probe.arms(False)):
        method = arm.method
        if arm.label in (probe.FEW, probe.MANY):
            method = replace(method, coefficients={probe.FEW: 4, probe.MANY: 512}[arm.label])
        if arm.label in probe.BANDS:
            method = replace(
                method, center=method.center / 12, width=8
            )  # the tiny model's spectrum is a twelfth as wide
        run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / str(number), **settings)
        run.score.metric = reached[arm.label]
        runs[arm.label] = [run]
    found = probe.PROBE.judge(runs)
    assert effects(found) == pytest.approx(
        {
            "fourierft.parity": 0.80 - 0.795,
            "fourierft.equal": 0.04,
            "fourierft.more": 0.13,
            "fourierft.random": 0.03,
            "fourierft.orthogonal": 0.01,
            "fourierft.start": 0.80 - 0.79,
            "fourierft.band": 0.80 - 0.78,
        }
    )
    assert "FourierFT, 48 coefficients" in found.notes[-1]
    quick = probe.PROBE.judge({label: arm for label, arm in runs.items() if label not in probe.BANDS})
    assert effects(quick).keys() == effects(found).keys() - {"fourierft.band"}
    assert len(quick.figures) == len(found.figures) - 1
    (atlas,) = [shown.chart for shown in found.figures if shown.chart.rows()[0][0].meta["figure"] == "atlas"]
    angles = atlas.rows()[1][0].data
    assert set(angles["row"]) == set(probe.METHODS)
    assert angles["value"].between(0, 90).all()  # all recipes adapt queries and values
    assert all(re.search("HydraLoRA.*mean gate", chart.caption) for row in atlas.rows() for chart in row)
    assert any("bands" in note and "only in a full run" in note for note in quick.notes)
