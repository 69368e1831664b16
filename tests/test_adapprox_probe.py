"""The probe of Adapprox: rates chosen on validation alone, and what each claim is compared with."""

from __future__ import annotations

from dataclasses import replace

import killing
import numpy as np
import pytest

import lorascope as ls
from lorascope import plots
from lorascope.inputs import models
from lorascope.methods import Adapprox
from lorascope.probes import adapprox as probe
from lorascope.runs.run import Run

# Validation and test loss by arm; the best on validation is never the best on test.
LOSSES = {
    "AdamW at 3e-05": (0.50, 0.30), "AdamW at 0.0001": (0.40, 0.45), "AdamW at 0.0003": (0.60, 0.60),
    "Adafactor at 3e-05": (0.50, 0.20), "Adafactor at 0.0001": (0.60, 0.20), "Adafactor at 0.0003": (0.45, 0.50),
    "CAME at 3e-06": (0.41, 0.48), "CAME at 1e-05": (0.50, 0.30), "CAME at 3e-05": (0.60, 0.30),
    "Adapprox at 3e-05": (0.50, 0.30), "Adapprox at 0.0001": (0.39, 0.44), "Adapprox at 0.0003": (0.70, 0.30),
    "Adapprox, guided at 0.0001": (0.10, 0.10),
}  # fmt: skip


DENSE = "Adapprox keeps vectors, embed, pos_embed and small matrices dense."


@pytest.fixture(scope="module")
def runs(bert, task, tmp_path_factory):
    """Every arm, on the tiny model, with losses set."""
    root, found = tmp_path_factory.mktemp("probe"), {}
    for number, arm in enumerate(probe.arms(False)):
        method = replace(arm.method, min_dim=8) if isinstance(arm.method, Adapprox) else arm.method
        settings = killing.SETTINGS | {"steps": 2, "eval_every": 0, "observe": arm.settings["observe"]}
        run = ls.train(models.load(bert, task=task), task, method, out=root / str(number), **settings)
        validation, run.meta["test"]["loss"] = LOSSES[arm.label]
        run.table.loc[run.table["quantity"] == "eval_loss", "value"] = validation
        found[arm.label] = [run]
    return found


def test_each_optimizer_has_its_best_rate_by_validation(runs):
    assert set(runs) == set(LOSSES)
    best = {name: probe.best_rate(runs, name) for name in probe.RATES}
    assert best == {
        "AdamW": "AdamW at 0.0001",
        "Adafactor": "Adafactor at 0.0003",
        "CAME": "CAME at 3e-06",
        "Adapprox": "Adapprox at 0.0001",
    }


def test_each_claim_is_judged_against_its_control(runs):
    findings = probe.judge(runs)
    effects = {verdict.claim: verdict.effect for verdict in findings.verdicts}
    assert effects[probe.PARITY] == pytest.approx(-0.44 + 0.45 + 0.02)
    assert effects[probe.OVER_ADAFACTOR] == pytest.approx(-0.44 + 0.50)
    assert effects[probe.OVER_CAME] == pytest.approx(-0.44 + 0.48)

    adam, ours = runs["AdamW at 0.0001"][0].table, runs["Adapprox at 0.0001"][0].table

    def mean(table, quantity, rank=None, power=1):
        rows = table[(table["quantity"] == quantity) & (table["step"] == 2)]
        return float((rows[rows["index"] == rank] if rank else rows)["value"].pow(power).mean())

    few = mean(adam, "moment_error_dealt", 8, 2) - mean(adam, "moment_error", 8, 2)
    above = mean(adam, "moment_error_rank_one") - mean(adam, "moment_error_s_rsi", 8)
    drifted = mean(ours, "factor_drift_rank_one") - mean(ours, "factor_drift")
    assert effects[probe.FEW] == pytest.approx(few)
    assert effects[probe.ABOVE_ONE] == pytest.approx(above)
    assert effects[probe.HELD] == pytest.approx(drifted)
    assert len(findings.exhibits) == 8
    for shown in findings.exhibits[3:]:
        captions = {chart.caption for row in shown.chart.rows() for chart in row}
        assert all(DENSE in caption for caption in captions)


def test_notes_name_every_matrix_that_has_no_factors(runs):
    ours = runs["Adapprox at 0.0001"][0]
    factored = set(ours.table.loc[ours.table["quantity"] == "factor_rank", "module"].astype("str"))
    matrices = ours.modules.dropna(subset=["out_features", "in_features"])
    assert set(matrices.loc[~matrices["module"].isin(factored), "role"]) == {"embed", "pos_embed", "head"}
    told = " ".join(probe.judge(runs).notes)
    assert "the embeddings and the head, which has two rows, keep a dense second moment; all other matrices" in told


def test_no_claim_cites_what_of_the_paper_was_not_read(runs):
    cited = {verdict.claim.source for verdict in probe.judge(runs).verdicts}
    assert cited == {"figure 1", "abstract", "this project; what the abstract takes for granted", "this project"}


def test_guidance_stands_beside_every_rate_without_it_and_takes_part_in_no_choice(runs):
    shown = probe.judge(runs).exhibits
    loss = shown[5].chart.rows()[0][0]
    ours = ["Adapprox at 3e-05", "Adapprox at 0.0001", "Adapprox at 0.0003", "Adapprox, guided at 0.0001"]
    assert list(dict.fromkeys(loss.data["recipe"])) == ours
    rates = shown[6].chart.rows()[0][0]
    assert set(rates.data["method"]) == set(probe.RATES)


def test_a_role_given_as_a_string_is_one_word_and_without_adapprox_nothing_is_said(runs):
    adam, ours = runs["AdamW at 0.0001"][0], runs["Adapprox at 0.0001"][0]
    one = Run(ours.path, ours.meta | {"recipe": ours.meta["recipe"] | {"dense": "embed"}})
    assert "Adapprox keeps vectors, embed and small matrices dense." in plots.factor_error(one).caption
    for dense, kept in (((), "vectors"), (("embed", "q"), "vectors, embed and q")):  # at 1 no matrix is too small
        all_factored = Run(ours.path, ours.meta | {"recipe": ours.meta["recipe"] | {"dense": dense, "min_dim": 1}})
        assert f"Adapprox keeps {kept} dense." in plots.factor_error(all_factored).caption
    assert "dense" not in plots.training_curves(adam).rows()[0][0].caption


def test_bytes_are_counted_by_role(runs):
    found = probe.factor_memory(runs["Adapprox at 0.0001"]).set_index("role")
    assert found.loc["q", "dense"] == 4 * 32 * 32
    assert found.loc["q", "factors"] == pytest.approx(4 * found.loc["q", "rank"] * 64)
    assert found.loc["ffn_in", "of dense (%)"] == pytest.approx(
        100 * found.loc["ffn_in", "factors"] / (4 * 32 * 48), abs=0.1
    )


def test_a_quick_run_takes_one_rate_and_few_columns():
    quick = {arm.label: arm for arm in probe.arms(True)}
    middle = {probe.label(name, rates[1]) for name, rates in probe.RATES.items()}
    assert set(quick) == middle | {"Adapprox, guided at 0.0001"}
    assert quick["Adapprox, guided at 0.0001"].method == replace(quick["Adapprox at 0.0001"].method, cosine=True)
    assert quick["Adapprox at 0.0001"].method.max_rank == probe.RANK
    assert np.isclose(quick["CAME at 1e-05"].method.lr, 1e-5)
