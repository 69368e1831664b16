"""Tests of the Adapprox probe: learning rates chosen by validation loss only, and the control of each claim."""

from __future__ import annotations

import re
from dataclasses import replace

import killing
import numpy as np
import pytest
from verdicts import effects

import lorascope as ls
from lorascope import plots
from lorascope.inputs import models
from lorascope.methods import Adapprox
from lorascope.probes import adapprox as probe
from lorascope.runs.run import Run

# Validation and test loss by arm. The best rate on validation is never the best on test, so a mix-up shows.
LOSSES = {
    "AdamW at 3e-05": (0.50, 0.30), "AdamW at 0.0001": (0.40, 0.45), "AdamW at 0.0003": (0.60, 0.60),
    "Adafactor at 3e-05": (0.50, 0.20), "Adafactor at 0.0001": (0.60, 0.20), "Adafactor at 0.0003": (0.45, 0.50),
    "CAME at 3e-06": (0.41, 0.48), "CAME at 1e-05": (0.50, 0.30), "CAME at 3e-05": (0.60, 0.30),
    "Adapprox at 3e-05": (0.50, 0.30), "Adapprox at 0.0001": (0.39, 0.44), "Adapprox at 0.0003": (0.70, 0.30),
    "Adapprox, guided at 0.0001": (0.10, 0.10),
}  # fmt: skip


DENSE = "vectors, embed, pos_embed and small matrices"


@pytest.fixture(scope="module")
def runs(bert, task, tmp_path_factory):
    """Train every arm on the tiny model and overwrite its losses with ``LOSSES``."""
    root, found = tmp_path_factory.mktemp("probe"), {}
    for number, arm in enumerate(probe.arms(False)):
        method = replace(arm.method, min_dim=8) if isinstance(arm.method, Adapprox) else arm.method
        settings = killing.SETTINGS | {"steps": 2, "eval_every": 0, "observe": arm.settings["observe"]}
        run = ls.train(models.load(bert, task=task), task, method, out=root / str(number), **settings)
        validation, run.score.loss = LOSSES[arm.label]
        run.table.loc[run.table["quantity"] == "eval_loss", "value"] = validation
        found[arm.label] = [run]
    return found


def test_best_rate_minimizes_validation_loss(runs):
    assert set(runs) == set(LOSSES)
    best = {name: probe.best_rate(runs, name) for name in probe.RATES}
    assert best == {
        "AdamW": "AdamW at 0.0001",
        "Adafactor": "Adafactor at 0.0003",
        "CAME": "CAME at 3e-06",
        "Adapprox": "Adapprox at 0.0001",
    }


def test_claims_are_judged_with_their_controls(runs):
    findings = probe.PROBE.judge(runs)
    reached = effects(findings)
    assert reached["adapprox.parity"] == pytest.approx(-0.44 + 0.45 + 0.02)
    assert reached["adapprox.over_adafactor"] == pytest.approx(-0.44 + 0.50)
    assert reached["adapprox.over_came"] == pytest.approx(-0.44 + 0.48)

    adam, ours = runs["AdamW at 0.0001"][0].table, runs["Adapprox at 0.0001"][0].table

    def mean(table, quantity, rank=None, power=1):
        rows = table[(table["quantity"] == quantity) & (table["step"] == 2)]
        return float((rows[rows["index"] == rank] if rank else rows)["value"].pow(power).mean())

    few = mean(adam, "moment_error_dealt", 8, 2) - mean(adam, "moment_error", 8, 2)
    above = mean(adam, "moment_error_rank_one") - mean(adam, "moment_error_s_rsi", 8)
    drifted = mean(ours, "factor_drift_rank_one") - mean(ours, "factor_drift")
    assert reached["adapprox.tail"] == pytest.approx(few)
    assert reached["adapprox.above_one"] == pytest.approx(above)
    assert reached["adapprox.held"] == pytest.approx(drifted)
    assert len(findings.figures) == 8
    for shown in findings.figures[3:]:
        captions = {chart.caption for row in shown.chart.rows() for chart in row}
        assert all(DENSE in caption for caption in captions)


def test_notes_list_every_matrix_without_factors(runs):
    ours = runs["Adapprox at 0.0001"][0]
    factored = set(ours.table.loc[ours.table["quantity"] == "factor_rank", "module"].astype("str"))
    matrices = ours.modules.dropna(subset=["out_features", "in_features"])
    assert set(matrices.loc[~matrices["module"].isin(factored), "role"]) == {"embed", "pos_embed", "head"}
    (note,) = [note for note in probe.PROBE.judge(runs).notes if "dense second moment" in note]
    assert "embeddings" in note
    assert "head" in note


def test_claims_cite_only_the_abstract_and_figure_1(runs):
    cited = {verdict.claim.source for verdict in probe.PROBE.judge(runs).verdicts}
    assert cited == {"figure 1", "abstract", "this project; assumed by the abstract", "this project"}


def test_guidance_is_drawn_with_every_rate_but_never_chosen(runs):
    shown = probe.PROBE.judge(runs).figures
    loss = shown[5].chart.rows()[0][0]
    ours = ["Adapprox at 3e-05", "Adapprox at 0.0001", "Adapprox at 0.0003", "Adapprox, guided at 0.0001"]
    assert list(dict.fromkeys(loss.data["recipe"])) == ours
    rates = shown[6].chart.rows()[0][0]
    assert set(rates.data["method"]) == set(probe.RATES)


def test_caption_lists_dense_roles_only_for_adapprox(runs):
    adam, ours = runs["AdamW at 0.0001"][0], runs["Adapprox at 0.0001"][0]
    one = Run(ours.path, replace(ours.meta, facts=Adapprox(dense="embed").describe()))
    assert "vectors, embed and small matrices" in plots.factor_error(one).caption
    # With min_dim 1, no matrix is too small to be factored.
    for dense, kept in (((), "vectors"), (("embed", "q"), "vectors, embed and q")):
        all_factored = Run(ours.path, replace(ours.meta, facts=Adapprox(dense=dense, min_dim=1).describe()))
        assert re.search(rf"\b{kept}\b(?!,| and)", plots.factor_error(all_factored).caption)
    assert "dense" not in plots.training_curves(adam).rows()[0][0].caption


def test_factor_memory_counts_bytes_by_role(runs):
    found = probe.factor_memory(runs["Adapprox at 0.0001"]).set_index("role")
    assert found.loc["q", "dense"] == 4 * 32 * 32
    assert found.loc["q", "factors"] == pytest.approx(4 * found.loc["q", "rank"] * 64)
    assert found.loc["ffn_in", "of dense (%)"] == pytest.approx(
        100 * found.loc["ffn_in", "factors"] / (4 * 32 * 48), abs=0.1
    )


def test_quick_arms_have_the_middle_rate_and_a_low_rank():
    quick = {arm.label: arm for arm in probe.arms(True)}
    middle = {probe.label(name, rates[1]) for name, rates in probe.RATES.items()}
    assert set(quick) == middle | {"Adapprox, guided at 0.0001"}
    assert quick["Adapprox, guided at 0.0001"].method == replace(quick["Adapprox at 0.0001"].method, cosine=True)
    assert quick["Adapprox at 0.0001"].method.max_rank == probe.RANK
    assert np.isclose(quick["CAME at 1e-05"].method.lr, 1e-5)
