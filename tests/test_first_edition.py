"""Stored figures of the first edition: they are read whole and drawn, and a damaged file is named."""

from __future__ import annotations

import re
import shutil
from itertools import combinations
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
    assert chart.title.endswith(f": standard deviation {mean[0]:.2f}, random {random['expected_sd_of_24']:.2f}")
    inside = int(lists["sd"].between(random["low_2_5"], random["high_97_5"]).sum())
    assert spread.title == f"Deviation of ranks: {inside} of {len(lists)} lists are in the random range"


def overlaps_of_seeds() -> list[float]:
    """Return the fraction of neurons that each pair of seeds of NeFT, 9%, shares."""
    selected = pd.read_parquet(FOLDER.parent / "selected.parquet")
    neurons = {seed: set(zip(rows["module"], rows["neuron"], strict=True)) for seed, rows in selected.groupby("seed")}
    return [len(neurons[a] & neurons[b]) / len(neurons[a]) for a, b in combinations(neurons, 2)]


def contains_zero(table: pd.DataFrame) -> bool:
    return bool(((table["low"] <= 0) & (table["high"] >= 0)).all())


def rows_of(panel: Chart, column: str, name: object) -> pd.DataFrame:
    """Return the rows of a panel's table with a value in a column."""
    return panel.data[panel.data[column] == name]


def points(value: float, digits: int = 1) -> str:
    """Return a difference in accuracy as titles print it, in points."""
    return f"{100 * value:+.{digits}f}".replace("-", "−")


