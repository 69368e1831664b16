"""Figures as data: hand-computed numbers from planted tables, without rendering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import MODULES, lookup, low_rank, profile
from scipy import stats
from tolerance import TINY, near

import lorascope as ls
from lorascope import plots
from lorascope.runs.run import Run
from lorascope.schema.records import QUANTITIES


def kinds(chart: Any) -> list[str]:
    return [type(mark).__name__ for mark in chart.marks]


def test_update_norm_pools_layers_and_bands_seeds(write: Any) -> None:
    words = [1.0, 2.0, 6.0]
    runs = [write(f"s{seed}", profile(word, 3, 4), seed=seed) for seed, word in enumerate(words)]
    chart = plots.update_norm(runs)
    assert lookup(chart, "place") == {"embed": 3.0, "0": 5.0, "1": 2.5}
    low, high = stats.t.interval(0.95, 2, np.mean(words), stats.sem(words))
    assert lookup(chart, "place", value="low")["embed"] == pytest.approx(low)
    assert lookup(chart, "place", value="high")["embed"] == pytest.approx(high)
    assert chart.x.order == ("embed", "0", "1")
    assert kinds(chart) == ["Band", "Line", "Point"]
    assert chart.meta == {"figure": "update_norm", "runs": ["s0", "s1", "s2"]}
    assert QUANTITIES["update_norm"].definition in chart.caption
    assert "3 seeds (0, 1, 2)" in chart.caption
    assert "95% t-interval" in chart.caption


def test_update_norm_of_one_run_has_no_band(write: Any) -> None:
    chart = plots.update_norm(write("a", profile(1, 3, 4), seed=7))
    assert kinds(chart) == ["Line", "Point"]
    assert "1 run (seed 7)" in chart.caption
    assert "t-interval" not in chart.caption


def test_update_norm_line_has_a_gap_where_a_recipe_has_no_record(write: Any) -> None:
    full = write("a", profile(1, 3, 4), "full")
    lora = write("b", {("update_norm", "words"): {9: 2.0}, ("update_norm", "h.1.q"): {9: 1.0}})
    chart = plots.update_norm({"full": full, "lora": lora})
    values = lookup(chart, "recipe", "place")
    assert np.isnan(values["lora", "0"])
    assert (values["lora", "embed"], values["lora", "1"], values["full", "0"]) == (2.0, 1.0, 5.0)
    assert lookup(chart, "recipe", "place", value="n")["lora", "0"] == 0


def test_update_norm_draws_recipes_and_control_as_lines_of_one_panel(write: Any) -> None:
    lora = [write(f"l{seed}", profile(1, 3, 4), seed=seed) for seed in (0, 1)]
    full = write("f", profile(2, 3, 4), "full")
    chart = plots.update_norm([*lora, full], control=write("c", profile(3, 3, 4), "AdaLoRA"))
    assert lookup(chart, "recipe", "place") == {
        (recipe, place): value
        for recipe, embed in {"LoRA rank 2": 1.0, "full": 2.0, "control: AdaLoRA": 3.0}.items()
        for place, value in {"embed": embed, "0": 5.0, "1": 2.5}.items()
    }
    assert chart.colors == ("LoRA rank 2", "full", "control: AdaLoRA")
    assert set(chart.data.loc[chart.data["kind"] == "control", "recipe"]) == {"control: AdaLoRA"}
    assert next(mark for mark in chart.marks if type(mark).__name__ == "Line").dash == "kind"
    assert "LoRA rank 2: 2 seeds (0, 1); full: 1 run (seed 0)" in chart.caption


def test_update_norm_compares_recipes_by_learned_norm_if_all_recorded_it(write: Any) -> None:
    def run(id: str, label: str, learned: float) -> Run:
        values = profile(1, 3, 4) | {("learned_norm", "h.1.q"): {9: learned}}
        return write(id, values, label)

    fourier, lora = run("a", "FourierFT", 0.5), run("b", "LoRA", 0.25)
    chart = plots.update_norm([fourier, lora])
    assert lookup(chart, "recipe") == {"FourierFT": 0.5, "LoRA": 0.25}
    assert QUANTITIES["learned_norm"].definition in chart.caption
    assert lookup(plots.update_norm(fourier), "place")["0"] == 5.0
    without = write("c", profile(1, 3, 4), "folder")
    assert QUANTITIES["update_norm"].definition in plots.update_norm([fourier, without]).caption


def test_update_norm_heat_splits_blocks_by_role_and_omits_the_whole_block(write: Any) -> None:
    values = profile(1, 3, 4) | {("update_norm", "h.0"): {9: 100.0}}
    chart = plots.update_norm_heat(write("a", values))
    assert lookup(chart, "place", "role") == {("0", "q"): 3, ("0", "ffn_in"): 4, ("1", "q"): 1.5, ("1", "ffn_in"): 2}
    assert (chart.x.order, chart.y.order) == (("0", "1"), ("q", "ffn_in"))
    assert chart.marks[0].limits == (0.0, None)


@pytest.mark.parametrize(("top", "text"), [(4.0, ".2f"), (40.0, ".1f"), (4000.0, ".0f"), (0.04, ".4f"), (0.0, None)])
def test_update_norm_heat_prints_three_digits_of_the_largest_cell(write: Any, top: float, text: str | None) -> None:
    chart = plots.update_norm_heat(write("a", {("update_norm", "h.0.q"): {9: top}}))
    assert chart.marks[0].text == text


def test_update_norm_heat_of_several_recipes_shares_one_scale_and_states_the_widest_interval(write: Any) -> None:
    small = [write(f"s{seed}", profile(1, q, 4), seed=seed) for seed, q in enumerate((2.0, 3.0, 4.0))]
    panels = plots.update_norm_heat([*small, write("b", profile(1, 3, 40), "big")])
    first, second = panels.rows()[0]
    assert first.marks[0].limits == second.marks[0].limits == (0.0, None)
    half = stats.t.ppf(0.975, 2) / np.sqrt(3) / 3
    assert f"±{half:.0%}" in first.caption
    assert "Hatched" not in first.caption


def test_update_norm_heat_says_what_hatched_cells_are(write: Any) -> None:
    every = profile(1, 3, 4)
    only_q = {key: values for key, values in every.items() if key[1].endswith(".q")}
    panels = plots.update_norm_heat([write("a", every, "full"), write("b", only_q, "LoRA")])
    assert "Hatched: no update recorded." in panels.panels[0].caption


def test_norm_over_steps_has_one_frame_per_step(write: Any) -> None:
    chart = plots.norm_over_steps(write("a", profile(1, 3, 4)))
    assert chart.frame == "step"
    grown = lookup(chart, "step", "place")
    # All norms are zero at step 0.
    assert {step: norm for (step, place), norm in grown.items() if place == "0"} == {4: 2.5, 9: 5.0}
    ends = chart.marks[0]
    assert ends.hollow
    assert dict(zip(ends.data["place"], ends.data["value"], strict=True))["0"] == 5.0
    assert len(plots.norm_over_steps(write("b", profile(1, 3, 4)), frames=1).data["step"].unique()) == 1
    zero = write("c", {("update_norm", "h.0.q"): {0: 0.0, 9: 0.0}})
    assert list(plots.norm_over_steps(zero).data["step"].unique()) == [0, 9]


def test_mean_norm_has_one_panel_per_reading(write: Any) -> None:
    values = {
        ("weight_norm", "words"): {0: 99.0, 1: 5.0, 2: 10.0},
        ("update_norm", "words"): {0: 0.0, 1: 1.0, 2: 2.0},
        ("adapter_norm", "words"): {0: 50.0, 1: 51.0, 2: 53.0},
    }
    full = {key: steps for key, steps in values.items() if key[0] != "adapter_norm"}
    panels = plots.mean_norm([write("a", values), write("b", full, "full")])
    assert [chart.title for chart in panels.panels] == [
        "Whole weight, change", "Update: 0% at step 0", "Adapter: 96% at step 0",
    ]  # fmt: skip
    assert panels.panels[0].y.label == "change of ‖W‖ (%)"
    ends = [chart.marks[0] for chart in panels.panels]
    assert all(mark.hollow for mark in ends)
    assert [set(mark.data["value"]) for mark in ends] == [{0.0}, {0.0}, {50.0}]
    means = pd.concat([chart.data for chart in panels.panels]).set_index(["metric", "recipe"])["value"]
    percent = pytest.approx(100 * (7.5 / 99 - 1))
    assert means.to_dict() == {
        ("weight_norm", "LoRA rank 2"): percent,
        ("weight_norm", "full"): percent,
        ("update_norm", "LoRA rank 2"): 1.5,
        ("update_norm", "full"): 1.5,
        ("adapter_norm", "LoRA rank 2"): 52.0,
    }
    assert all(chart.y.limits is None for chart in panels.panels)
    assert [len(row) for row in plots.mean_norm(write("c", full, "full")).rows()] == [2]
    sized = [place | {"out_features": 4, "in_features": 25} for place in MODULES]
    (row,) = plots.mean_norm(write("d", values, modules=sized), per_weight=True).rows()
    assert [lookup(chart, "place")["embed"] for chart in row] == [percent, pytest.approx(0.15)]
    assert [chart.y.label for chart in row] == ["change of ‖W‖ (%)", "‖W − W₀‖ / √n"]
    late = {key: {1: 5.0, 2: 10.0} for key in full}
    (row,) = plots.mean_norm(write("e", late, modules=sized), per_weight=True).rows()
    assert [lookup(chart, "place")["embed"] for chart in row] == pytest.approx([0.75, 0.75])
    assert row[0].y.label == "‖W‖ / √n"  # without step 0 there is no percentage


def test_training_curves_average_the_loss_over_windows(write: Any) -> None:
    loss = {step: float(step) for step in range(1, 8)}
    values = {("loss", ""): loss, ("eval_metric", ""): {4: 0.5, 7: 0.75}}
    panels = plots.training_curves([write("a", values), write("b", values, seed=1)], windows=3)
    assert lookup(panels, "quantity", "step") == {
        ("loss", 3): 2.0,
        ("loss", 6): 5.0,
        ("loss", 7): 7.0,
        ("eval_metric", 4): 0.5,
        ("eval_metric", 7): 0.75,
    }
    assert "windows of 3 steps" in panels.rows()[0][0].caption
    single = plots.training_curves(write("c", {("loss", ""): loss}))
    assert lookup(single, "step") == loss


def test_spectrum_default_module_has_the_largest_update_and_caption_has_effective_rank(write: Any) -> None:
    sizes = {
        ("update_norm", "h.0.q"): {9: 9.0},
        ("update_norm", "h.1.q"): {9: 14.3},
        ("update_norm", "words"): {9: 99.0},
    }
    runs = [
        write(f"s{seed}", sizes, seed=seed, factors={"h.0.q": low_rank(9, 0), "h.1.q": low_rank(*sigma)})
        for seed, sigma in enumerate([(10.0, 10.0), (12.0, 8.0), (11.0, 9.0)])
    ]
    chart = plots.spectrum(runs)
    assert chart.meta["module"] == "h.1.q"
    assert lookup(chart, "component") == pytest.approx({1: 11.0, 2: 9.0})
    shares = np.array([[0.5, 0.5], [0.6, 0.4], [0.55, 0.45]])
    ranks = np.exp(-(shares * np.log(shares)).sum(axis=1))
    low, high = stats.t.interval(0.95, 2, np.mean(ranks), stats.sem(ranks))
    assert f"LoRA rank 2 {np.mean(ranks):.1f} [{low:.1f}, {high:.1f}]" in chart.caption
    assert lookup(plots.spectrum(runs, module="h.0.q"), "component") == pytest.approx({1: 9.0, 2: 0.0})
    with pytest.raises(ValueError, match=r"module.*got 'words'; expected one of h\.0\.q, h\.1\.q"):
        plots.spectrum(runs, module="words")


def test_spectrum_draws_dense_and_factored_updates_together(write: Any) -> None:
    sizes = {("update_norm", "h.0.q"): {9: 9.0}, ("update_norm", "h.1.q"): {9: 1.0}}
    lora = write("a", sizes, factors={"h.0.q": low_rank(9, 1)})
    full = write("b", sizes, "full", sigmas={"h.0.q": [5.0, 4.0, 3.0], "h.1.q": [1.0]})
    chart = plots.spectrum([lora, full])
    assert chart.meta["module"] == "h.0.q"
    assert lookup(chart, "recipe", "component") == pytest.approx(
        {("LoRA rank 2", 1): 9, ("LoRA rank 2", 2): 1, ("full", 1): 5, ("full", 2): 4, ("full", 3): 3}
    )
    with pytest.raises(ValueError, match=r"\b4\b"):
        plots.spectrum([lora, full], step=4)
    with pytest.raises(ValueError, match="adapters' factors"):
        plots.subspace_similarity([lora, full])


def test_subspace_similarity_of_a_hand_example_is_minus_its_random_baseline(write: Any) -> None:
    B = np.eye(4)[:, :2]
    one = write("a", profile(1, 1, 1), factors={"h.0.q": (B, [[2, 0, 0], [0, 1, 0]])})
    two = write("b", profile(1, 1, 1), seed=1, factors={"h.0.q": (B, [[1, 0, 0], [0, 0, 3]])})
    panels = plots.subspace_similarity([one, two])
    (seeds,) = panels.panels
    phi, chance = {(1, 1): 0, (1, 2): 1, (2, 1): 0, (2, 2): 0.5}, {(1, 1): 1 / 3, (1, 2): 2 / 3, (2, 1): 2 / 3}
    assert lookup(seeds, "i", "j", value="phi") == pytest.approx(phi)
    assert lookup(seeds, "i", "j", value="excess") == pytest.approx(
        {cell: value - chance.get(cell, 2 / 3) for cell, value in phi.items()}
    )
    assert (seeds.marks[0].value, seeds.marks[0].scale) == ("excess", "diverging")
    assert "φ(1, 1) = 0.00, random 0.33; φ(2, 2) = 0.50, random 0.67" in seeds.caption
    assert "one pair of runs" in seeds.caption
    assert (seeds.y.label, seeds.x.label) == ("i: directions of one seed", "j: directions of another")
    # Of the same subspaces no cell is below chance.
    same = write("c", profile(1, 1, 1), seed=1, factors={"h.0.q": (B, [[2, 0, 0], [0, 1, 0]])})
    (alike,) = plots.subspace_similarity({"a": one, "b": same}).panels
    assert (alike.marks[0].scale, alike.marks[0].limits) == ("sequence", (0, None))
    assert alike.y.label == "i: directions of a"


def test_subspace_similarity_shows_queries_and_values_of_the_block_whose_queries_changed_most(write: Any) -> None:
    def run(seed: int) -> Run:
        sizes = {"h.0.q": (1, 1), "h.0.v": (9, 9), "h.1.q": (3, 3), "h.1.v": (2, 2), "h.2.q": (9, 9)}
        modules = [{"module": name, "stack": "", "layer": int(name[2]), "role": name[-1]} for name in sizes]
        return write(f"s{seed}", {}, seed=seed, modules=modules, factors={n: low_rank(*s) for n, s in sizes.items()})

    panels = plots.subspace_similarity({"one": run(0), "two": run(1)}, control={"a": run(2), "b": run(3)})
    titles = [[chart.title for chart in row] for row in panels.rows()]
    both, control = "one against two", "control: a against b"
    assert titles == [[f"{both}, q", f"{both}, v"], [f"{control}, q", f"{control}, v"]]
    assert "A in h.1.q and h.1.v, minus" in panels.panels[0].caption
    assert panels.title == "Subspace similarity minus chance"


def test_subspace_similarity_of_two_labels_leaves_out_pairs_of_one_seed(write: Any) -> None:
    B, axes = np.eye(4)[:, :1], np.eye(3)
    one, two = (
        [write(f"{label}{n}", {}, label, n, factors={"h.0.q": (B, axes[[n]])}) for n in range(2)] for label in "ab"
    )
    (chart,) = plots.subspace_similarity({"a": one, "b": two}, module="h.0.q").panels
    assert chart.data["phi"].tolist() == [0.0]
    (same,) = plots.subspace_similarity({"a": one[0], "b": two[0]}, module="h.0.q").panels
    assert same.data["phi"].tolist() == [1.0]


def test_subspace_similarity_compares_all_pairs_of_seeds_or_all_pairs_of_two_labels(write: Any) -> None:
    B, axes = np.eye(4)[:, :1], np.eye(3)
    # Runs 0 and 1 have the same direction, run 2 another one.
    runs = [write(f"s{n}", {}, seed=n, factors={"h.0.q": (B, axes[[n // 2]])}) for n in range(3)]
    seeds = plots.subspace_similarity(runs, module="h.0.q").rows()[0][0]
    assert seeds.data[["phi", "least", "most"]].iloc[0].tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    wide = write("w", {}, "LoRA rank 3", factors={"h.0.q": (np.eye(4)[:, :3], axes)})
    across = plots.subspace_similarity({"narrow": runs[:2], "wide": wide}, module="h.0.q").rows()[0][0]
    assert across.data.shape[0] == 3
    assert across.title == "narrow against wide"


def test_subspace_similarity_of_one_run_raises(write: Any) -> None:
    one = write("a", {}, factors={"h.0.q": low_rank(1, 1)})
    with pytest.raises(ValueError, match=r"subspace_similarity.*got 1"):
        plots.subspace_similarity(one, module="h.0.q")


def test_trained_runs_draw_every_available_figure(bert: Any, task: Any, tmp_path: Path) -> None:
    """Figures can read what training records: rows of blocks, spectra and snapshots."""

    def train(method: Any, seed: int) -> Run:
        settings = {"steps": 4, "batch_size": 4, "progress": False, "device": "cpu"}
        out = tmp_path / f"{type(method).__name__}{seed}"
        return ls.train(bert, task, method, seed=seed, observe=[ls.observe.norms(every=2)], out=out, **settings)

    lora, full = ([train(method, seed) for seed in (0, 1)] for method in (ls.LoRA(rank=2), ls.Full()))
    drawable = plots.available(lora[0]).set_index("figure")["drawable"]
    # LoRA does not score components, has no router and no frequencies, and its task has no planted ranks.
    assert not drawable[["importance", "planted", "gates", "gate_course", "fourier_spectrum"]].any()
    needs_nothing_else = [
        "update_norm",
        "norm_over_steps",
        "spectrum",
        "subspace_similarity",
        "atlas",
        "training_curves",
    ]
    assert drawable[needs_nothing_else].all()
    for name in drawable.index[drawable]:
        entry = plots.FIGURES[name]
        # Full fine-tuning has neither factors nor ranks.
        only_lora = {"updates", "updates at several steps", "rank"} & {*entry.needs}
        runs = lora if only_lora else [*lora, *full]
        assert not entry.draw(runs).data.empty
    order = plots.update_norm(full).x.order
    assert (order[:4], order[-1]) == (("embed", "pos_embed", "0", "1"), "head")
    layers = lookup(plots.update_norm(lora[0]), "place")
    summary = lora[0].summary()
    for layer in ("0", "1"):
        inside = summary.loc[summary["layer"] == int(layer), "update_norm"]
        assert layers[layer] == near(np.linalg.norm(inside), terms=TINY)


def test_title_names_a_quantity_that_is_no_update(write: Any) -> None:
    run = write("a", {(quantity, "h.0.q"): {4: 1.0, 9: 1.0} for quantity in ("update_norm", "weight_norm")})
    assert plots.update_norm(run).title == "Update by layer"
    label = QUANTITIES["weight_norm"].label.capitalize()
    assert plots.update_norm(run, quantity="weight_norm").title == f"{label} by layer"
    assert plots.norm_over_steps(run, quantity="weight_norm").title == f"{label} by layer (hollow: last step)"


def test_spectrum_without_recorded_norms_shows_the_largest_update(write: Any) -> None:
    run = write("a", {}, factors={"h.0.q": low_rank(1, 1), "h.1.q": low_rank(3, 2)})
    assert plots.spectrum(run).meta["module"] == "h.1.q"


@pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")
def test_invalid_choices_are_rejected_with_the_valid_ones(write: Any) -> None:
    factored = [
        write(
            f"s{seed}", profile(1, 1, 1) | {("rank", "h.0.q"): {9: 2.0}}, seed=seed, factors={"h.0.q": low_rank(1, 1)}
        )
        for seed in range(2)
    ]
    outside = write("o", {("update_norm", "words"): {9: 1.0}})
    for draw, reason in [
        (lambda: plots.subspace_similarity(factored, side="C"), "side must be one of 'A', 'B', 'update', got 'C'"),
        (lambda: plots.factor_embedding(factored, view="x"), "view must be one of 'raw', .*, got 'x'"),
        (lambda: plots.factor_embedding(factored, factors=("C",)), "factors must be one of 'A', 'B', got 'C'"),
        (lambda: plots.factor_embedding(factored, factors=()), "factors must include 'A' or 'B', got none"),
        (lambda: plots.rank_allocation(factored, step=999), "step must be from 0 to 9, the last step, got 999"),
        (lambda: plots.importance(factored, quantity="rank"), "must have a value per component, .*, got 'rank'"),
        (lambda: plots.update_norm_heat(outside), "needs update_norm of modules inside blocks, got none"),
    ]:
        with pytest.raises(ValueError, match=reason):
            draw()


def test_unknown_quantity_is_one_line(write: Any) -> None:
    with pytest.raises(ValueError, match="update_norn"):
        plots.update_norm(write("a", {("update_norm", "h.0.q"): {4: 1.0}}), quantity="update_norn")
