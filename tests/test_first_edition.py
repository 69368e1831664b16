"""Stored figures of the first edition: they are read whole and drawn, and a damaged file is named."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lorascope.charts.chart import Chart
from lorascope.papers.figures.first_edition import stored_figures
from lorascope.papers.judging import published_numbers

FOLDER = Path(__file__).parents[1] / "data" / "edition-1" / "figures"


def test_stored_figures_have_their_tables_heading_and_description() -> None:
    figures = stored_figures(FOLDER)
    assert figures.keys() == {file.stem for file in FOLDER.iterdir()}
    for name, figure in figures.items():
        columns = pq.read_table(FOLDER / f"{name}.parquet").num_columns
        assert sum(table.shape[1] for chart in figure.chart.panels for _, table in chart.tables()) == columns
        assert figure.heading
        assert figure.alt
        assert figure.chart.plotly().data


def test_stored_tables_end_where_they_ended() -> None:
    """The authors' lists have 12 layers of two projections; steps stay integers next to longer tables."""
    panels = stored_figures(FOLDER)["published-ranks"].chart.panels
    assert [chart.data["layer"].tolist() for chart in panels[:2]] == [[*range(12)]] * 2
    for mark_chart in stored_figures(FOLDER)["update-norm"].chart.panels:
        for _, table in mark_chart.tables():
            assert not table.isna().all(axis=1).any()


@pytest.mark.parametrize("content", [b"x", None])
def test_damaged_stored_figure_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "norms.parquet"
    if content is None:
        pd.DataFrame({"0/x": [1]}).to_parquet(file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"norms\.parquet"):
        stored_figures(tmp_path)


def test_missing_table_of_a_stored_figure_is_named(tmp_path: Path) -> None:
    table = pq.read_table(shutil.copy(FOLDER / "use-shift.parquet", tmp_path))
    file = tmp_path / "use-shift.parquet"
    pq.write_table(table.select(table.column_names[:1]), file)
    with pytest.raises(ValueError, match=r"use-shift\.parquet"):
        stored_figures(tmp_path)


def test_differences_of_lisa_are_from_lora_of_the_same_seed() -> None:
    runs = pd.read_csv(FOLDER.parent / "runs.csv.gz").query("role == 'judged'")
    losses = runs[runs["arm"].str.contains("whole SmolLM2")].pivot(index="seed", columns="arm", values="loss")
    arms = {
        "LISA": "LISA, 2 of 30 blocks, whole SmolLM2",
        "LISA, one draw": "LISA, 2 of 30 blocks, one draw, whole SmolLM2",
        "full fine-tuning": "full fine-tuning, whole SmolLM2",
    }
    _, panel = stored_figures(FOLDER)["training-curves-lisa"].chart.panels
    values = panel.data.set_index("recipe")["value"]
    assert set(values.index) == set(arms)
    for name, arm in arms.items():
        difference = (losses[arm] - losses["LoRA, rank 8, whole SmolLM2"]).dropna()
        assert values[name] == pytest.approx(difference.mean(), rel=1e-9)


def test_selected_fractions_of_neurons_equal_the_numbers_of_another_figure() -> None:
    _, panel = stored_figures(FOLDER)["neuron-cosine"].chart.panels
    counts = stored_figures(FOLDER)["neurons"].chart.panels[0].data
    np.testing.assert_allclose(panel.data["value"], 100 * counts["value"] / 1536, rtol=1e-12)
    (chance,) = set(panel.marks[0].data["value"])
    # Both projections of six layers have as many neurons.
    assert chance == pytest.approx(panel.data["value"].mean(), rel=1e-9)


def test_random_logits_retain_as_many_components_as_the_search() -> None:
    chart = stored_figures(FOLDER)["selection-weights"].chart
    ends = chart.marks[-1].data.set_index("fate")
    logits = 0.93 * np.random.default_rng(1).standard_normal((50_000, 8))
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for fate, of_fate in (("retained", weights[weights > 1 / 8]), ("dropped", weights[weights <= 1 / 8])):
        quantiles = np.quantile(of_fate, [0.1, 0.5, 0.9])
        np.testing.assert_allclose(ends.loc[fate, ["low", "value", "high"]].astype(float), quantiles, rtol=0.02)
    assert round(480 * (weights > 1 / 8).mean()) in range(174, 178)
    assert "176 of 480" in chart.caption


