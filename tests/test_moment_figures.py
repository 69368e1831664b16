"""Figures of second moments: data compared with the tables of tiny runs and with planted losses."""

from __future__ import annotations

from functools import partial

import families
import killing
import numpy as np
import pytest
from planted import plant

import lorascope as ls
from lorascope import observe, plots
from lorascope.charts.marks import Line
from lorascope.inputs import models
from lorascope.methods import Adapprox, Full

FAST = killing.SETTINGS | {"steps": 4}


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    """Train two seeds with AdamW and two with Adapprox."""
    root = tmp_path_factory.mktemp("moments")
    adapprox = Adapprox(lr=1e-3, min_dim=8, reselect_every=2, growth_scale=None)
    arms = {
        "adam": (Full(lr=1e-3), [observe.second_moments(every=2)]),
        "adapprox": (adapprox, [observe.factor_drift(every=2)]),
    }
    return {
        name: [
            ls.train(models.load(bert, task=task), task, method, out=root / f"{name}{seed}", seed=seed, **settings)
            for seed in (0, 1)
        ]
        for name, (method, observers) in arms.items()
        for settings in [FAST | {"observe": observers}]
    }


def last(run, quantity):
    rows = run.table[run.table["quantity"] == quantity]
    return rows[rows["step"] == rows["step"].max()]


def test_second_moments_are_means_over_matrices_of_a_layer_and_seeds(trained):
    chart = plots.second_moments(trained["adam"])
    own, relative = (panel.data.set_index(["layer", "index"])["value"] for panel in chart.panels)
    for layer in (0, 1):
        means, ratios = [], []
        for run in trained["adam"]:
            sigma, shuffled = (
                last(run, quantity).query(f"layer == {layer}").groupby("index")["value"].mean()
                for quantity in ("moment_sigma", "moment_sigma_dealt")
            )
            means.append(sigma)
            ratios.append(sigma / shuffled)
        assert own[f"layer {layer}"].to_numpy() == pytest.approx(np.mean(means, axis=0))
        assert relative[f"layer {layer}"].to_numpy() == pytest.approx(np.mean(ratios, axis=0))
    for found in (own, relative):
        assert set(found.index.get_level_values("layer")) == {"layer 0", "layer 1"}
        assert found.xs(1, level="index").to_numpy() == pytest.approx(1)
    one = plots.second_moments(trained["adam"][0], role="ffn_in").rows()[0][0].data
    wanted = last(trained["adam"][0], "moment_sigma").query("role == 'ffn_in' and layer == 1")["value"]
    assert one.loc[one["layer"] == "layer 1", "value"].to_numpy() == pytest.approx(wanted.to_numpy())
    with pytest.raises(ValueError, match=r"role.*got 'gate'"):
        plots.second_moments(trained["adam"], role="gate")


def test_moment_error_is_the_mean_over_matrices(trained):
    data, relative = (
        panel.data.set_index(["measure", "index"])["value"] for panel in plots.moment_error(trained["adam"]).panels
    )
    for measure, quantity in (("best rank-k (SVD)", "moment_error"), ("S-RSI", "moment_error_s_rsi")):
        expected = [last(run, quantity).groupby("index")["value"].mean() for run in trained["adam"]]
        assert data[measure].index.tolist() == [1, 2, 4, 8, 16]
        assert data[measure].to_numpy() == pytest.approx(np.mean(expected, axis=0))
        shuffled = [last(run, "moment_error_dealt").groupby("index")["value"].mean() for run in trained["adam"]]
        ratios = [error / baseline for error, baseline in zip(expected, shuffled, strict=True)]
        assert relative[measure].to_numpy() == pytest.approx(np.mean(ratios, axis=0))
    flat = data["row-column product (Adafactor)"]
    expected = np.mean([last(run, "moment_error_rank_one")["value"].mean() for run in trained["adam"]])
    assert flat.to_dict() == pytest.approx({1: expected, 16: expected})


def test_factor_rank_by_role_layer_and_step(trained):
    data = plots.factor_rank(trained["adapprox"]).data.set_index(["role", "place", "step"])["value"]
    assert list(dict.fromkeys(data.index.get_level_values("role"))) == ["q", "k", "v", "o", "ffn_in", "ffn_out"]
    for (role, place, step), value in data.items():
        query = f"quantity == 'factor_rank' and role == '{role}' and layer == {place} and step == {step}"
        seeds = [run.table.query(query) for run in trained["adapprox"]]
        assert value == np.mean([found["value"].item() for found in seeds])
    assert sorted(set(data.index.get_level_values("step"))) == [1, 3, 4]
    with pytest.raises(ValueError, match=r"role.*got 'gate'"):
        plots.factor_rank(trained["adapprox"], role="gate")


