"""Choice of the number of experts: planted clusters of texts, and figures against hand-computed numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import lookup, plant
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from test_hydralora import corpus

from lorascope import plots
from lorascope.analysis.head_count import DENSITY, KMEANS, cluster_selection, density_clusters, repeated_selection
from lorascope.charts.marks import Band, Rule
from lorascope.runs.run import Run

T3 = 4.302652729911275 / math.sqrt(3)  # half the t-interval of three values, in standard deviations


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_density_clusters_counts_the_vocabularies(kinds: int) -> None:
    assert density_clusters(TfidfVectorizer().fit_transform([*corpus(kinds), *corpus(kinds), "unknown"])) == kinds


def test_density_clusters_of_two_texts_is_zero_and_of_one_text_is_one() -> None:
    assert density_clusters(TfidfVectorizer().fit_transform(["one apple", "two pears"] * 5)) == 0
    assert density_clusters(TfidfVectorizer().fit_transform(["the same words"] * 9)) == 1


def test_repeated_selection_finds_the_planted_clusters_in_every_sample() -> None:
    texts = pd.Series([*corpus(3), *corpus(3, seed=1)])
    found = repeated_selection(texts, repetitions=2, most=5, sample=200)
    assert found.loc[found["chosen"], ["seed", "algorithm", "k"]].values.tolist() == [
        [0, KMEANS, 3], [0, DENSITY, 3], [1, KMEANS, 3], [1, DENSITY, 3],
    ]  # fmt: skip
    assert set(found["texts"]) == {200}
    second = found[(found["seed"] == 1) & (found["algorithm"] == KMEANS)].reset_index(drop=True)
    expected = cluster_selection(texts.sample(200, random_state=1), 5, 1)
    pd.testing.assert_frame_equal(second[expected.columns.tolist()], expected, check_dtype=False)


def test_repeated_selection_with_zero_repetitions_raises() -> None:
    with pytest.raises(ValueError, match=r"^repetitions.*1.*got 0$"):
        repeated_selection(corpus(2), repetitions=0)


def selection(chosen: dict[int, tuple[int, int]], sse: tuple[tuple[float, ...], ...]) -> pd.DataFrame:
    """Return a table as from ``repeated_selection``: seed -> (k of k-means, k of DBSCAN), and errors by seed."""
    rows = []
    for seed, (by_means, dense) in chosen.items():
        rows += [(seed, KMEANS, k, error, k == by_means) for k, error in enumerate(sse[seed], start=1)]
        rows += [(seed, DENSITY, dense, math.nan, True)]
    return pd.DataFrame(rows, columns=["seed", "algorithm", "k", "sse", "chosen"]).assign(texts=1000)


def test_head_choice_plots_relative_error_and_counts_elbows() -> None:
    found = selection({0: (2, 1), 1: (3, 1)}, ((10.0, 4.0, 2.0), (20.0, 12.0, 5.0)))
    error, number = plots.head_choice(found, static=4).rows()[0]
    assert lookup(error, "k") == pytest.approx({1: 1.0, 2: 0.5, 3: 0.225})
    assert not error.marks_of(Band)
    assert "interval" not in error.caption
    elbows = next(error.table(mark) for mark in error.marks if mark.kind == "text")
    assert dict(zip(elbows["k"], elbows["words"], strict=True)) == {2: "1×", 3: "1×"}
    assert lookup(number, "algorithm", "sample", value="k") == {
        (KMEANS, 1): 2, (KMEANS, 2): 3, (DENSITY, 1.3): 1, (DENSITY, 2.3): 1,
    }  # fmt: skip
    assert [mark.y for mark in number.marks if isinstance(mark, Rule)] == [4]
    assert "k-means 2.5 (2–3); DBSCAN 1.0 (1–1). 2 samples of 1,000 texts" in error.caption


def test_head_choice_of_three_samples_has_a_band() -> None:
    errors = ((10.0, 4.0), (20.0, 12.0), (10.0, 5.0))
    error, _ = plots.head_choice(selection(dict.fromkeys(range(3), (2, 1)), errors)).rows()[0]
    low, high = stats.t.interval(0.95, 2, 0.5, stats.sem([0.4, 0.6, 0.5]))
    assert error.data.loc[error.data["k"] == 2, ["low", "high"]].to_numpy()[0] == pytest.approx([low, high])
    assert "Band: 95% t-interval over samples" in error.caption


def test_head_choice_of_one_sample_has_no_band(tmp_path: Path) -> None:
    drawn = plots.head_choice(selection({0: (2, 0)}, ((9.0, 3.0, 2.0),)))
    error, number = drawn.rows()[0]
    assert {mark.kind for mark in error.marks} == {"line", "point"}
    assert not any(isinstance(mark, Rule) for mark in number.marks)
    assert "interval" not in error.caption
    assert drawn.save(tmp_path / "choice.png").exists()
    assert drawn.plotly().data


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Return a function that writes a HydraLoRA run with a test metric."""

    def make(metric: float, seed: int = 0, label: str = "Hydra", name: str = "hydralora", **recipe: Any) -> Run:
        folder = f"{label}-{seed}-{'-'.join(map(str, recipe.values()))}"
        values = {("test_metric", ""): {9: metric}}
        parameters = {"trained": 1000 + 10 * seed}
        return plant(tmp_path, folder, values, label, seed, recipe={"name": name} | recipe, parameters=parameters)

    return make