def nats(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def test_titles_say_what_the_differences_say() -> None:
    """Findings in titles are not computed when a stored figure is drawn."""
    figures = stored_figures(FOLDER)

    def differences(name: str, words: str) -> pd.DataFrame:
        assert figures[name].chart.title.endswith(words)
        return figures[name].chart.panels[1].data

    assert contains_zero(differences("accuracy-adalora", ": no difference is seen"))
    bases = differences("basis-ablation", " an orthogonal one: no difference is seen; printed −3.5 to −6.4")
    assert contains_zero(bases)
    by_basis = bases.set_index("basis")["value"]
    assert f"{points(by_basis['random'])} point with" in figures["basis-ablation"].chart.title
    assert f"{points(by_basis['orthogonal'])} with" in figures["basis-ablation"].chart.title
    losses = []
    for panel in figures["basis-ablation"].chart.panels[2:]:
        printed = panel.data.set_index("basis")["value"]
        losses += list(printed.drop("Fourier") - printed["Fourier"])
    assert (points(max(losses)), points(min(losses))) == ("−3.5", "−6.4")
    bands = differences("bias-curve", " points below a uniform draw, no difference is seen")
    assert contains_zero(bands)
    assert f": at most {-100 * bands['value'].min():.1f} points" in figures["bias-curve"].chart.title
    assert (
        f"at most ±{50 * (bands['high'] - bands['low']).max():.1f} points"
        in figures["bias-curve"].chart.panels[0].caption
    )
    printed_gains = figures["budgets"].chart.panels[3].data["value"]
    ends = [points(end, 2) for end in (printed_gains.min(), printed_gains.max())]
    of_budgets = differences("budgets", f" points, no difference is seen; printed {' to '.join(ends)}")
    assert contains_zero(of_budgets)
    ends = [points(end) for end in (of_budgets["value"].min(), of_budgets["value"].max())]
    assert f": {' to '.join(ends)} points" in figures["budgets"].chart.title
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
    of_size = differences("quality", " points below LoRA of equal size in test accuracy")
    assert (of_size["high"] < 0).all()
    (few, many) = -100 * of_size["value"]
    assert figures["quality"].chart.title.startswith(f"FourierFT is {few:.1f} and {many:.1f} points")
    by_size = differences("low-data", ", where no difference is seen")
    levels = by_size.set_index("examples")["value"].map(points)
    phrase = f"{levels['all']} points with all examples, {levels['1,000']} with 1,000 and {levels['100']} with 100"
    assert phrase in figures["low-data"].chart.title
    assert list(by_size.loc[by_size["high"] < 0, "examples"]) == ["all"]
    assert contains_zero(by_size[by_size["examples"].isin(["1,000", "100"])])
    of_loss = figures["training-curves-optimizers"].chart.panels[1].data.set_index("recipe")
    changes = of_loss["value"].map(nats)
    assert figures["training-curves-optimizers"].chart.title.endswith(
        f": Adafactor {changes['Adafactor']} nats, Adapprox {changes['Adapprox']}, CAME {changes['CAME']}"
    )
    assert of_loss["value"].idxmin() == "Adafactor"
    assert of_loss["high"]["Adafactor"] < 0 < of_loss["low"]["Adapprox"]
    neurons = figures["training-curves-neft"].chart.panels[1].data.set_index("recipe")["value"]
    assert figures["training-curves-neft"].chart.title.endswith(
        f": NeFT, 9%, {neurons['NeFT, 9%']:+.3f} nats, random neurons {neurons['random neurons, 9%']:+.3f}, "
        f"LoRA {neurons['LoRA, rank 8']:+.3f}"
    )
    assert neurons["NeFT, 9%"] > neurons["random neurons, 9%"]
    lisa = differences("training-curves-lisa", ", no difference is seen").set_index("recipe").loc["LISA"]
    assert lisa["low"] < 0 < lisa["high"]
    interval = f"{nats(lisa['value'])} nats [{nats(lisa['low'])}, {nats(lisa['high'])}]"
    assert interval in figures["training-curves-lisa"].chart.title


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
    by_rank = panels("ranks-lora", "; ranks 1 and 2 have no tuned learning rate")[0].data.sort_values("value")
    assert set(by_rank["rank"][:2]) == {1, 2}
    accuracy = (100 * by_rank.set_index("rank")["value"]).map("{:.1f}%".format)
    levels = f": {accuracy[1]} at rank 1, {accuracy[4]} at rank 4, {accuracy[64]} at 64;"
    assert levels in figures["ranks-lora"].chart.title
    assert by_rank["rank"].iloc[-1] == 4
    left_out = panels(
        "left-out-adalora", "2 of 3 seeds if it has no penalty, with none if its importance is sensitivity only"
    )[0]
    majority = left_out.marks[0].x
    fallen = rows_of(left_out, "recipe", "no penalty")["value"].nsmallest(2)
    # A model that predicts a single class has the frequency of that class as accuracy.
    assert fallen.tolist() == pytest.approx([1 - majority, majority], rel=1e-9)
    assert (rows_of(left_out, "recipe", "sensitivity only")["value"] > majority).all()
    found, random = panels("rank-allocation", "")
    low = found.data[found.data["place"].isin(["0", "1"])]
    is_narrow = low["role"].isin(["q", "k"])
    ends = []
    for ranks in (low.loc[~is_narrow, "value"], low.loc[is_narrow, "value"], random.data["value"]):
        ends.append(f"{ranks.min():.1f} to {ranks.max():.1f}")
    assert figures["rank-allocation"].chart.title == (
        f"AdaLoRA gives v, o and ffn of layers 0 and 1 ranks of {ends[0]}, q and k {ends[1]}; random {ends[2]}"
    )
    assert found.data.groupby("place")["value"].mean().idxmax() == "0"
    assert random.data.groupby("place")["value"].mean().between(7, 9).all()
    assert found.data.groupby("place")["value"].mean()["0"] > found.data.groupby("place")["value"].mean()["5"] + 2
    *_, difference = panels("rank-domains", ": 3 of 36 modules differ for all seeds, ffn_out of layer 5 by 7.8")
    farthest = difference.data.loc[difference.data["value"].abs().idxmax()]
    assert (farthest["role"], farthest["place"], f"{farthest['value']:.1f}") == ("ffn_out", "5", "7.8")
    of_alora, of_random = panels("rank-alora", " (by chance: below 0.07)")
    for panel in (of_alora, of_random):
        (agreement,) = re.findall(r"τ of seeds ([\d.]+)", panel.title)
        assert f" at {agreement}".replace("at 0.35", "at τ 0.35") in figures["rank-alora"].chart.title
    assert difference.data["words"].str.endswith("*").sum() == 3
    assert len(difference.data) == 36
    outside, total = 0, 0
    for panel in panels("fourier-spectrum", ": 43 of 44 rings are in the 95% range of shuffled ones")[3:]:
        outside += int((~panel.data["value"].between(panel.data["low"], panel.data["high"])).sum())
        total += len(panel.data)
    assert outside <= 0.05 * total
    assert (total - outside, total) == (43, 44)
    (overlap,) = panels("neuron-overlap", "")
    seeds, texts = (rows_of(overlap, "series", name)["overlap"] for name in ("same text", "two texts"))
    assert figures["neuron-overlap"].chart.title.endswith(
        f": {seeds.min():.2f} to {seeds.max():.2f} between seeds, {texts.min():.2f} to {texts.max():.2f} between "
        f"texts, at random {overlap.marks[0].x:.2f}"
    )
    pairs = overlaps_of_seeds()
    assert np.mean(pairs) == pytest.approx(overlap.data.set_index("pair")["overlap"]["all texts, two seeds"], rel=1e-9)
    for name in ("neuron-overlap", "overlap-by-size"):
        assert f": {min(pairs):.2f} to {max(pairs):.2f}" in figures[name].chart.panels[0].caption
    (planted,) = panels("planted", " (truth: 4)")
    ends = planted.data.pivot(index="recipe", columns="planted", values="value")
    spreads = ends[4] - ends[0]
    assert planted.title.startswith(
        f"Modules of planted rank 4 end {spreads['AdaLoRA']:.1f} ranks above those of 0 in AdaLoRA, "
        f"{spreads['ALoRA']:.1f} in ALoRA, {spreads['AutoLoRA']:.1f} in AutoLoRA"
    )
    assert f"{ends.loc['AutoLoRA'].mean():.1f} ranks per module" in planted.caption
    fitting, best = panels("toy-task", ": FourierFT and a random basis fit, LoRA in 1 of 48 runs")
    fitted = best.data.set_index("recipe")["value"] == 1
    assert list(fitted.index[fitted]) == ["FourierFT", "random basis"]
    at_end = fitting.data.groupby("name")["value"].max()
    of_lora = at_end[at_end.index.str.startswith("LoRA")]
    assert (24 * of_lora.sum(), 24 * len(of_lora)) == (pytest.approx(1), 48)
    (scores,) = panels("importance-alora", " nats apart in the last round")
    last = scores.data[scores.data["step"] == scores.data["step"].max()].set_index("fate")["value"]
    assert f": medians {last['retained'] - last['dropped']:.3f} nats" in scores.title
    bands = scores.data.pivot(index="step", columns="fate", values=["low", "high"])
    assert (bands["low"]["retained"] < bands["high"]["dropped"]).all()
    percentages = []
    for panel in panels("neurons", ""):
        totals = panel.data.groupby("role")["value"].sum()
        percentages.append(f"{100 * totals['ffn_out'] / totals.sum():.0f}%")
    nefts, _, randoms, probes = percentages
    assert figures["neurons"].chart.title == (
        f"NeFT, 9%, selects {nefts} of its neurons in ffn_out; a random selection {randoms}, linear probes {probes}"
    )
    selected = panels("neuron-cosine", "")[1].data.groupby("role")["value"].mean().map("{:.0f}%".format)
    assert figures["neuron-cosine"].chart.title == (
        f"NeFT, 9%, selects {selected['ffn_out']} of the neurons of ffn_out and {selected['ffn_in']} of those of ffn_in"
    )
    neurons = figures["neurons"].chart.panels[0]
    counts = neurons.data.groupby("role")["value"].sum()
    assert counts["ffn_out"] > 2 * counts["ffn_in"]
    for panel in figures["neurons"].chart.panels[2:]:
        totals = panel.data.groupby("role")["value"].sum()
        assert totals.max() < 1.1 * totals.min()
    shift, printed = panels("use-shift", "; the paper prints 0.06 and 0.11")
    largest, mixed = shift.data["value"]
    assert (
        f": {largest:.2f} of the ranks for the largest rotation, {mixed:.2f} reversed"
        in figures["use-shift"].chart.title
    )
    assert printed.data["value"].map("{:.2f}".format).tolist() == ["0.06", "0.11"]
    assert shift.data.set_index("recipe")["value"].idxmax() == "NeFT, 9%"
    assert printed.data.set_index("recipe")["value"].idxmin() == "NeFT, 9%"
    (scores,) = panels("against-truth", ": correlations 0.18 to 0.31, of 0.84 possible")
    correlations = rows_of(scores, "kind", "score")["value"]
    assert f"{correlations.min():.2f} to {correlations.max():.2f}" == "0.18 to 0.31"
    (halves,) = rows_of(scores, "kind", "agreement of the two halves")["value"]
    # Spearman and Brown: the reliability of both halves together is 2 r / (1 + r), and its root bounds correlations.
    ceiling = np.sqrt(2 * halves / (1 + halves))
    assert scores.marks[0].x == pytest.approx(ceiling, rel=1e-12)
    assert f"{ceiling:.2f}" == "0.84"
    (agreement,) = panels("agreement", ": with the loss increase at most 0.30")
    increases = agreement.data[agreement.data["first"].str.startswith("loss increase")]
    assert f"{increases.loc[~increases['second'].isin(['1', '2']), 'value'].max():.2f}" == "0.30"
    sizes = panels("overlap-by-size", "")
    ends = sizes[0].data.groupby("recipe")["value"].agg(["min", "max"]).map("{:.2f}".format).agg(" to ".join, axis=1)
    assert figures["overlap-by-size"].chart.title.endswith(
        f": overlap {ends['two seeds or samples']} by size of the selection, at chance {ends['chance']}"
    )
    for overlap in sizes:
        by_size = overlap.data.pivot(index="fraction", columns="recipe", values="value")
        assert (by_size["two seeds or samples"] > 2 * by_size["chance"]).all()
    (replay,) = panels("rank-replay-alora", ": layers 4 and 5 gain 13, layers 0 and 1 lose 6 (seed 100)")
    totals = replay.data.groupby(["step", "place"])["value"].sum().unstack()
    assert set(totals.sum(axis=1)) == {144}
    assert set(np.diff(totals.index)) == {8}  # no decision is missing
    gains = totals.iloc[-1] - 4 * 6  # all six modules of a layer begin with rank 4
    assert (gains[["4", "5"]].sum(), gains[["0", "1"]].sum()) == (13, -6)
    over_steps = panels("rank-replay", " (seed 100)")[0].data
    by_layer = over_steps.groupby(["step", "place"])["value"].sum().unstack()
    assert set(by_layer.loc[0]) == {72}
    *lower, fourth, fifth = by_layer.loc[300].map("{:.0f}".format)
    assert fourth == fifth
    assert figures["rank-replay"].chart.title == (
        f"AdaLoRA's layers 4 and 5 retain {fifth} of 72 ranks each, "
        f"layers 0 to 3 {min(lower)} to {max(lower)} (seed 100)"
    )
    (spectrum,) = panels("spectrum", ": effective rank 3.5 of 8, and 17.3 of 64")
    for recipe, effective in (("LoRA, rank 8", 3.5), ("LoRA, rank 64", 17.3)):
        assert f"{effective} of {recipe.rpartition(' ')[2]}" in spectrum.title
        assert f"{recipe}: {effective} [" in spectrum.caption
        values = rows_of(spectrum, "recipe", recipe)["value"]
        # The effective rank of the mean spectrum is near the mean of effective ranks.
        weights = values / values.sum()
        assert np.exp(-(weights * np.log(weights)).sum()) == pytest.approx(effective, rel=0.1)
    energy = []
    for image in panels("update-image", ""):
        sigma = np.linalg.svd(image.data.pivot(index="row", columns="column", values="value"), compute_uv=False)
        energy.append((sigma[:2] ** 2).sum() / (sigma**2).sum())
    assert energy[0] < 0.2 < 0.99 < energy[1]
    assert (
        f"{100 * energy[1]:.0f}% of this corner of ΔW with LoRA, {100 * energy[0]:.0f}%"
        in figures["update-image"].chart.title
    )
    growth = []
    for panel in panels("update-norm-heat", " with full fine-tuning"):
        (recipe,) = set(panel.data["recipe"])
        of_blocks = rows_of(norms, "recipe", recipe).set_index("place")["value"]
        growth.append(f"{of_blocks['5'] / of_blocks['0']:.1f}")
        # The mean over seeds of a pooled norm is at least the pooled mean, up to rounding of stored numbers.
        squares = (panel.data["value"] ** 2).groupby(panel.data["place"]).sum()
        assert (np.sqrt(squares) <= of_blocks[squares.index] * (1 + 1e-6)).all()
    assert f": {growth[1]} with LoRA, {growth[0]} with full" in figures["update-norm-heat"].chart.title
    for name in ("subspace-seeds", "subspace-similarity"):
        overlap, excess = figures[name].chart.panels
        first = overlap.data["phi"].iloc[0]
        phrase = f"overlap φ(1, 1) = {first:.2f}, random {first - excess.data['excess'].iloc[0]:.2f}"
        assert phrase in figures[name].chart.title
    by_kind = panels("adapter-pairs", "")[0].data.groupby("kind")["cosine"].mean()
    assert figures["adapter-pairs"].chart.title.endswith(
        f"cosine {by_kind['other method, same seed']:.2f}; by one method with two seeds "
        f"{by_kind['same method, other seed']:.2f}, if both differ {by_kind['other method and seed']:.2f}"
    )
    fitted_points, *_ = panels("toy-points", "")
    ends = fitted_points.data[fitted_points.data["epoch"] == fitted_points.data["epoch"].max()].set_index("recipe")[
        "value"
    ]
    fits = (100 * ends).map("{:.0f}%".format)
    assert figures["toy-points"].chart.title.endswith(
        f"fit {fits['FourierFT']} of the points, LoRA {fits['LoRA, lr 0.1']} and {fits['LoRA, lr 0.01']}"
    )
    assert fits["FourierFT"] == fits["random basis"]
    errors, numbers = panels("number-of-clusters", "")
    chosen = numbers.data.sort_values("samples").groupby("algorithm").tail(1).set_index("algorithm")
    elbow, dbscan = chosen.loc["elbow of k-means"], chosen.loc["DBSCAN"]
    assert figures["number-of-clusters"].chart.title.endswith(
        f": {elbow['K']} by k-means in {elbow['samples']} of {dbscan['samples']} samples, {dbscan['K']} by DBSCAN in "
        f"{dbscan['samples']}"
    )
    assert f"only {100 * (1 - errors.data['value'].min()):.0f}% lower at K = 10" in errors.title
    (importance,) = panels("importance", ": tenfold apart from step 49 on")
    medians = importance.data.pivot(index="step", columns="fate", values="value")
    apart = medians["retained"] >= 10 * medians["dropped"]
    assert apart[~apart].index.max() < apart[apart].index.min() == 49
    samples = numbers.data.pivot_table(index="k", columns="algorithm", values="samples", fill_value=0)
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