def test_factor_rank_colors_ranks_by_fraction_of_the_cap(tmp_path):
    """Rank 48 of 48 is at the cap, rank 48 of 96 is not."""
    ranks = {"h.0.q": (24, 48, 96), "h.1.q": (24, 24, 96), "h.0.up": (48, 12, 48)}
    planted = {}
    for module, (*found, cap) in ranks.items():
        planted["factor_rank", module] = dict(zip((1, 11), found, strict=True))
        planted["factor_share", module] = {step: rank / cap for step, rank in planted["factor_rank", module].items()}
    chart = plots.factor_rank(plant(tmp_path, "run", planted))
    (heat,) = chart.marks
    assert (heat.value, heat.words, heat.limits) == ("share", "words", (0, 1))
    cells = chart.data.set_index(["role", "place", "step"])
    assert cells["share"].to_dict() == {
        ("q", "0", 1): 0.25, ("q", "0", 11): 0.5, ("q", "1", 1): 0.25, ("q", "1", 11): 0.25,
        ("ffn_in", "0", 1): 1, ("ffn_in", "0", 11): 0.25,
    }  # fmt: skip
    assert cells.loc[("q", "0", 11), "words"] == "48"
    assert cells.loc[("ffn_in", "0", 1), "words"] == ""
    assert "k_max is 48 (ffn_in), 96 (q)." in chart.caption
    assert "at the cap: 17%." in chart.caption


def test_encoder_and_decoder_layers_have_separate_lines_and_rows(tmp_path):
    task, path = families.task_of("t5"), families.folder(tmp_path / "t5", "t5")
    methods = {"adam": Full(lr=1e-3), "adapprox": Adapprox(lr=1e-3, min_dim=8)}
    settings = FAST | {"observe": [observe.second_moments(every=2)], "eval_size": 6, "test_size": 4}
    adam = ls.train(models.load(path), task, methods["adam"], out=tmp_path / "adam", **settings)
    adapprox = ls.train(models.load(path), task, methods["adapprox"], out=tmp_path / "rank", **FAST | {"observe": []})
    places = ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    drawn = plots.second_moments(adam, role="v").rows()[0][0].data
    wanted = last(adam, "moment_sigma").query("role == 'v'").groupby(["stack", "layer"], observed=True)
    assert list(dict.fromkeys(drawn["layer"])) == places
    for (stack, layer), rows in wanted:
        np.testing.assert_allclose(drawn.loc[drawn["layer"] == f"{stack} {layer}", "value"], rows["value"])
    chart = plots.factor_rank(adapprox, role="v")
    assert list(chart.y.order) == places
    ranks = last(adapprox, "factor_rank").query("role == 'v'")
    drawn = chart.data[chart.data["step"] == ranks["step"].iloc[0]].set_index("place")["value"]
    assert drawn.to_dict() == {f"{row.stack} {row.layer}": row.value for row in ranks.itertuples()}


def test_factor_error_plots_selection_error_and_drift(trained):
    data = plots.factor_error(trained["adapprox"]).data.set_index(["measure", "step"])["value"]
    measures = {
        "selection error (one step's V)": "factor_error",
        "drift from the exact average": "factor_drift",
        "best rank-k of the exact average": "factor_drift_least",
        "row-column product of the exact average": "factor_drift_rank_one",
    }
    assert set(data.index.get_level_values("measure")) == set(measures)
    for measure, quantity in measures.items():
        inside = [last(run, quantity).dropna(subset="layer")["value"].mean() for run in trained["adapprox"]]
        step = data[measure].index.max()
        assert step == (3 if quantity == "factor_error" else 4)  # step 4 selects no rank
        assert data[measure, step] == pytest.approx(np.mean(inside))
    assert (data["drift from the exact average"] > data["best rank-k of the exact average"]).all()


def test_factorization_methods_are_compared_with_the_full_svd(tmp_path):
    """With two matrices, errors are averaged before they are divided, and times are added."""
    ways = ("l1_p5", "l2_p5", "l5_p0", "l5_p5", "svd_lowrank", "svd")
    planted = {}
    for number, way in enumerate(ways):
        for module, factor in (("h.0.q", 1), ("h.0.up", 3)):
            planted[f"factoring_error_{way}", module] = {4: np.array([0.2 * factor * (6 - number), 0.1 * factor])}
            planted[f"factoring_seconds_{way}", module] = {4: np.array([number + 1.0, 9.0])}
    run = plant(tmp_path, "run", planted)
    run.table["index"] = run.table["index"].map({0: 1, 1: 8}).astype("Int32")
    error, time = plots.factorization_methods(run).rows()[0]
    found = error.data.set_index(["measure", "index"])["value"]
    # No excess over the full SVD has no place on a logarithmic axis.
    assert found["S-RSI, l = 1, p = 5"].to_dict() == pytest.approx({1: 500, 8: np.nan}, nan_ok=True)
    assert found["S-RSI, l = 5, p = 5"].to_dict() == pytest.approx({1: 200, 8: np.nan}, nan_ok=True)
    assert found["full SVD"].isna().all()
    assert (error.y.label, time.y.label) == ("excess error (%)", "time (ms)")
    taken = time.data.set_index(["measure", "index"])["value"]
    assert taken["S-RSI, l = 5, p = 0"].to_dict() == pytest.approx({1: 6000, 8: 18000})
    with pytest.raises(ValueError, match=r"factoring_error_svd: train Full\(optimizer_name=\"adamw\"\) with observe"):
        plots.factorization_methods(plant(tmp_path, "other", {("lr", ""): {1: 0.1}}))


