"""Figure of the sensitivity of neurons, on a model whose sensitive neurons are known, and its null by shuffling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted import blocks, plant
from readers import Mpl, Plotly
from test_sensitivity import FAST, Copying, gradients, measured
from tolerance import TEXT, TINY, near

import lorascope as ls
from lorascope import observe, plots
from lorascope.adapters import delta
from lorascope.analysis import sensitive_neurons as analysis
from lorascope.charts.chart import Chart, Drawable
from lorascope.inputs import models
from lorascope.methods import Full
from lorascope.runs.run import Run

PLANTED = {0: [3, 11, 20, 33, 47], 1: [0, 8, 21, 30, 40]}  # a tenth of the 48 neurons of each layer


@pytest.fixture(scope="module")
def trained(task: Any, bert: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """Train a model where only the planted neurons of each layer reach its output; return its last copy as well."""
    model = models.load(bert, task=task)
    with torch.no_grad():
        for layer, numbers in PLANTED.items():
            others = np.setdiff1d(np.arange(48), numbers)
            model.get_submodule(f"bert.encoder.layer.{layer}.output.dense").weight[:, others] *= 1e-4
    seen = [observe.neurons(every=2, batches=2, rows=6), Copying()]
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = ls.train(model, task, Full(lr=1e-5), observe=seen, out=folder, **FAST)
    return run, Copying.kept


@pytest.fixture(scope="module")
def run(trained: tuple[Run, Any]) -> Run:
    return trained[0]


def panel(figure: Drawable, title: str) -> Chart:
    """Return the panel of a title."""
    (chart,) = [chart for chart in figure.panels if chart.title == title]
    return chart


def test_planted_neurons_are_the_most_sensitive_tenth(run: Run) -> None:
    sensitive = analysis.most_sensitive(analysis.list_sensitivities(run))
    for role in ("ffn_in", "ffn_out"):
        for layer, numbers in PLANTED.items():
            found = sensitive[(sensitive["role"] == role) & (sensitive["layer"] == layer)]
            assert sorted(found["neuron"]) == numbers
    shares = panel(plots.neuron_sensitivity(run), "Share of the top tenth").data.set_index(["place", "role"])
    for layer in "01":
        for role in ("ffn_in", "ffn_out"):
            assert shares.loc[(layer, role), "value"] > 95
        assert shares.loc[(layer, "q"), "value"] < 50


def test_planted_neurons_are_above_the_null_of_shuffled_gradients(run: Run) -> None:
    chart = panel(plots.neuron_sensitivity(run), "Sorted neurons")
    cells = chart.data[chart.data["role"] == "ffn_in"].set_index("percent")["value"]
    assert cells.iloc[0] > 3
    assert cells.iloc[-1] < 1e-2
    # Rows of equal size are equally sensitive if their gradients are shuffled.
    profiles = analysis.sort_profiles(analysis.list_sensitivities(run)).set_index(["gradients", "role"])["value"]
    assert profiles["gradients shuffled", "ffn_in"].max() < 1.5
    assert profiles["gradients shuffled", "ffn_in"].min() > 0.5


def test_null_of_the_profiles_has_a_band_over_the_modules(run: Run) -> None:
    chart = panel(plots.neuron_sensitivity(run), "Sorted neurons")
    assert [mark.kind for mark in chart.marks] == ["band", "line", "line"]
    null = chart.marks[0].data.set_index("percent")
    assert set(null["role"]) == {"gradients shuffled"}
    heights = []
    for _, module in analysis.list_sensitivities(run).groupby("module"):
        heights.append(np.quantile(module["shuffled"], 1 - null.index.to_numpy() / 100) / module["shuffled"].mean())
    for column, over_modules in (("low", np.min), ("value", np.mean), ("high", np.max)):
        assert list(null[column]) == pytest.approx(list(over_modules(heights, axis=0)))
    assert (null["low"] < null["high"]).any()


def test_null_is_the_mean_over_shuffled_gradients(trained: tuple[Run, Any]) -> None:
    run, (model, batches, _) = trained
    name = "bert.encoder.layer.1.intermediate.dense"
    gradient = gradients(model, [name], batches)[name]
    sizes = delta.host_weight(model.get_submodule(name)).detach().abs().double().numpy()
    rng, slopes = np.random.default_rng(0), gradient.abs().double().flatten().numpy()
    for side, axis in (("out", 1), ("in", 0)):
        sums = [(sizes * rng.permutation(slopes).reshape(sizes.shape)).sum(axis) for _ in range(2000)]
        error = np.std(sums, axis=0) / np.sqrt(len(sums))
        null = measured(run, f"shuffled_sensitivity_{side}", name)
        assert (np.abs(null - np.mean(sums, axis=0)) < 5 * error).all()
        assert null == near(sizes.sum(axis) * slopes.mean(), terms=TINY, growth=TEXT)


def test_names_of_the_most_sensitive_neurons_over_steps(run: Run) -> None:
    course = plots.sensitivity_over_steps(run, k=3).panels[0].data
    assert list(dict.fromkeys(course["step"])) == [0, 2, 4]
    last = analysis.list_sensitivities(run)
    last["value"] /= last.groupby("module")["value"].transform("mean")
    top = last.nlargest(3, "value")
    names = [f"{row.layer} {row.role} {row.neuron}" for row in top.itertuples()]
    assert list(dict.fromkeys(course["name"])) == [*names, "no. 3 of all", "no. 3 at random"]
    by_row = course.pivot(index="name", columns="step", values="value")
    assert (by_row.loc["no. 3 of all"] >= by_row.loc[names].min() - 1e-9).all()
    assert by_row.loc["no. 3 of all", 4] == pytest.approx(top["value"].iloc[-1])
    shuffled = last["shuffled"] / last.groupby("module")["shuffled"].transform("mean")
    assert by_row.loc["no. 3 at random", 4] == pytest.approx(shuffled.nlargest(3).iloc[-1])
    assert {(row.role, row.neuron in PLANTED[row.layer]) for row in top.itertuples()} <= {("ffn_in", 1), ("ffn_out", 1)}
    ends = course[course["step"] == 4].set_index("name")["value"]
    assert list(ends[names]) == pytest.approx(list(top["value"]))


def test_references_of_the_course_are_the_kth_of_each_step_without_a_null_the_first_only(tmp_path: Path) -> None:
    """The neuron that is second at the last step is third before, when another one is second."""
    sizes = {0: [3.0, 1.0, 2.0, 6.0], 9: [0.0, 3.0, 5.0, 8.0]}
    values = {("sensitivity_in", UP.replace("ffn_in", "ffn_out")): sizes}
    for row in MODULES:
        for side in ("in", "out"):
            values.setdefault((f"sensitivity_{side}", row["module"]), {0: [1.0] * 4, 9: [1.0] * 4})
    course = plots.sensitivity_over_steps(plant(tmp_path, "a", values, modules=MODULES), k=2).panels[0].data
    by_row = course.pivot(index="name", columns="step", values="value").loc[course["name"].unique()]
    assert list(by_row.index) == ["0 ffn_out 3", "0 ffn_out 2", "no. 2 of all"]
    assert by_row.to_numpy().tolist() == [[2.0, 2.0], [pytest.approx(2 / 3), 1.25], [1.0, 1.25]]


def test_both_renderers_show_the_numbers_of_the_tables(run: Run) -> None:
    figure = plots.neuron_sensitivity(run)
    shares, profile = (chart.data for chart in figure.panels)
    mpl, plotly = Mpl(figure), Plotly(figure)
    course = plots.sensitivity_over_steps(run)
    for first, other, table in ((mpl, plotly, shares), (Mpl(course), Plotly(course), course.panels[0].data)):
        assert first.heat(0) == other.heat(0)
        assert set(first.heat(0)[0]) - {None} == {round(value, 9) for value in table["value"]}
    drawn = [(xs, ys) for xs, ys, _ in mpl.lines(1) if xs]  # without the entries of the legend
    assert drawn == [line[:2] for line in plotly.lines(1)]
    null = figure.panels[1].marks[1].data
    lines = pd.concat([null, profile]).groupby("role", sort=False)["value"]
    assert sorted(ys for _, ys in drawn) == sorted([round(value, 9) for value in ys] for _, ys in lines)


MODULES = blocks(2, ("ffn_in", "ffn_out"), hidden=5)
UP = "encoder.layer.0.ffn_in"


def planted(folder: Path, id: str, first: int, **more: Any) -> Run:
    """Write a run whose most sensitive neurons of every module are ``first`` and the next one, without a null."""
    sizes = np.roll([9.0, 8.0, *np.linspace(1, 2, 18)], first)
    values = {}
    for row in MODULES:
        for side in ("in", "out"):
            values[f"sensitivity_{side}", row["module"]] = {9: sizes}
    return plant(folder, id, values, modules=MODULES, **more)


def test_overlap_between_seeds_and_tasks_with_its_random_baseline(tmp_path: Path) -> None:
    tweets = [planted(tmp_path, "a", 0, seed=0), planted(tmp_path, "b", 1, seed=1)]
    figure = plots.neuron_sensitivity({"tweets": tweets, "news": planted(tmp_path, "c", 10)})
    overlaps = panel(figure, "Overlap of the top tenth").data
    cells = overlaps.groupby("pair")["overlap"].agg(list)
    assert cells.to_dict() == {"tweets, seeds": [0.5], "tweets, news": [0, 0]}
    assert set(overlaps["most"].round(2)) == {0.27}
    assert "mean 0.10, 95th percentile 0.27" in figure.panels[0].caption
    assert "Null" not in figure.panels[0].caption
    profile = panel(figure, "Sorted neurons").data
    assert list(dict.fromkeys(profile["recipe"])) == ["tweets", "news"]
    heights = np.quantile(np.array([9.0, 8.0, *np.linspace(1, 2, 18)]) / 44 * 20, 1 - profile["percent"].unique() / 100)
    assert list(profile.loc[profile["recipe"] == "tweets", "value"]) == pytest.approx(list(heights))


def test_random_overlap_matches_random_choices_within_modules() -> None:
    sizes = {"up": 40, "down": 25}
    neurons = pd.concat([pd.DataFrame({"module": name, "role": "q", "neuron": range(n)}) for name, n in sizes.items()])
    rng = np.random.default_rng(0)
    overlaps = []
    for _ in range(20000):
        shared = sum(len({*rng.choice(n, k, False)} & {*rng.choice(n, k, False)}) for n, k in ((40, 4), (25, 3)))
        overlaps.append(shared / 7)
    found = analysis.random_overlap(neurons)
    assert found.chance == pytest.approx(np.mean(overlaps), abs=0.003)
    assert found.percentile_95 == pytest.approx(found.chance + 1.645 * np.std(overlaps), abs=0.01)


def test_runs_of_different_models_raise(tmp_path: Path) -> None:
    runs = {"a": planted(tmp_path, "a", 0), "b": planted(tmp_path, "b", 0, model="other")}
    with pytest.raises(ValueError, match="neuron_sensitivity needs runs with the same model"):
        plots.neuron_sensitivity(runs)


def test_run_without_a_sensitive_module_in_a_block_raises(tmp_path: Path) -> None:
    values = {(f"sensitivity_{side}", "score"): {9: [1.0, 2.0]} for side in ("in", "out")}
    with pytest.raises(ValueError, match="cannot list neurons of run a: no module in a block"):
        plots.neuron_sensitivity(plant(tmp_path, "a", values))
