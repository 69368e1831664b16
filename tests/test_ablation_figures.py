"""Figures of ablations, by frequency band and by basis, against hand-computed numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from planted import SHAPE, C, lookup, plant, plant_fourier

from lorascope import plots
from lorascope.runs.run import Run

FOUND = {"h.0.q": {9: C}}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Return a function that writes a FourierFT run with a test metric."""

    def make(metric: float, seed: int = 0, label: str = "FourierFT", **recipe: Any) -> Run:
        folder = f"{label}-{seed}-{'-'.join(map(str, recipe.values()))}"
        return plant_fourier(tmp_path, folder, FOUND, label, seed, metric=metric, **recipe)

    return make


def bands(run: Any) -> dict[str, list[Run]]:
    reached = {0: (0.70, 0.74), 2: (0.81, 0.83), None: (0.80, 0.80)}
    return {
        f"band {center}": [
            run(metric, seed, f"band {center}", center=center, width=3) for seed, metric in enumerate(two)
        ]
        for center, two in reached.items()
    }


def test_bias_curve_plots_metric_by_center_with_its_seeds(run: Any) -> None:
    chart = plots.bias_curve(bands(run)).panels[0]
    own = chart.data[chart.data["series"] == "width 3"]
    assert own["center"].tolist() == [0, 2]
    assert own["value"].tolist() == pytest.approx([0.72, 0.82])
    assert own[["smaller", "larger"]].to_numpy().tolist() == [[0.70, 0.74], [0.81, 0.83]]


def test_bias_curve_draws_the_uniform_draw_from_frequency_zero_to_the_highest(run: Any) -> None:
    chart = plots.bias_curve(bands(run)).panels[0]
    uniform = chart.data[chart.data["series"] == "uniform draw"]
    corner = math.hypot(SHAPE[0] // 2, SHAPE[1] // 2)
    assert uniform["center"].tolist() == pytest.approx([0, corner])
    assert uniform["value"].tolist() == uniform["smaller"].tolist() == pytest.approx([0.80, 0.80])
    assert chart.x.limits[0] < 0
    assert chart.x.limits[1] > corner  # no dot is cut


def test_bias_curve_pairs_each_band_with_the_uniform_draw_by_seed(run: Any) -> None:
    metric, paired = plots.bias_curve(bands(run)).panels
    assert paired.x == metric.x
    assert lookup(paired, "center") == pytest.approx({0: -0.08, 2: 0.02})
    assert paired.data[["smaller", "larger"]].iloc[0].tolist() == pytest.approx([-0.10, -0.06])
    assert paired.y.label == "test metric − band None"
    assert "2 seeds (0, 1)" in paired.caption


def test_bias_curve_has_one_curve_per_width_and_accepts_the_uniform_draw_as_control(run: Any) -> None:
    narrow, wide = (run(0.5, label=f"width {width}", center=1, width=width) for width in (1, 4))
    chart = plots.bias_curve([wide, narrow], run(0.6, label="even", center=None, width=9)).panels[0]
    assert lookup(chart, "series", "center")["width 1", 1] == 0.5
    assert list(dict.fromkeys(chart.data["series"])) == ["width 1", "width 4", "uniform draw"]
    only_bands = plots.bias_curve([wide, narrow]).panels[0]
    assert "uniform draw" not in set(only_bands.data["series"])
    assert "no interval" in only_bands.caption


def test_bias_curve_without_a_band_or_with_other_differences_raises(run: Any, tmp_path: Path) -> None:
    uniform = run(0.5, center=None, width=3)
    with pytest.raises(ValueError, match=r"^bias_curve.*band.*center=") as raised:
        plots.bias_curve(uniform)
    assert "\n" not in str(raised.value)
    other = run(0.5, label="other", center=1, width=3, alpha=300)
    with pytest.raises(ValueError, match=r"center and width, got alpha 12 \(run .*\) and 300 \(run"):
        plots.bias_curve([uniform, other])
    low_rank = plant(tmp_path, "a", {("test_metric", ""): {9: 0.5}})
    with pytest.raises(ValueError, match=r"bias_curve.*Fourier coefficients"):
        plots.bias_curve(low_rank)
    with pytest.raises(ValueError, match=r"basis_ablation.*basis.*FourierFT"):
        plots.basis_ablation(low_rank)


def three(run: Any) -> list[Run]:
    reached = {"fourier": (0.80, 0.90), "random": (0.70, 0.78), "orthogonal": (0.84, 0.86)}
    return [
        run(metric, seed, f"FourierFT, basis {basis}", basis=basis)
        for basis, two in reached.items()
        for seed, metric in enumerate(two)
    ]


def test_basis_ablation_plots_each_basis_with_its_seeds(run: Any) -> None:
    chart, paired = plots.basis_ablation(three(run)).panels
    assert chart.y.order == paired.y.order
    assert set(chart.y.order[:2]) == {"Fourier", "orthogonal"}
    assert lookup(chart, "recipe") == pytest.approx({"Fourier": 0.85, "random": 0.74, "orthogonal": 0.85})
    seeds = chart.data.set_index("recipe")[["smaller", "larger"]]
    assert seeds.loc[["Fourier", "random"]].to_numpy().tolist() == [[0.80, 0.90], [0.70, 0.78]]
    assert lookup(paired, "recipe") == pytest.approx({"random": -0.11, "orthogonal": 0.0})


def test_basis_ablation_with_different_numbers_of_coefficients_raises(run: Any) -> None:
    pair = [run(0.5, basis="fourier", coefficients=9), run(0.6, label="b", basis="random", coefficients=8)]
    with pytest.raises(ValueError, match="basis, got coefficients 9"):
        plots.basis_ablation(pair)


def test_basis_ablation_with_different_training_settings_raises(run: Any) -> None:
    one, two = run(0.5, basis="fourier"), run(0.6, label="b", basis="random")
    two.meta.settings = {"steps": 10}
    with pytest.raises(ValueError, match=r"got steps 9 \(run .*\) and 10 \(run"):
        plots.basis_ablation([one, two])


def test_metric_axis_has_the_name_of_the_metric_if_all_runs_share_it(tmp_path: Path) -> None:
    reached = {("test_metric", ""): {9: 0.5}}
    one, two, other = (
        plant(tmp_path, str(number), reached, test={"name": name, "metric": 0.5, "loss": 0.7})
        for number, name in enumerate(("accuracy", "accuracy", "perplexity"))
    )
    assert plots.ablations({"one": one, "two": two}).panels[0].x.label == "test accuracy"
    assert plots.ablations({"one": one, "other": other}).panels[0].x.label == "test metric"
