"""Tests of the NeFT probe: the control of each claim, and the expected overlap of random choices."""

from __future__ import annotations

from dataclasses import replace

import killing
import numpy as np
import pytest
from verdicts import effects

import lorascope as ls
from lorascope import observe
from lorascope.analysis import selected_neurons
from lorascope.inputs import models
from lorascope.probes import neft as probe

REACHED = {probe.FULL: 0.80, probe.LOW: 0.79, probe.CHANGED: 0.83, probe.REVERSED: 0.70, probe.RANDOM: 0.82}
REACHED |= {probe.PROBED: 0.84}


def test_expected_overlap_equals_mean_overlap_of_random_choices():
    draw = np.random.default_rng(0)
    sizes, first, second = {"a": 10, "b": 40}, {"a": 5, "b": 5}, {"a": 8, "b": 2}

    def draw_neurons(counts):
        return frozenset((m, int(i)) for m, n in counts.items() for i in draw.choice(sizes[m], n, replace=False))

    pairs = [(draw_neurons(first), draw_neurons(second)) for _ in range(400)]
    found = np.mean([selected_neurons.common(*pair, pool=50)["overlap"] for pair in pairs])
    assert selected_neurons.compute_expected_overlap(*pairs[0], sizes) == pytest.approx((5 * 8 / 10 + 5 * 2 / 40) / 10)
    assert found == pytest.approx(selected_neurons.compute_expected_overlap(*pairs[0], sizes), abs=0.02)


def test_arms_differ_only_in_the_choice_of_neurons():
    arms = {arm.label: arm for arm in probe.arms(False)}
    for label in (probe.REVERSED, probe.RANDOM, probe.PROBED):
        assert replace(arms[label].method, select_by="changed") == arms[probe.CHANGED].method
        assert arms[label].settings == arms[probe.CHANGED].settings
    assert arms[probe.MOVIES].method == arms[probe.CHANGED].method
    assert arms[probe.CHANGED].method.tune_steps == 100
    assert arms[probe.CHANGED].budget == pytest.approx(400)
    assert arms.keys() - {arm.label for arm in probe.arms(True)} == {probe.PROBED}


def picked(run):
    rows = run.table[run.table["quantity"] == "selected"]
    return set(zip(rows["module"].astype(str), rows["index"], strict=True))


def shared(one, other):
    assert len(one) == len(other)
    return len(one & other) / len(one)


def moved(run):
    """Compute the mean shift of a neuron's utilization rank from first to last step, as a fraction of the ranks."""
    rows = run.table[run.table["quantity"] == "utilisation"].sort_values(["module", "index"])
    shifts = []
    for role in ("ffn_in", "ffn_out"):
        own = rows[rows["role"] == role]
        before, after = (
            np.argsort(np.argsort(-own.loc[own["step"] == step, "value"].to_numpy())) for step in (0, own["step"].max())
        )
        shifts.append(np.abs(after - before) / len(before))
    return np.concatenate(shifts).mean()


def test_claims_are_judged_with_their_controls(bert, task, tmp_path):
    runs = {}
    settings = killing.SETTINGS | {"observe": [observe.norms(), observe.utilization(every=5, size=8)]}
    for number, arm in enumerate(probe.arms(False)):
        own = settings | {"steps": min(arm.settings["steps"], 3)}
        fewer = {"tune_steps": 3} if "NeFT" in arm.label else {}
        # Different learning rates keep the recipes distinct. Runs on tweets, the other domain, choose other neurons.
        rate = 1e-1 if arm.label == probe.TWEETS else 1e-2 + 1e-4 * number
        method = replace(arm.method, lr=rate, **fewer)
        found = [
            ls.train(models.load(bert, task=task), task, method, seed=seed, out=tmp_path / f"{arm.label} {seed}", **own)
            for seed in (range(2) if "NeFT" in arm.label else range(1, 3))
        ]
        for run in found:
            run.meta.seed = found.index(run)
            run.score.metric = REACHED.get(arm.label, 0.5)
        runs[arm.label] = found
    found = probe.PROBE.judge(runs)
    reached = effects(found)
    assert reached["neft.over_full"] == pytest.approx(0.03)
    assert reached["neft.over_lora"] == pytest.approx(0.04)
    assert reached["neft.choice"] == pytest.approx(0.01)
    assert reached["neft.reversed"] == pytest.approx(0.13)
    assert reached["neft.probed"] == pytest.approx(0.02)
    own = [selected_neurons.as_set(selected_neurons.list_selected(run)) for run in runs[probe.CHANGED]]
    expected = selected_neurons.common(*own, 192)["overlap"] - selected_neurons.compute_expected_overlap(
        *own, dict.fromkeys(selected_neurons.sizes(run), 48)
    )
    assert reached["neft.layers"] == pytest.approx(expected)
    values = {verdict.claim.id: verdict.values.set_index("seed") for verdict in found.verdicts}
    (film, again), (tweets, other) = ([picked(run) for run in runs[label]] for label in (probe.MOVIES, probe.TWEETS))
    assert values["neft.task"]["statistic"].tolist() == pytest.approx([shared(film, again)] * 2)
    assert values["neft.task"]["control"].tolist() == pytest.approx([shared(film, other), shared(again, tweets)])
    assert shared(film, other) + shared(again, tweets) != shared(film, tweets) + shared(again, other)
    for side, label in (("statistic", probe.REVERSED), ("control", probe.CHANGED)):
        assert values["neft.use"][side].tolist() == pytest.approx([moved(run) for run in runs[label]])
    assert reached["neft.task"] != 0
    assert reached["neft.use"] != 0
    assert probe.NEXT_SEED in found.notes
    del runs[probe.PROBED]
    single = probe.PROBE.judge({label: arm[:1] for label, arm in runs.items()})
    assert reached.keys() - effects(single).keys() == {"neft.layers", "neft.task", "neft.probed"}
    assert sum(note.startswith("Not judged") for note in single.notes) == 2