def by_number(run: Any) -> dict[str, list[Run]]:
    reached = {4: (0.81, 0.83, 0.82), 1: (0.70, 0.74, 0.72), 8: (0.80, 0.80, 0.80)}
    return {
        f"{n} experts": [run(metric, seed, f"{n} experts", num_experts=n) for seed, metric in enumerate(metrics)]
        for n, metrics in reached.items()
    }


def test_number_of_experts_plots_metric_by_number_with_seed_interval(run: Any) -> None:
    chart, paired = plots.number_of_experts(by_number(run)).panels
    assert chart.data["number"].tolist() == [1, 4, 8]
    assert chart.data["value"].tolist() == pytest.approx([0.72, 0.82, 0.80])
    half = (chart.data["high"] - chart.data["low"]) / 2
    assert half.to_numpy() == pytest.approx(T3 * np.array([0.02, 0.01, 0]), rel=1e-9)
    assert chart.x.ticks == {1: "1", 4: "4", 8: "8"}
    assert lookup(paired, "number") == pytest.approx({1: -0.10, 8: -0.02})
    assert paired.data["high"].tolist() == pytest.approx([-0.10 + T3 * 0.01, -0.02 + T3 * 0.01])
    assert paired.y.label == "test metric − 4 experts"
    assert "Trained parameters: 4 experts: 1,000; 1 experts: 1,000; 8 experts: 1,000." in chart.caption


def test_number_of_experts_draws_controls_as_horizontal_lines(run: Any) -> None:
    lora = {"LoRA": [run(metric, seed, "LoRA", name="lora", rank=9) for seed, metric in enumerate((0.7, 0.8))]}
    chart = plots.number_of_experts(by_number(run), lora).panels[0]
    level = chart.data[chart.data["series"] == "LoRA"]
    assert level["number"].tolist() == [1, 8]
    assert level["value"].tolist() == pytest.approx([0.75, 0.75])
    assert chart.colors == ("HydraLoRA", "LoRA")


def test_number_of_experts_without_experts_or_with_other_differences_raises(run: Any) -> None:
    with pytest.raises(ValueError, match=r"^number_of_experts.*number of experts.*HydraLoRA \(run"):
        plots.number_of_experts(run(0.5, name="lora", rank=2))
    one, two = run(0.5, label="a", num_experts=1, rank=2), run(0.6, label="b", num_experts=2, rank=4)
    with pytest.raises(ValueError, match=r"num_experts, got rank 2 \(run .*\) and 4 \(run"):
        plots.number_of_experts([one, two])


def test_ablations_draw_one_row_per_variant(run: Any) -> None:
    reached = {"full": (0.80, 0.90), "uniform gates": (0.70, 0.78)}
    runs = {name: [run(m, seed, name, num_experts=seed) for seed, m in enumerate(two)] for name, two in reached.items()}
    chart, paired = plots.ablations(runs).panels
    assert lookup(chart, "recipe") == pytest.approx({"full": 0.85, "uniform gates": 0.74})
    assert chart.y.order == ("full", "uniform gates")
    assert lookup(paired, "recipe") == pytest.approx({"uniform gates": -0.11})
    assert paired.data[["smaller", "larger"]].iloc[0].tolist() == pytest.approx([-0.12, -0.10])


def test_ablations_with_two_tasks_raises(run: Any) -> None:
    one, two = run(0.5, label="a"), run(0.6, label="b")
    two.meta.task = "other"
    with pytest.raises(ValueError, match=r"ablations.*task, got t \(run .*\) and other \(run"):
        plots.ablations([one, two])