def test_authors_lists_are_compared_with_random_ranks() -> None:
    """Every list has a dot, and title and caption have the numbers of the published tables."""
    chart = stored_figures(FOLDER)["published-ranks"].chart
    *_, spread = chart.panels
    lists = pd.read_csv(FOLDER.parents[1] / "published" / "autolora_lists.csv").query("judged")
    random = pd.read_csv(FOLDER.parents[1] / "published" / "autolora_chance.csv").iloc[0]
    assert sorted(spread.data["value"]) == pytest.approx(sorted(lists["sd"]))
    rows = pd.concat([mark.data for mark in spread.marks if mark.data is not None]).set_index("row")
    assert rows.loc["random ranks", ["value", "low", "high"]].tolist() == pytest.approx(
        random[["expected_sd_of_24", "low_2_5", "high_97_5"]].tolist()
    )
    gain = published_numbers.autolora(FOLDER.parents[1] / "published")
    mean = [random["expected_sd_of_24"] + number for number in (gain.mean, gain.low, gain.high)]
    assert rows.loc["mean", ["value", "low", "high"]].tolist() == pytest.approx(mean)
    assert chart.title.endswith(f": deviation {mean[0]:.2f}, at random {random['expected_sd_of_24']:.2f}")
    inside = int(lists["sd"].between(random["low_2_5"], random["high_97_5"]).sum())
    assert spread.title == f"Deviation of ranks: {inside} of {len(lists)} lists are in the random range"


def contains_zero(table: pd.DataFrame) -> bool:
    return bool(((table["low"] <= 0) & (table["high"] >= 0)).all())


def rows_of(panel: Chart, column: str, name: object) -> pd.DataFrame:
    """Return the rows of a panel's table with a value in a column."""
    return panel.data[panel.data[column] == name]


def test_titles_say_what_the_differences_say() -> None:
    """Findings in titles are not computed when a stored figure is drawn."""
    figures = stored_figures(FOLDER)

    def differences(name: str, words: str) -> pd.DataFrame:
        assert figures[name].chart.title.endswith(words)
        return figures[name].chart.panels[1].data

    assert contains_zero(differences("accuracy-adalora", ": no difference is seen"))
    assert contains_zero(differences("basis-ablation", ": no difference is seen, unlike in the paper"))
    assert contains_zero(differences("bias-curve", ": no difference from a uniform draw is seen"))
    assert contains_zero(differences("budgets", ": no difference is seen; AdaLoRA is printed above LoRA"))
    assert (figures["budgets"].chart.panels[3].data["value"] > 0).all()
    below = differences("accuracy-lora", ": LoRA is below full fine-tuning; at rank 4, no difference is seen")
    assert contains_zero(rows_of(figures["accuracy-lora"].chart.panels[1], "recipe", "LoRA, rank 4"))
    assert (below.loc[below["recipe"] != "LoRA, rank 4", "high"] < 0).all()
    runs = pd.read_csv(FOLDER.parent / "runs.csv.gz").query("role == 'judged' and seed < 105")
    accuracies = runs.pivot_table(index="seed", columns="arm", values="accuracy")
    paired = (accuracies["LoRA, rank 8"] - accuracies["full fine-tuning"]).dropna()
    assert len(paired) == 5
    assert paired.mean() == pytest.approx(below.set_index("recipe")["value"]["LoRA, rank 8"], rel=1e-6)
    assert (
        "accuracy of LoRA minus that of full fine-tuning with the same seed"
        in figures["accuracy-lora"].chart.panels[0].caption
    )
    assert (differences("quality", ": FourierFT is below LoRA of equal size")["high"] < 0).all()
    by_size = differences("low-data", ": LoRA is lower with all; with 1,000 or 100, no difference is seen")
    assert list(by_size.loc[by_size["high"] < 0, "examples"]) == ["all"]
    assert contains_zero(by_size[by_size["examples"].isin(["1,000", "100"])])
    of_loss = differences("training-curves-optimizers", ": Adafactor ends lowest, Adapprox above AdamW")
    of_loss = of_loss.set_index("recipe")
    assert of_loss["value"].idxmin() == "Adafactor"
    assert of_loss["high"]["Adafactor"] < 0 < of_loss["low"]["Adapprox"]
    neurons = differences("training-curves-neft", ": selected neurons are not better than random ones")
    neurons = neurons.set_index("recipe")["value"]
    assert neurons["NeFT, 9%"] > neurons["random neurons, 9%"]