def test_guidance_plots_loss_and_cosine(tmp_path):
    def planted(name, losses, angles, seed):
        modules = ("h.0.q", "h.1.q", "score")
        cosines = {
            ("direction_cosine", module): dict(zip((1, 4), pair, strict=True))
            for module, pair in zip(modules, angles, strict=True)
        }
        return plant(tmp_path, f"{name}{seed}", {("loss", ""): dict(enumerate(losses, 1))} | cosines, seed=seed)

    plain = [planted("plain", [4, 3, 2, 1 + seed], [(1, 0.2), (1, 0.4), (9, 9)], seed) for seed in (0, 1)]
    guided = planted("guided", [4, 2, 1, 0], [(1, 0.5), (1, 0.7), (9, 9)], 0)
    loss, cosine = plots.guidance({"plain": plain, "guided": guided}, windows=2).rows()[0]
    found = loss.data.set_index(["recipe", "step"])["value"]
    assert found.to_dict() == {("plain", 2): 3.5, ("plain", 4): 1.75, ("guided", 2): 3, ("guided", 4): 0.5}
    angles = cosine.data.set_index(["recipe", "step"])["value"]
    expected = {("plain", 4): 0.3, ("guided", 4): 0.6}  # at step 1 the direction is its average
    assert angles.to_dict() == pytest.approx(expected)
    assert "windows of 2 steps" in loss.caption
    guided = [guided, planted("guided", [4, 2, 1, 3], [(1, 0.5), (1, 0.7), (9, 9)], 1)]
    paired = plots.guidance({"plain": plain, "guided": guided}, windows=2).panels[1]
    found = paired.data.set_index(["recipe", "step"])[["smaller", "larger"]]
    assert found.T.to_dict("list") == {("guided", 2): [-0.5, -0.5], ("guided", 4): [-1.0, 0.0]}
    assert "paired by seed" in paired.title


def test_guidance_compares_the_cosine_with_that_of_independent_directions(trained):
    *_, cosine = plots.guidance(trained["adapprox"]).panels
    baseline = cosine.table(cosine.marks_of(Line)[-1])
    assert set(baseline["recipe"]) == {"independent directions"}
    directions = np.random.default_rng(0).normal(size=(400, 500))
    average = np.zeros(500)
    cosines = []
    for direction in directions:
        average = 0.9 * average + 0.1 * direction
        cosines.append(direction @ average / np.linalg.norm(direction) / np.linalg.norm(average))
    assert baseline["value"].tolist() == pytest.approx([np.mean(cosines[50:])] * len(baseline), abs=0.01)


@pytest.fixture
def searched(tmp_path):
    """Write runs of two methods at two rates; the first method is best at 0.02 on validation, but not on test."""
    write = partial(plant, tmp_path)
    losses = {
        "slow at 0.01": (0.01, [0.6, 0.8], [0.5, 0.5]),
        "slow at 0.02": (0.02, [0.5, 0.7], [0.9, 0.7]),
        "fast at 0.1": (0.1, [0.2, 0.4], [0.3, 0.5]),
        "fast at 0.05": (0.05, [0.4, 0.6], [0.1, 0.1]),
    }
    return {
        label: [
            write(
                f"{label}{seed}".replace(" ", "-"),
                {("eval_loss", ""): {4: 9.0, 9: validation}, ("test_loss", ""): {9: test}},
                seed=seed,
                settings={"steps": 9, "lr": rate},
            )
            for seed, (validation, test) in enumerate(zip(*pairs, strict=True))
        ]
        for label, (rate, *pairs) in losses.items()
    }


def test_learning_rates_are_chosen_on_validation_and_reported_on_test(searched):
    by_rate, tested = plots.learning_rates(searched).rows()[0]
    found = by_rate.data.set_index(["method", "lr"])["value"]
    assert found.index.tolist() == [("slow", 0.01), ("slow", 0.02), ("fast", 0.05), ("fast", 0.1)]
    assert found.tolist() == pytest.approx([0.7, 0.6, 0.5, 0.3])
    assert tested.data.set_index("method")["value"].to_dict() == pytest.approx({"slow": 0.8, "fast": 0.4})
    assert "slow 0.02; fast 0.1." in tested.caption
