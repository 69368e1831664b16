"""FourierFT's two ablations, of the band and of the basis, as figures: against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import SHAPE, C, lookup, plant, plant_fourier

from lorascope import plots
from lorascope.runs.run import Run

FOUND = {"h.0.q": {9: C}}
T2 = 12.706204736432095 / math.sqrt(2)  # of a standard deviation, for two values


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Writes a FourierFT run that reaches a test metric."""

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


def test_the_metric_stands_over_the_center_with_the_interval_of_its_seeds(run: Any) -> None:
    chart = plots.bias_curve(bands(run))
    own = chart.data[chart.data["series"] == "width 3"]
    assert own["center"].tolist() == [0, 2]
    assert own["value"].tolist() == pytest.approx([0.72, 0.82])
    for row, deviation in zip(own.itertuples(), (0.04, 0.02), strict=True):
        assert (row.high - row.low) / 2 == pytest.approx(T2 * deviation / math.sqrt(2))


def test_the_even_draw_is_a_rule_from_frequency_zero_to_the_highest(run: Any) -> None:
    chart = plots.bias_curve(bands(run))
    even = chart.data[chart.data["series"] == "drawn evenly"]
    corner = math.hypot(SHAPE[0] // 2, SHAPE[1] // 2)
    assert even["center"].tolist() == pytest.approx([0, corner])
    assert even["value"].tolist() == even["low"].tolist() == pytest.approx([0.80, 0.80])
    assert chart.x.limits[0] < 0
    assert chart.x.limits[1] == pytest.approx(corner)
    points = next(mark for mark in chart.marks if mark.kind == "point")
    assert set(chart.table(points)["series"]) == {"width 3"}


def test_the_caption_pairs_each_band_with_the_even_draw_of_the_same_seed(run: Any) -> None:
    caption = plots.bias_curve(bands(run)).caption
    assert f"band 0: -0.080 [{-0.08 - T2 * 0.04 / 2**0.5:.3f}, {-0.08 + T2 * 0.04 / 2**0.5:.3f}]" in caption
    assert "band 2: 0.020 [" in caption
    assert "2 seeds (0, 1)" in caption


def test_each_width_has_a_curve_of_its_own_and_the_even_draw_may_be_the_control(run: Any) -> None:
    narrow, wide = (run(0.5, label=f"width {width}", center=1, width=width) for width in (1, 4))
    chart = plots.bias_curve([wide, narrow], run(0.6, label="even", center=None, width=9))
    assert lookup(chart, "series", "center")["width 1", 1] == 0.5
    assert list(dict.fromkeys(chart.data["series"])) == ["width 1", "width 4", "drawn evenly"]
    alone = plots.bias_curve([wide, narrow])
    assert "drawn evenly" not in set(alone.data["series"])
    assert "no interval" in alone.caption


def test_what_is_no_band_or_differs_in_more_is_refused(run: Any, tmp_path: Path) -> None:
    even = run(0.5, center=None, width=3)
    with pytest.raises(
        ValueError, match=r"^bias_curve got no run whose entries were drawn in a band: .*center="
    ) as told:
        plots.bias_curve(even)
    assert "\n" not in str(told.value)
    other = run(0.5, label="other", center=1, width=3, alpha=300)
    with pytest.raises(ValueError, match=r"differ in center and width alone; got alpha 12 \(run .*\) and 300 \(run"):
        plots.bias_curve([even, other])
    low_rank = plant(tmp_path, "a", {("test_metric", ""): {9: 0.5}})
    with pytest.raises(ValueError, match="bias_curve needs Fourier coefficients"):
        plots.bias_curve(low_rank)
    with pytest.raises(ValueError, match="basis_ablation needs coefficients on a basis: train with FourierFT"):
        plots.basis_ablation(low_rank)


def three(run: Any) -> list[Run]:
    reached = {"fourier": (0.80, 0.90), "random": (0.70, 0.78), "orthogonal": (0.84, 0.86)}
    return [
        run(metric, seed, f"FourierFT, basis {basis}", basis=basis)
        for basis, two in reached.items()
        for seed, metric in enumerate(two)
    ]


def test_bases_stand_beside_each_other_with_their_seeds_and_interval(run: Any) -> None:
    chart = plots.basis_ablation(three(run))
    assert chart.x.order == ("Fourier", "random", "orthogonal")
    assert lookup(chart, "basis") == pytest.approx({"Fourier": 0.85, "random": 0.74, "orthogonal": 0.85})
    half = (chart.data["high"] - chart.data["low"]) / 2
    assert half.to_numpy() == pytest.approx(T2 * np.array([0.1, 0.08, 0.02]) / math.sqrt(2))
    seeds = chart.table(chart.marks[0])
    assert seeds["value"].tolist() == [0.80, 0.90, 0.70, 0.78, 0.84, 0.86]
    assert seeds["basis"].tolist() == ["Fourier"] * 2 + ["random"] * 2 + ["orthogonal"] * 2
    assert "FourierFT, basis random: -0.110 [" in chart.caption
    assert "paired by seed" in chart.caption


def test_bases_at_two_sizes_are_refused(run: Any) -> None:
    pair = [run(0.5, basis="fourier", coefficients=9), run(0.6, label="b", basis="random", coefficients=8)]
    with pytest.raises(ValueError, match="differ in basis alone; got coefficients 9"):
        plots.basis_ablation(pair)


def test_settings_must_agree(run: Any) -> None:
    one, two = run(0.5, basis="fourier"), run(0.6, label="b", basis="random")
    two.meta["settings"] = {"steps": 10}
    with pytest.raises(ValueError, match=r"got steps 9 \(run .*\) and 10 \(run"):
        plots.basis_ablation([one, two])


def test_both_renderers_draw_them(run: Any) -> None:
    for figure in (plots.bias_curve(bands(run)), plots.basis_ablation(three(run))):
        assert figure.mpl().axes
        assert figure.plotly().data


def test_an_axis_has_the_name_of_the_metric_that_all_runs_share(tmp_path: Path) -> None:
    reached = {("test_metric", ""): {9: 0.5}}
    one, two, other = (
        plant(tmp_path, str(number), reached, test={"name": name, "metric": 0.5, "loss": 0.7})
        for number, name in enumerate(("accuracy", "accuracy", "perplexity"))
    )
    assert plots.ablations({"one": one, "two": two}).y.label == "test accuracy"
    assert plots.ablations({"one": one, "other": other}).y.label == "test metric"