def test_titles_say_what_the_levels_say() -> None:
    figures = stored_figures(FOLDER)

    def panels(name: str, words: str) -> tuple[Chart, ...]:
        chart = figures[name].chart
        assert (chart.title or chart.panels[0].title).endswith(words)
        return chart.panels

    (norms,) = panels("update-norm", ": only LoRA's grows with depth")
    for recipe, grows in (("LoRA, rank 8", True), ("full fine-tuning", False)):
        by_layer = rows_of(norms, "recipe", recipe).set_index("place")
        assert bool(by_layer["low"]["5"] > by_layer["high"]["0"]) == grows
    (steps,) = panels("norm-over-steps", ": from step 80 on, only LoRA's grows with depth")
    for recipe, grows in (("LoRA, rank 8", True), ("full fine-tuning", False)):
        by_step = rows_of(steps, "recipe", recipe).set_index(["step", "place"])
        for step in steps.data["step"].unique():
            grows_now = bool(by_step["low"][step, "5"] > by_step["high"][step, "0"])
            assert grows_now == grows or step < 80
    by_rank = panels("ranks-lora", ": lowest at ranks 1 and 2, whose learning rate is not tuned")[0].data.sort_values(
        "value"
    )
    assert set(by_rank["rank"][:2]) == {1, 2}
    left_out = panels("left-out-adalora", ": two of three seeds need the penalty")[0]
    majority = left_out.marks[0].x
    assert (rows_of(left_out, "recipe", "no penalty")["value"] <= majority).sum() == 2
    found, random = panels("rank-allocation", ": AdaLoRA gives the lowest layers more")
    assert found.data.groupby("place")["value"].mean().idxmax() == "0"
    assert random.data.groupby("place")["value"].mean().between(7, 9).all()
    assert found.data.groupby("place")["value"].mean()["0"] > found.data.groupby("place")["value"].mean()["5"] + 2
    *_, difference = panels("rank-domains", ": 3 of 36 modules differ for all seeds")
    assert difference.data["words"].str.endswith("*").sum() == 3
    assert len(difference.data) == 36
    outside, total = 0, 0
    for panel in panels("fourier-spectrum", ": like that of shuffled coefficients")[3:]:
        outside += int((~panel.data["value"].between(panel.data["low"], panel.data["high"])).sum())
        total += len(panel.data)
    assert outside <= 0.05 * total
    (overlap,) = panels("neuron-overlap", ": 0.61 to 0.71, at random 0.29")
    shared = overlap.data["overlap"]
    assert (
        f"{shared.min():.2f} to {shared.max():.2f}, at random {overlap.marks[0].x:.2f}"
        == "0.61 to 0.71, at random 0.29"
    )
    (planted,) = panels("planted", ": AdaLoRA 1.0 and 2.7, AutoLoRA 1.5 and 1.7, ALoRA 1.4 and 2.5")
    ends = planted.data.pivot(index="recipe", columns="planted", values="value")
    for name in ("AdaLoRA", "AutoLoRA", "ALoRA"):
        assert f"{name} {ends[0][name]:.1f} and {ends[4][name]:.1f}" in planted.title
    assert f"{ends.loc['AutoLoRA'].mean():.1f} ranks per module" in planted.caption
    fitting, best = panels("toy-task", ": FourierFT and a random basis fit, LoRA in 1 of 48 runs")
    fitted = best.data.set_index("recipe")["value"] == 1
    assert list(fitted.index[fitted]) == ["FourierFT", "random basis"]
    at_end = fitting.data.groupby("name")["value"].max()
    of_lora = at_end[at_end.index.str.startswith("LoRA")]
    assert (24 * of_lora.sum(), 24 * len(of_lora)) == (pytest.approx(1), 48)
    (scores,) = panels("importance-alora", ": retained and dropped ones overlap")
    bands = scores.data.pivot(index="step", columns="fate", values=["low", "high"])
    assert (bands["low"]["retained"] < bands["high"]["dropped"]).all()
    neurons, *_ = panels("neurons", ": mostly of ffn_out, unlike random ones and probes")
    counts = neurons.data.groupby("role")["value"].sum()
    assert counts["ffn_out"] > 2 * counts["ffn_in"]
    for panel in figures["neurons"].chart.panels[2:]:
        totals = panel.data.groupby("role")["value"].sum()
        assert totals.max() < 1.1 * totals.min()
    shift, printed = panels("use-shift", ": larger for the largest rotation, unlike in the paper")
    assert shift.data.set_index("recipe")["value"].idxmax() == "NeFT, 9%"
    assert printed.data.set_index("recipe")["value"].idxmin() == "NeFT, 9%"
    (scores,) = panels("against-truth", ": correlations are at most 0.31")
    assert f"{rows_of(scores, 'kind', 'score')['value'].max():.2f}" == "0.31"
    (agreement,) = panels("agreement", ": with the loss increase at most 0.30")
    increases = agreement.data[agreement.data["first"].str.startswith("loss increase")]
    assert f"{increases.loc[~increases['second'].isin(['1', '2']), 'value'].max():.2f}" == "0.30"
    for overlap in panels("overlap-by-size", ": far above chance at every size"):
        by_size = overlap.data.pivot(index="fraction", columns="recipe", values="value")
        assert (by_size["two seeds or samples"] > 2 * by_size["chance"]).all()
    (replay,) = panels("rank-replay-alora", ", 144 in all: the last two layers gain, the first two lose")
    totals = replay.data.groupby(["step", "place"])["value"].sum().unstack()
    assert set(totals.sum(axis=1)) == {144}
    gains = totals.loc[300] - totals.loc[0]
    assert (gains[["4", "5"]] > 0).all()
    assert (gains[["0", "1"]] < 0).all()
    (spectrum,) = panels("spectrum", ": effective rank 3.5 of 8, and 17.3 of 64")
    for recipe in ("LoRA, rank 8 (effective rank 3.5)", "LoRA, rank 64 (effective rank 17.3)"):
        rank, effective = map(float, re.findall(r"rank ([\d.]+)", recipe))
        assert f"{effective} of {rank:.0f}" in spectrum.title
        values = rows_of(spectrum, "recipe", recipe)["value"]
        # The effective rank of the mean spectrum is near the mean of effective ranks.
        weights = values / values.sum()
        assert np.exp(-(weights * np.log(weights)).sum()) == pytest.approx(effective, rel=0.1)
    energy = []
    for image in panels("update-image", ": LoRA's are rows and columns, FourierFT's are not"):
        sigma = np.linalg.svd(image.data.pivot(index="row", columns="column", values="value"), compute_uv=False)
        energy.append((sigma[:2] ** 2).sum() / (sigma**2).sum())
    assert energy[0] < 0.2 < 0.99 < energy[1]
    (importance,) = panels("importance", ": tenfold apart from step 49 on")
    medians = importance.data.pivot(index="step", columns="fate", values="value")
    apart = medians["retained"] >= 10 * medians["dropped"]
    assert apart[~apart].index.max() < apart[apart].index.min() == 49
    _, chosen = panels("number-of-clusters", ": mostly 3 by k-means, 1 by DBSCAN")
    samples = chosen.data.pivot_table(index="k", columns="algorithm", values="samples", fill_value=0)
    assert samples["DBSCAN"].to_dict()[1] == samples["DBSCAN"].sum()
    assert samples["elbow of k-means"].idxmax() == 3
    assert samples["elbow of k-means"].max() > samples["elbow of k-means"].sum() / 2


def test_every_stored_figure_names_what_was_trained() -> None:
    """Runs on SmolLM2 say so in the name of their arm; the other runs on sentiment train MiniLM."""
    kept = pd.read_csv(FOLDER.parent / "runs.csv.gz").set_index("run")
    for name, figure in stored_figures(FOLDER).items():
        metadata = pq.read_schema(FOLDER / f"{name}.parquet").metadata[b"lorascope"].decode()
        runs = kept.loc[msgspec.json.decode(metadata)["runs"]]
        texts = " ".join(f"{panel.title} {panel.caption}" for panel in figure.chart.panels)
        of_smollm2 = runs["arm"].str.contains("SmolLM2")
        on_sentiment = runs["task"].fillna("").str.startswith("sentiment") & (runs["task"] != "sentiment as text")
        if on_sentiment.any():
            assert ("SmolLM2" in texts) == of_smollm2.any(), name
            assert ("MiniLM" in texts) == (~of_smollm2).any(), name


def test_lower_panels_of_the_toy_points_name_their_axes() -> None:
    for panel in stored_figures(FOLDER)["toy-points"].chart.panels[1:]:
        assert (panel.x.label, panel.y.label) == ("x", "y")
