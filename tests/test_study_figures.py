"""Figures of the second edition: their numbers equal those of the tables, and words appear where nothing is judged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from made_up_study import around, made_up, registration
from scipy.stats import spearmanr, ttest_1samp

from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.charts.figure_plan import plan_figure
from lorascope.charts.marks import Point, Rule, Text
from lorascope.charts.theme import theme
from lorascope.files.data_folder import DATA
from lorascope.papers import registry
from lorascope.papers.figures import forest as forest_plot
from lorascope.papers.figures.first_edition import stored_figures
from lorascope.papers.figures.forest import EDITION_1, EDITION_2, PRINTED, forest
from lorascope.papers.figures.neuron_hits import SCORES, neuron_hits
from lorascope.papers.figures.neuron_sensitivity import CHANGED, NULL, sensitivity_table, stability_table
from lorascope.papers.figures.pair_gaps import CLOSED, DIFFERENCE, LOSS, gap_table, pair_effects, pair_gaps
from lorascope.papers.figures.pair_losses import loss_table, pair_losses
from lorascope.papers.figures.planted_allocations import planted_allocations
from lorascope.papers.figures.study_marks import BOUND, FAVORABLE, OTHER, POSITIVE, claim_arms
from lorascope.papers.judging import kept_study, registered_study
from lorascope.papers.judging.data_folder import PAPERS
from lorascope.papers.judging.kept_study import FIRST_SEED, STUDY_COLUMNS, StudyEvidence
from lorascope.papers.judging.registered_study import PaperPlace, StudyRegistration
from lorascope.papers.judging.study_results import RESULT_COLUMNS, compute
from lorascope.papers.judging.words import NOT_LEARNED
from lorascope.papers.neft import AT_RANDOM, hit_rate
from lorascope.papers.study_figures import ALL_METHODS, ALLOCATORS, ROWS, StudyData, draw_neuron_scores

# Claims of the forest plot, and two of other forms.
IDS = [f"pair.{method.lower()}" for method in PAPERS]
COMPARISONS = {id: registry.COMPARISONS[id] for id in (*IDS, "pair.basis", "pair.factored", "text.lora")}
REGISTERED = registration(COMPARISONS)
EMPTY = StudyEvidence(pd.DataFrame(columns=list(STUDY_COLUMNS)))
EARLIER = pd.DataFrame(
    [
        ("NeFT", -1.46, -2.19, -0.73, "points of accuracy", "", 1.0, 5),
        ("LISA", -0.032, -0.073, 0.008, "nats", "", 0.02, 5),
        ("AdaLoRA", -0.10, -0.67, 0.46, "points of accuracy", "no headroom", 0.5, 5),
        ("LoRA", -5.0, -6.0, -4.0, "points of accuracy", "", -1.0, 5),
    ],
    columns=["method", "effect", "low", "high", "unit", "word", "bound", "seeds"],
)
NO_ESTIMATE = EARLIER.iloc[:0]


def gray_words(drawable: Drawable) -> list[str]:
    """Return the gray words of a figure."""
    gray: list[str] = []
    for chart in drawable.panels:
        for mark in chart.marks_of(Text):
            gray += list(chart.table(mark)[mark.text]) * mark.muted
    return gray


def dots_of(drawable: Drawable, mark: str) -> pd.DataFrame:
    """Return the rows of all dots of one kind in a forest plot."""
    tables = []
    for chart in drawable.panels:
        for point in chart.marks_of(Point):
            table = chart.table(point)
            tables.append(table[table["mark"] == mark])
    return pd.concat(tables)


def evidence_of(id: str, mean: float) -> Any:
    """Return made-up evidence of one claim: its effects are around a mean, against it and three times as large."""
    comparison, n = COMPARISONS[id], REGISTERED.claims[id].rule.seeds
    means = {"for": mean, "against": -mean, "positive": 3 * mean}
    effects = {
        name: around(means[name], 0.3, 5 if id.startswith("text") and name == "positive" else n, number)
        for number, name in enumerate(comparison.statistics())
    }
    return made_up(REGISTERED, id, comparison, effects)


def results_of(**means: float) -> pd.DataFrame:
    """Return the results of pairs (or ``text_NAME``) with these effects; claims that are not named are not run."""
    tables = []
    for name, mean in means.items():
        id = name.replace("_", ".") if "_" in name else f"pair.{name}"
        tables.append(compute(REGISTERED, {id: COMPARISONS[id]}, evidence_of(id, mean)).results)
    missing = {id: COMPARISONS[id] for id in COMPARISONS if id not in set(pd.concat(tables)["claim"])}
    return pd.concat([*tables, compute(REGISTERED, missing, EMPTY).results], ignore_index=True)


def test_forest_shows_the_numbers_of_the_results() -> None:
    results = results_of(adalora=8.0, lora=-3.0, basis=50.0, text_lora=-0.5)
    figure = forest(results, REGISTERED, EARLIER)
    row = results.set_index("claim").loc["pair.adalora"]
    for mark, prefix in {FAVORABLE: "", OTHER: "against_", POSITIVE: "positive_"}.items():
        dots = dots_of(figure, mark)
        (dot,) = dots[dots["row"].str.startswith("pair.adalora")].to_dict("records")
        expected = [row[f"{prefix}{name}"] for name in ("effect", "low", "high")]
        np.testing.assert_array_equal([dot["effect"], dot["low"], dot["high"]], expected)
    assert row["effect"] == pytest.approx(8.0)
    assert row["against_effect"] == pytest.approx(-8.0)
    # All pairs with runs have rows, each with the truths by name.
    _, truth, bounds_of_pairs = figure.panels
    assert truth.y.ticks == {
        "pair.lora": "LoRA vs full fine-tuning, update of rank 2", "pair.lora, other": "update of rank 24",
        "pair.adalora": "AdaLoRA vs LoRA, uneven ranks", "pair.adalora, other": "update of rank 2",
        "pair.basis": "FourierFT vs random basis, its entries", "pair.basis, other": "other entries",
    }  # fmt: skip
    assert truth.title == forest_plot.TRUTH
    assert bounds_of_pairs.y == truth.y
    texts = bounds_of_pairs.table(bounds_of_pairs.marks_of(Text)[0]).set_index("row")["text"].to_dict()
    assert texts == {"pair.lora": "−2, n = 16", "pair.adalora": "+2, n = 16", "pair.basis": "+2, n = 16"}
    # This edition replaces the estimate of the first one, and a cost has its bound below 0.
    text = results.set_index("claim").loc["text.lora"]
    assert dots_of(figure, EDITION_2)["effect"].tolist() == [text["effect"]]
    assert set(dots_of(figure, EDITION_1)["row"]) == {"NeFT", "LISA"}
    bounds = dots_of(figure, BOUND).set_index("row")["effect"].to_dict()
    assert bounds == {
        "LoRA": -1.0, "LISA": 0.02, "NeFT": 1.0, "pair.lora": -2.0, "pair.adalora": 2.0, "pair.basis": 2.0,
    }  # fmt: skip


def test_title_of_the_forest_counts_the_intervals_above_zero() -> None:
    results = results_of(adalora=8.0, alora=5.0, adapprox=-20.0)
    # Edition 1 has intervals of NeFT, LISA and LoRA on text, none above zero, and a word for AdaLoRA.
    assert forest(results, REGISTERED, EARLIER).title.endswith(" control: on text 0 of 3, at its truth 2 of 3")
    assert forest(results, REGISTERED, NO_ESTIMATE).title.endswith(" control: at its truth 2 of 3")


def test_forest_divides_effects_by_their_bounds() -> None:
    figure = forest(results_of(adalora=8.0), REGISTERED, EARLIER)
    # In nats and in points of accuracy, on one axis: -0.032 / 0.02 and -1.46 / 1.
    positions = dots_of(figure, EDITION_1).set_index("row")["position"]
    assert positions["LISA"] == pytest.approx(-(1 + np.log(1.6)))
    assert positions["NeFT"] == pytest.approx(-(1 + np.log(1.46)))
    assert set(dots_of(figure, BOUND)["position"]) == {-1.0, 1.0}
    (dot,) = dots_of(figure, FAVORABLE)["position"]
    assert dot == pytest.approx(1 + np.log(4))
    # Linear from -1 to 1, and without a step there.
    np.testing.assert_allclose(forest_plot.axis_position(np.array([-0.5, 0.0, 1.0, np.e])), [-0.5, 0.0, 1.0, 2.0])
    ticks = figure.panels[0].x.ticks or {}
    assert {"\N{MINUS SIGN}1", "0", "1", "3", "10"} <= set(ticks.values())
    assert {position: name for position, name in ticks.items() if name == "10"} == {1 + np.log(10): "10"}
    text, truth, _ = figure.panels
    assert truth.x == text.x


def test_forest_has_a_column_of_numbers_with_their_units() -> None:
    figure = forest(results_of(adalora=8.0, adapprox=-20.0), REGISTERED, EARLIER)
    numbers: dict[str, str] = {}
    on_text, truth, _ = figure.panels
    for chart in (on_text, truth):
        for text in chart.marks_of(Text):
            table = chart.table(text)
            numbers |= dict(zip(table["row"], table["number"], strict=True))
    assert numbers["LISA"] == "−0.032 [−0.073, 0.008] nats"
    assert numbers["NeFT"] == "−1.46 [−2.19, −0.73]"
    assert numbers["AdaLoRA"] == "no headroom"
    assert numbers["pair.adalora"].startswith("+8.0 [7.8, ")
    assert set(numbers) == {*(on_text.y.order or ()), *(truth.y.order or ())}
    # No dot is in the column.
    for chart in (on_text, truth):
        columns = chart.table(chart.marks_of(Text)[0])["position"]
        assert chart.data["position_high"].max() < columns.min()


def test_forest_has_words_instead_of_dots() -> None:
    results = results_of(adalora=8.0)
    is_adalora = results["claim"] == "pair.adalora"
    for word in ("no headroom", "not learned"):
        figure = forest(results.assign(word=results["word"].where(~is_adalora, word)), REGISTERED, EARLIER)
        assert dots_of(figure, FAVORABLE).empty
        assert dots_of(figure, POSITIVE).empty
        assert gray_words(figure).count(word) == 1 + (word == "no headroom")  # AdaLoRA on text
        assert set(dots_of(figure, BOUND)["row"]) == {"LoRA", "NeFT", "LISA"}  # on text, by edition 1
        assert figure.panels[1].y.order == figure.panels[2].y.order == ("pair.adalora",)
    assert "AdaLoRA" not in set(dots_of(figure, EDITION_1)["row"])


def test_forest_without_runs_counts_the_pairs_that_wait_and_has_no_panel_of_them() -> None:
    for results in (pd.DataFrame(columns=RESULT_COLUMNS), compute(REGISTERED, COMPARISONS, EMPTY).results):
        figure = forest(results, REGISTERED, EARLIER)
        assert [chart.title for chart in figure.panels] == [f"{forest_plot.TEXT} (5 seeds)"]
        assert " 11 of 11 pairs are not finished: LoRA vs full fine-tuning, " in figure.panels[0].caption
        # Words are below effects.
        assert figure.panels[0].y.order == ("LoRA", "LISA", "NeFT", "AdaLoRA")
        figure.mpl()
        figure.plotly()
    both = forest(results_of(adalora=8.0), REGISTERED, EARLIER)
    assert " 10 of 11 pairs are not finished: " in both.panels[0].caption
    assert "AdaLoRA vs LoRA" not in both.panels[0].caption
    # Without an estimate on text, only the pairs are drawn.
    truth, _ = forest(results_of(adalora=8.0), REGISTERED, NO_ESTIMATE).panels
    assert truth.title.startswith(forest_plot.TRUTH)
    assert "Printed" not in truth.caption
    assert "headroom" not in truth.caption


def test_forest_has_printed_gains_in_the_unit_of_the_estimate_only() -> None:
    claims = dict(REGISTERED.claims)
    for id, value, unit in (("pair.neft", 2.1, "points of accuracy"), ("pair.adalora", 9.0, "BLEU")):
        claims[id] = msgspec.structs.replace(claims[id], paper=PaperPlace("1", "table 1", value, unit))
    figure = forest(results_of(adalora=8.0), replace(REGISTERED, claims=claims), EARLIER)
    assert dots_of(figure, PRINTED)[["row", "effect"]].to_numpy().tolist() == [["NeFT", 2.1]]
    assert "Printed gains are from other models and tasks." in figure.panels[0].caption
    # Gains of other models are on an axis of their own, which has its unit.
    on_text, printed, *_ = figure.panels
    assert printed.title == "Printed"
    assert printed.y == on_text.y
    assert printed.x.label == "gain (points)"
    (point,) = printed.marks_of(Point)
    assert point.x == "effect"
    assert (point.symbol, point.hollow, point.low) == ("diamond", True, None)


def test_stacked_panels_of_the_forest_keep_the_names_of_their_rows() -> None:
    """On a narrow screen as well, all panels have their ground and the names of their rows."""
    figure = forest(results_of(adalora=8.0, lisa=1.0, adapprox=-20.0), REGISTERED, EARLIER)
    layout = plotly_backend.narrow_layout(plan_figure(figure, theme("light")))
    for axis, chart in zip((layout["yaxis"], layout["yaxis2"], layout["yaxis3"]), figure.panels, strict=True):
        names = (chart.y.ticks or {}).values()
        assert [text[-4:] for text in axis["ticktext"]] == [name[-4:] for name in names]  # long ones are elided
        assert axis.get("showticklabels", True)


def test_pairs_have_a_dot_per_seed() -> None:
    id = "pair.adalora"
    evidence = evidence_of(id, 8.0)
    claim = REGISTERED.claims[id]
    table = gap_table(claim, evidence)
    for arm in claim_arms(claim):
        of_arm = table[table["arm"] == arm.arm]
        assert of_arm["seed"].tolist() == list(range(FIRST_SEED, FIRST_SEED + 16))
        expected = [evidence.closed(arm.arm, seed) for seed in of_arm["seed"]]
        np.testing.assert_array_equal(of_arm["value"], expected)
        assert set(of_arm["side"]) == {FAVORABLE if arm.truth == "uneven ranks" else OTHER}
    results = results_of(adalora=8.0)
    figure = pair_gaps(replace(REGISTERED, claims={id: claim}), evidence, results)
    panel, effects = figure.panels
    assert panel.title == "AdaLoRA vs LoRA"
    # Compared arms are next to each other, at one truth after the other.
    assert list((panel.y.ticks or {}).values()) == [
        "uneven ranks: AdaLoRA", "uneven ranks: LoRA, rank 2", "uneven ranks: LoRA, planted ranks",
        "update of rank 2: AdaLoRA", "update of rank 2: LoRA, rank 2",
    ]  # fmt: skip
    # The positive control has the name of its method.
    assert list((effects.y.ticks or {}).values()) == [
        "uneven ranks", "update of rank 2", "LoRA, planted ranks", "first minus second row",
    ]  # fmt: skip
    nothing = pd.DataFrame(columns=["word"])  # as in a small version
    assert len(pair_gaps(replace(REGISTERED, claims={id: claim}), evidence, nothing).panels) == 1
    judged = results.set_index("claim").loc[id]
    numbers = effects.data.set_index("side")[["effect", "low", "high"]]
    assert numbers.loc[FAVORABLE].tolist() == judged[["effect", "low", "high"]].tolist()
    assert numbers.loc[OTHER].tolist() == judged[["against_effect", "against_low", "against_high"]].tolist()
    between = judged[["difference_effect", "difference_low", "difference_high"]]
    assert numbers.loc[DIFFERENCE].tolist() == between.tolist()
    assert effects.title == "Difference from the control\n16 seeds: as claimed"
    # A gain may be smaller than the bound, as long as its interval reaches it.
    assert "an interval above 0 that is not all below the bound (of a cost, " in panel.caption
    assert not gray_words(effects)
    pd.testing.assert_frame_equal(panel.data[table.columns], table)
    assert not gray_words(panel)
    assert panel.x.label == CLOSED


def test_effects_of_pairs_have_a_panel_per_pair() -> None:
    results = results_of(adalora=8.0, adapprox=-20.0, basis=50.0)
    claims = registered_study.read(DATA / "registered-2.toml").claims
    judged = {id: claims[id] for id in ("pair.adalora", "pair.basis", "pair.adapprox")}
    figure = pair_effects(replace(REGISTERED, claims=judged), results)
    assert [chart.x.label for chart in figure.panels] == ["points of the gap"] * 2 + ["change of the loss (%)"]
    for position, text in figure.panels[-1].x.ticks.items():
        assert 100 * np.expm1(-position / 100) == pytest.approx(float(text.replace("−", "-")), abs=1e-9)
    expected = results.set_index("claim")["effect"]
    for id, chart in zip(judged, figure.panels, strict=True):
        assert chart.data.set_index("side").loc[FAVORABLE, "effect"] == expected[id]
        assert chart.y == figure.panels[0].y  # so that the names are written once
        low, high = chart.x.limits or (0, 0)
        assert low < min(chart.data["low"]) < max(chart.data["high"]) < high
    assert "A pair without a positive control has none." in figure.panels[0].caption
    assert "are known; 16 to 40 seeds. " in figure.panels[0].caption
    assert " 8 of 11 pairs are not finished." in figure.panels[0].caption
    below = results.assign(effect=results["effect"].mask(results["claim"] == "pair.adalora", 1.9))
    titles = [chart.title for chart in pair_effects(replace(REGISTERED, claims=judged), below).panels]
    assert titles[0] == "AdaLoRA vs LoRA\nuneven ranks: as claimed, mean below the bound"
    assert not any("mean below" in chart.title for chart in figure.panels)
    assert "The positive control of Adapprox vs AdamW is a known worse method." in figure.panels[0].caption
    figure.mpl()


def test_titles_of_pairs_have_the_effects_of_the_results() -> None:
    results = results_of(adalora=8.0, hydralora=8.0, adapprox=-20.0, factored=20.0)

    claims = registered_study.read(DATA / "registered-2.toml").claims

    def named(*names: str) -> StudyRegistration:
        return replace(REGISTERED, claims={f"pair.{name}": claims[f"pair.{name}"] for name in names})

    def title_of(*names: str, shown: pd.DataFrame = results) -> str:
        return pair_gaps(named(*names), EMPTY, shown).title

    def changed(name: str, **values: float) -> pd.DataFrame:
        return results.assign(**{column: results[column].mask(results["claim"] == f"pair.{name}", value)
                                 for column, value in values.items()})  # fmt: skip

    shown = changed("adalora", effect=8.04, low=7.26, high=8.81, against_effect=-2.7)
    assert title_of("adalora", shown=shown) == (
        "Where the truth favors AdaLoRA: +8.0 [7.3, 8.8] points against LoRA (otherwise −2.7)"
    )
    # exp(0.2) is 1.221, exp(0.1) 1.105, exp(0.3) 1.350, exp(-0.6) 0.549.
    shown = changed("adapprox", effect=-20.0, low=-30.0, high=-10.0, against_effect=60.0)
    assert title_of("adapprox", shown=shown) == (
        "Where the truth favors Adapprox, on a quadratic: loss +22.1% [11, 35] against AdamW (otherwise −45.1%)"
    )
    idle = results.assign(word=results["word"].mask(results["claim"] == "pair.adalora", NOT_LEARNED))
    assert title_of("adalora", shown=idle) == f"Where the truth favors AdaLoRA: {NOT_LEARNED} against LoRA"
    assert title_of("fourierft", "basis") == (
        "Where the truth favors FourierFT: not finished against LoRA, rank 2; not finished against random basis"
    )
    assert title_of("adalora", "adapprox") == "2 pairs of planted truths: 1 as claimed, 1 failed even where favored"
    figure = pair_effects(named("hydralora", "adapprox", "factored"), results)
    assert figure.title == "3 pairs of planted truths: 2 as claimed, 1 failed even where favored"
    assert "Adapprox vs AdamW and Adapprox vs Adafactor: a quadratic with planted" in figure.panels[0].caption
    only = pair_gaps(named("adapprox", "factored"), EMPTY, results).panels[0].caption
    assert only.startswith("Quadratics without a network")
    assert "decoders" not in only
    assert "quadratic" not in pair_effects(named("hydralora"), results).panels[0].caption


def test_title_of_all_pairs_counts_the_words_of_the_kept_results() -> None:
    results = pd.read_csv(DATA / "evidence-2" / "results.csv", keep_default_na=False, na_values=[""])
    results = results.assign(word=results["word"].fillna(""), pair=results["pair"].fillna(""))
    title = pair_effects(registered_study.read(DATA / "registered-2.toml"), results).title
    finished = results[results["claim"].str.startswith("pair.") & (results["n"] > 0)]
    phrases = {"not even there": "failed even where favored", "gain below m": "gain below the bound",
               "cost below d": "cost below the bound"}  # fmt: skip
    for word, number in finished["pair"].value_counts().items():
        assert f"{number} {phrases.get(word, word)}" in title


def test_pair_that_is_not_finished_says_how_many_seeds_are() -> None:
    """The gaps of two seeds are drawn, and the effect is not judged."""
    evidence = evidence_of("pair.adalora", 8.0)
    runs = evidence.runs[evidence.runs["seed"] < FIRST_SEED + 2]
    unjudged = compute(REGISTERED, COMPARISONS, EMPTY).results
    claims = {"pair.adalora": REGISTERED.claims["pair.adalora"]}
    _, effects = pair_gaps(replace(REGISTERED, claims=claims), replace(evidence, runs=runs), unjudged).panels
    assert gray_words(effects) == ["2 of 16 seeds: not finished"]


def test_pairs_on_the_quadratic_show_the_loss() -> None:
    evidence = evidence_of("pair.adapprox", -20.0)
    table = gap_table(REGISTERED.claims["pair.adapprox"], evidence)
    assert set(table["unit"]) == {LOSS}
    first = table.iloc[0]
    assert first["value"] == pytest.approx(100 * evidence.final_loss(first["arm"], FIRST_SEED) / 9)


def test_pairs_without_runs_say_so() -> None:
    figure = pair_gaps(REGISTERED, EMPTY, compute(REGISTERED, COMPARISONS, EMPTY).results)
    names = []
    for id in filter(lambda id: "pair" in id, COMPARISONS):
        favorable = {arm.method for arm in claim_arms(REGISTERED.claims[id]) if arm.side == FAVORABLE}
        names.append(len(favorable))
    assert gray_words(figure) == ["not run"] * (sum(names) + len(names))
    figure.mpl()


def made_up_losses(arms: dict[str, float]) -> StudyEvidence:
    """Return evidence of arms with two seeds whose losses are 1 above and below a value, for 20 steps."""
    runs, losses = [], []
    for arm, value in arms.items():
        for seed, sign in ((200, -1), (201, 1)):
            run = f"{arm} {seed}"
            runs.append({"run": run, "arm": arm, "seed": seed, "role": "judged", "phase": "", "task": ""})
            steps = np.arange(1, 21)
            loss = (value + sign + 0.5 * (steps > 10)).astype(np.float16)
            losses.append(
                pd.DataFrame({"arm": arm, "seed": seed, "run": run, "phase": "", "step": steps, "loss": loss})
            )
    return StudyEvidence(pd.DataFrame(runs).reindex(columns=list(STUDY_COLUMNS)), {"losses": pd.concat(losses)})


def test_losses_are_compared_with_the_control_of_their_seed() -> None:
    claim = REGISTERED.claims["pair.adalora"]
    method, control = claim.for_arms
    # Seeds 200 and 201 have losses of 2 and 4, and those of the control 4 and 6; from step 11 on, 0.5 above.
    evidence = made_up_losses({method: 3.0, control: 5.0})
    table = loss_table(claim, evidence)
    assert table["step"].tolist() == [5.0, 15.0]
    expected = [100 * ((2 / 4 + 4 / 6) / 2 - 1), 100 * ((2.5 / 4.5 + 4.5 / 6.5) / 2 - 1)]
    np.testing.assert_allclose(table["value"], expected, rtol=1e-12)
    assert set(table["side"]) == {FAVORABLE}
    assert set(table["n"]) == {2}
    # A seed that the control lacks is left out.
    losses = evidence.tables["losses"]
    fewer = replace(evidence, tables={"losses": losses[(losses["arm"] == method) | (losses["seed"] == 201)]})
    np.testing.assert_allclose(loss_table(claim, fewer)["value"], [100 * (4 / 6 - 1), 100 * (4.5 / 6.5 - 1)])
    figure = pair_losses(REGISTERED, evidence)
    assert gray_words(figure) == ["not run"] * (len(figure.panels) - 1)
    titles = [chart.title for chart in figure.panels]
    assert len(titles) == len(set(titles))
    # With two seeds, there is no interval that could be below zero.
    assert f"AdaLoRA vs LoRA\n2 of 16 seeds: −{-expected[1]:.1f}%" in titles
    assert figure.title.endswith(": lower at the end in 0 of 1 pairs")
    (drawn_panel,) = [chart for chart in figure.panels if len(chart.data)]
    assert drawn_panel.y.label == "difference (%)"
    low, high = drawn_panel.y.limits
    assert low < drawn_panel.data["value"].min() < 0 < high  # panels with one label keep their own limits
    # One arm of the other truth has one seed, and the other arms have two.
    other = made_up_losses(dict.fromkeys(claim.against_arms, 3.0)).tables["losses"]
    partial = pd.concat([losses, other[(other["arm"] != claim.against_arms[0]) | (other["seed"] == 200)]])
    runs = partial[["run", "arm", "seed", "phase"]].drop_duplicates().assign(role="judged", task="")
    evidence = StudyEvidence(runs.reindex(columns=list(STUDY_COLUMNS)), {"losses": partial})
    titles = [chart.title for chart in pair_losses(REGISTERED, evidence).panels]
    assert f"AdaLoRA vs LoRA\n1 of 16 seeds: −{-expected[1]:.1f}%" in titles
    # Pairs that claim a small cost have a worse method as control, in which there is nothing to gain.
    caption = figure.panels[0].caption
    assert "LoRA, rank 1 (LoRA vs full fine-tuning) and Adafactor (" in caption
    pair_losses(REGISTERED, EMPTY).mpl()


def test_title_of_losses_counts_the_pairs_that_end_below_their_controls() -> None:
    registered, evidence = registered_study.read(DATA / "registered-2.toml"), kept_study.read(DATA / "evidence-2")
    claims = {id: registered.claims[id] for id in ("pair.lisa", "pair.fourierft", "pair.basis")}
    lower, means = [], {}
    for claim in claims.values():
        # The mean of the last ten steps: each run has 400.
        last, runs = {}, evidence.runs.query("role == 'judged'")
        for arm in claim.for_arms:
            losses = evidence.tables["losses"].query("step > 390 and phase == ''")
            losses = losses[losses["run"].isin(runs.loc[runs["arm"] == arm, "run"])]
            last[arm] = losses.astype({"loss": "float64"}).groupby("seed")["loss"].mean()
        method, control = claim.for_arms
        test = ttest_1samp(last[method] / last[control] - 1, 0)
        lower.append(test.confidence_interval().high < 0)
        means[claim.id] = 100 * (last[method] / last[control] - 1).mean()
    figure = pair_losses(replace(registered, claims=claims), evidence)
    assert figure.title.endswith(
        f": lower at the end in {sum(lower)} of 3 pairs, from −{-means['pair.basis']:.1f}% (FourierFT vs random basis) "
        f"to +{means['pair.lisa']:.1f}% (LISA vs LoRA)"
    )
    # The smallest difference is first.
    names = {
        "pair.basis": "FourierFT vs random basis",
        "pair.fourierft": "FourierFT vs LoRA",
        "pair.lisa": "LISA vs LoRA",
    }
    assert sorted(means, key=means.__getitem__) == list(names)
    for chart, name in zip(figure.panels, names.values(), strict=True):
        assert chart.title.startswith(name)
    assert lower == [False, True, True]


def test_losses_of_alora_have_lines_at_its_first_and_last_round() -> None:
    claim = REGISTERED.claims["pair.alora"]
    method, control = claim.for_arms
    evidence = made_up_losses({method: 3.0, control: 5.0})
    scores = pd.DataFrame({"arm": [method] * 3 + ["AdaLoRA"], "step": [30, 10, 20, 90]})
    evidence = replace(evidence, tables=evidence.tables | {"scores": scores})
    registration = replace(REGISTERED, claims={"pair.alora": claim})
    (panel,) = pair_losses(registration, evidence).panels
    assert [rule.x for rule in panel.marks_of(Rule)] == [None, 10, 30]
    assert "rounds are between the vertical lines" in panel.caption
    assert "worse" not in panel.caption


def test_losses_of_three_seeds_have_t_intervals() -> None:
    claim = REGISTERED.claims["pair.adalora"]
    losses = []
    for arm, values in zip(claim.for_arms, ((2.0, 3.0, 4.0), (4.0, 4.0, 4.0)), strict=True):
        for seed, loss in enumerate(values):
            losses.append((arm, f"{arm} {seed}", seed, "", 1, loss))
    table = pd.DataFrame(losses, columns=["arm", "run", "seed", "phase", "step", "loss"])
    runs = table[["run", "arm", "seed", "phase"]].assign(role="judged", task="").reindex(columns=list(STUDY_COLUMNS))
    (cell,) = loss_table(claim, StudyEvidence(runs, {"losses": table})).to_dict("records")
    half = 4.302653 * 25 / np.sqrt(3)  # t of two degrees of freedom; -50, -25 and 0 percent
    np.testing.assert_allclose([cell["value"], cell["low"], cell["high"]], [-25, -25 - half, -25 + half], rtol=1e-6)


def test_neurons_have_the_hit_rates_of_the_kept_table() -> None:
    changed = np.arange(40) < 4
    scores = {column: np.where(changed, 1.0, 0.0) for column in SCORES}
    scores["sensitivity"] = np.where(changed, 0.0, 1.0)
    scores["rotation"] = np.where(np.arange(40) % 2 == 0, 1.0, 0.0) + 0.5 * changed
    table = pd.concat([pd.DataFrame({"seed": seed, "changed": changed, **scores}) for seed in (200, 201)])
    chart = neuron_hits(table, hit_rate, AT_RANDOM.value)
    rates = chart.data.groupby("score")["value"].agg(["min", "max", "size"])
    assert list(rates.loc[SCORES["displacement"]]) == [100, 100, 2]
    assert list(rates.loc[SCORES["rotation"]]) == [50, 50, 2]
    assert list(rates.loc[SCORES["sensitivity"]]) == [0, 0, 2]
    assert not gray_words(chart)
    empty = neuron_hits(pd.DataFrame(), hit_rate, AT_RANDOM.value)
    assert gray_words(empty) == ["not run"] * len(SCORES)
    empty.mpl()


RANKS = pd.DataFrame({
    "arm": "a", "run": ["1", "1", "1", "2", "2"], "module": list("uvwuw"), "planted": [0, 0, 4, 0, 4],
    "rank": [0, 2, 4, 3, 2],
})  # fmt: skip


def test_allocations_average_modules_then_seeds() -> None:
    first, last = (RANKS.assign(step=step, component=0) for step in (10, 20))
    # The last scores order the components of run 1 as u, v, w, and those of run 2 as w, u.
    scores = pd.concat([first.assign(score=1.0), last.assign(score=[-3.0, -2.0, 5e9, 2.0, 1.0])])
    scores = scores.drop(columns=["planted", "rank"])
    figure = planted_allocations(RANKS, scores, {"AdaLoRA": "a", "ALoRA": "b"}, 2)
    values = [chart.data.set_index("planted")["value"].to_dict() for chart in figure.panels]
    assert values[0] == {0: 2.0, 4: 3.0}
    equal = (100 * (2 / 3 + 3 / 4) / 2, 100 * (2 / 3 + 3 / 4) / 2)  # mean ranks of three and of two equal scores
    assert values[1] == pytest.approx(dict(zip((0, 4), equal, strict=True)))
    assert values[2] == pytest.approx({0: 100 * (1 / 2 + 1) / 2, 4: 100 * (1 + 1 / 2) / 2})
    assert figure.panels[0].caption.endswith("Not finished: ALoRA.")
    assert figure.title == "Modules of planted rank 4 end 1.0 ranks above those of 0 in AdaLoRA (truth: 4)"
    assert "then over 2 seeds; bands" in figure.panels[0].caption
    figure.mpl()
    # An arm with fewer seeds than another one is still trained.
    partial = pd.concat([RANKS, RANKS[RANKS["run"] == "1"].assign(arm="b", run="3")])
    (of_ranks, *_) = planted_allocations(partial, scores, {"AdaLoRA": "a", "ALoRA": "b"}, 2).panels
    assert set(of_ranks.data["recipe"]) == {"AdaLoRA"}
    assert of_ranks.caption.endswith("Not finished: ALoRA.")
    # Scores of one step, as AutoLoRA has them, are the last ones.
    once = planted_allocations(RANKS, scores[scores["step"] == 20], {"AdaLoRA": "a"}, 2).panels
    assert len(once[1].data) == 0
    assert len(once[2].data) == 2


def neuron_table(seeds: int, size: int = 40) -> pd.DataFrame:
    """Return a kept table ``neurons`` with one module in each of two blocks; scores are stable in block 0."""
    rng = np.random.default_rng(0)
    names = [f"model.layers.{block}.mlp.up_proj" for block in (0, 1)]
    stable, tables = rng.normal(size=size), []
    for seed in range(200, 200 + seeds):
        for block, name in enumerate(names):
            logs = stable if block == 0 else rng.normal(size=size)
            changed = np.isin(np.arange(size), rng.choice(size, 16, replace=False))
            table = pd.DataFrame({"seed": seed, "module": name, "neuron": range(size), "changed": changed})
            tables.append(table.assign(sensitivity=10 ** (logs - block + 3 * changed)))
    neurons = pd.concat(tables, ignore_index=True)
    return neurons.assign(**dict.fromkeys(["rotation", "displacement", "sensitivity_end"], neurons["sensitivity"]))


def test_null_of_sensitivity_has_the_range_of_permuted_neurons() -> None:
    neurons = neuron_table(seeds=3)
    table = sensitivity_table(neurons, "sensitivity").set_index(["neurons", "block"])
    logs, rng = np.log10(neurons["sensitivity"]), np.random.default_rng(1)
    block = neurons["module"].str.contains("layers.1").astype(int)
    for number in (0, 1):
        of_block = [logs[(block == number) & (neurons["seed"] == seed)].to_numpy() for seed in (200, 201, 202)]
        draws = [np.mean([rng.permutation(values)[:16].mean() for values in of_block]) for _ in range(4000)]
        low, high = np.quantile(draws, [0.025, 0.975])
        row = np.log10(table.loc[(NULL, number), ["low", "high"]].astype(float))
        np.testing.assert_allclose(row, [low, high], atol=0.06 * (high - low))
        by_seed = [
            logs[(block == number) & (neurons["seed"] == seed) & neurons["changed"]].mean() for seed in (200, 201, 202)
        ]
        changed = np.log10(table.loc[(CHANGED, number), ["value", "low", "high"]].astype(float))
        np.testing.assert_allclose(changed, [np.mean(by_seed), min(by_seed), max(by_seed)])


def test_stability_is_the_mean_rank_correlation_within_modules() -> None:
    neurons = neuron_table(seeds=3).assign(changed=False)
    expected = []
    for first, second in ((200, 201), (200, 202), (201, 202)):
        of_pair = []
        for _, rows in neurons.groupby("module"):
            one, other = (rows.loc[rows["seed"] == seed, "sensitivity"].to_numpy() for seed in (first, second))
            of_pair.append(spearmanr(one, other).statistic)
        expected.append(np.mean(of_pair))
    row = stability_table(neurons).set_index("score").loc[SCORES["sensitivity"]]
    np.testing.assert_allclose(row.to_numpy(float), [np.mean(expected), min(expected), max(expected)])


def test_neurons_of_one_seed_have_no_stability() -> None:
    neurons = neuron_table(seeds=2).assign(selected=False)
    for seeds, words in ((1, ["one seed"]), (2, [])):
        figure = draw_neuron_scores(neurons[neurons["seed"] < 200 + seeds])
        assert gray_words(figure) == words
        figure.mpl()


def test_title_of_neurons_has_the_mean_hit_rates() -> None:
    neurons = neuron_table(seeds=2).assign(selected=False)
    rates = []
    for column in ("rotation", "sensitivity"):
        rates.append(np.mean([hit_rate(rows, column) for _, rows in neurons.groupby("seed")]))
    title = f"Rotation finds {rates[0]:.0f}% of the changed neurons, sensitivity {rates[1]:.0f}%"
    assert draw_neuron_scores(neurons).title == title


def test_panels_with_columns_leave_places_empty() -> None:
    chart = Chart(pd.DataFrame({"x": [1.0], "y": [1.0]}), [Point("x", "y", symbol="circle-open", label="open")])
    axes = Panels(((chart, chart), (chart,)), columns=2).mpl().axes
    assert axes[2].get_position().width == pytest.approx(axes[0].get_position().width, rel=0.01)
    (dots,) = axes[0].collections
    assert dots.get_facecolor().tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_rows_have_distinct_names_and_headings_of_pages() -> None:
    names = [row.name for row in ROWS]
    stored = stored_figures(DATA / "edition-1" / "figures")
    assert len({*names, *stored}) == len(names) + len(stored)
    headings = {row.heading for row in ROWS} | {figure.heading for figure in stored.values()}
    assert headings <= {*PAPERS, ALL_METHODS, ALLOCATORS, "Importance scores"}


def test_figures_are_drawn_once_they_have_runs() -> None:
    def drawn(evidence: StudyEvidence, earlier: pd.DataFrame) -> set[str]:
        results = compute(REGISTERED, COMPARISONS, EMPTY).results
        data = StudyData(REGISTERED, evidence, results, earlier)
        return {row.name for row in ROWS if row.draw(data) is not None}

    assert drawn(EMPTY, NO_ESTIMATE) == set()
    assert drawn(EMPTY, EARLIER) == {"forest"}
    # The made-up claims are of one paper.
    names = {"pairs", "losses", "pairs-adalora"}
    claim = REGISTERED.claims["pair.adalora"]
    favorable = dict.fromkeys(claim.for_arms, 3.0)
    assert drawn(made_up_losses(favorable), NO_ESTIMATE) == set()  # without the other truth, there is no pair
    assert drawn(made_up_losses(favorable | dict.fromkeys(claim.against_arms, 3.0)), NO_ESTIMATE) == names
    neurons = replace(EMPTY, tables={"neurons": neuron_table(seeds=2).assign(selected=False)})
    assert drawn(neurons, NO_ESTIMATE) == {"neuron-scores"}
    ranks = RANKS.replace({"arm": {"a": "AdaLoRA, rank 4 to 2, uneven ranks"}})
    tables = {"ranks": ranks, "scores": ranks.assign(step=1, component=0, score=1.0)[[
        "arm", "run", "module", "step", "component", "score"
    ]]}  # fmt: skip
    assert drawn(replace(EMPTY, tables=tables), NO_ESTIMATE) == {"allocations"}
    other = {name: table.assign(arm="ALoRA, rank 1, uneven ranks") for name, table in tables.items()}
    assert drawn(replace(EMPTY, tables=other), NO_ESTIMATE) == set()
