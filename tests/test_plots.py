"""Figures as data: hand-computed numbers from planted tables; no picture is looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import lorascope as ls
from lorascope import plots
from lorascope.records import Factors, Record, Snapshot
from lorascope.run import Run
from lorascope.writer import RunWriter

PLACES = [
    ("words", "", None, "embed"),
    ("h.0", "", 0, "block"),
    ("h.0.q", "", 0, "q"),
    ("h.0.up", "", 0, "ffn_in"),
    ("h.1.q", "", 1, "q"),
    ("h.1.up", "", 1, "ffn_in"),
    ("score", "", None, "head"),
]
MODULES = [dict(zip(("module", "stack", "layer", "role"), place, strict=True)) for place in PLACES]
Values = Mapping[tuple[str, str], Mapping[int, float]]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a run of (quantity, module) -> {step: value}, read it back."""

    def run(
        id: str,
        values: Values,
        label: str = "LoRA rank 2",
        seed: int | None = 0,
        factors: Mapping[str, tuple[Any, Any]] | None = None,
        sigmas: Mapping[str, Any] | None = None,
        **meta: Any,
    ) -> Run:
        last = max((step for steps in values.values() for step in steps), default=0)
        states = {"last": {"step": max(last, 0), "ranks": {}}}
        common = {"model": "m", "task": "t", "recipe": {"name": "lora"}, "settings": {"steps": 9}, "parents": []}
        named = {"schema": 1, "id": id, "label": label, "seed": seed, "modules": MODULES, "states": states}
        writer = RunWriter(tmp_path / id, common | named | meta)
        for (quantity, module), steps in values.items():
            for step, value in steps.items():
                writer.add(step, [Record(quantity, value, module)])
        if factors is not None:
            arrays = {name: {"B": np.array(B, float), "A": np.array(A, float)} for name, (B, A) in factors.items()}
            writer.add(last, [Factors(name, pair, 1.0) for name, pair in arrays.items()])
        for module, sigma in (sigmas or {}).items():
            writer.add(last, [Snapshot(f"{module}/singular_values", np.array(sigma), ("component",))])
        writer.finish("done")
        return Run.read(tmp_path / id)

    return run


def profile(words: float, q: float, up: float) -> Values:
    """Update norms after step 9; block 1 is half of block 0."""
    at = {"words": words, "h.0.q": q, "h.0.up": up, "h.1.q": q / 2, "h.1.up": up / 2}
    return {("update_norm", module): {0: 0.0, 4: value / 2, 9: value} for module, value in at.items()}


def lookup(chart: Any, *columns: str, value: str = "value") -> dict:
    data = chart.data
    keys = list(zip(*(data[column] for column in columns), strict=True)) if len(columns) > 1 else data[columns[0]]
    return dict(zip(keys, data[value], strict=True))


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
    assert "Frobenius norm of the update since W_0" in chart.caption
    assert "3 seeds (0, 1, 2); bands and bars: 95 % t-interval over seeds" in chart.caption


def test_one_run_has_no_band_and_says_so(write: Any) -> None:
    chart = plots.update_norm(write("a", profile(1, 3, 4), seed=7))
    assert kinds(chart) == ["Line", "Point"]
    assert chart.caption.endswith("1 run (seed 7), so no interval.")


def test_a_line_has_a_gap_where_a_recipe_has_no_record(write: Any) -> None:
    full = write("a", profile(1, 3, 4), "full")
    lora = write("b", {("update_norm", "words"): {9: 2.0}, ("update_norm", "h.1.q"): {9: 1.0}})
    chart = plots.update_norm({"full": full, "lora": lora})
    values = lookup(chart, "recipe", "place")
    assert np.isnan(values["lora", "0"])
    assert (values["lora", "embed"], values["lora", "1"], values["full", "0"]) == (2.0, 1.0, 5.0)
    assert lookup(chart, "recipe", "place", value="n")["lora", "0"] == 0


def test_recipes_and_control_are_lines_of_one_panel(write: Any) -> None:
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


def test_recipes_are_compared_by_what_training_added(write: Any) -> None:
    def run(id: str, label: str, learned: float) -> Run:
        values = profile(1, 3, 4) | {("learned_norm", "h.1.q"): {9: learned}}
        return write(id, values, label)

    fourier, lora = run("a", "FourierFT", 0.5), run("b", "LoRA", 0.25)
    chart = plots.update_norm([fourier, lora])
    assert lookup(chart, "recipe") == {"FourierFT": 0.5, "LoRA": 0.25}
    assert "what training added" in chart.caption
    assert lookup(plots.update_norm(fourier), "place")["0"] == 5.0
    without = write("c", profile(1, 3, 4), "folder")
    assert "since W_0" in plots.update_norm([fourier, without]).caption


def test_heat_parts_a_block_by_role_and_leaves_out_its_whole(write: Any) -> None:
    values = profile(1, 3, 4) | {("update_norm", "h.0"): {9: 100.0}}
    chart = plots.update_norm_heat(write("a", values))
    assert lookup(chart, "place", "role") == {("0", "q"): 3, ("0", "ffn_in"): 4, ("1", "q"): 1.5, ("1", "ffn_in"): 2}
    assert (chart.x.order, chart.y.order) == (("0", "1"), ("q", "ffn_in"))
    assert chart.marks[0].limits == (0.0, 4.0)


@pytest.mark.parametrize(("top", "text"), [(4.0, ".2f"), (40.0, ".1f"), (4000.0, ".0f"), (0.04, ".4f"), (0.0, None)])
def test_cells_show_three_digits_of_the_largest(write: Any, top: float, text: str | None) -> None:
    chart = plots.update_norm_heat(write("a", {("update_norm", "h.0.q"): {9: top}}))
    assert chart.marks[0].text == text


def test_heat_of_several_recipes_shares_its_scale_and_states_its_widest_interval(write: Any) -> None:
    small = [write(f"s{seed}", profile(1, q, 4), seed=seed) for seed, q in enumerate((2.0, 3.0, 4.0))]
    panels = plots.update_norm_heat([*small, write("b", profile(1, 3, 40), "big")])
    first, second = panels.rows()[0]
    assert first.marks[0].limits == second.marks[0].limits == (0.0, 40.0)
    half = stats.t.ppf(0.975, 2) / np.sqrt(3) / 3
    assert f"±{half:.0%}" in first.caption


def test_norm_over_steps_has_a_frame_a_step(write: Any) -> None:
    chart = plots.norm_over_steps(write("a", profile(1, 3, 4)))
    assert chart.frame == "step"
    grown = lookup(chart, "step", "place")
    assert {step: grown[step, "0"] for step in (0, 4, 9)} == {0: 0.0, 4: 2.5, 9: 5.0}
    assert sorted(set(plots.norm_over_steps(write("b", profile(1, 3, 4)), frames=2).data["step"])) == [0, 9]


def test_mean_norm_shows_every_reading_of_the_word(write: Any) -> None:
    values = {
        ("weight_norm", "words"): {0: 99.0, 1: 5.0, 2: 10.0},
        ("update_norm", "words"): {0: 0.0, 1: 1.0, 2: 2.0},
        ("adapter_norm", "words"): {0: 50.0, 1: 51.0, 2: 53.0},
    }
    full = {key: steps for key, steps in values.items() if key[0] != "adapter_norm"}
    panels = plots.mean_norm([write("a", values), write("b", full, "full")])
    assert [len(row) for row in panels.rows()] == [2, 2]
    assert lookup(panels, "metric", "recipe") == {
        ("weight_norm", "LoRA rank 2"): 7.5,
        ("weight_norm", "full"): 7.5,
        ("update_norm", "LoRA rank 2"): 1.5,
        ("update_norm", "full"): 1.5,
        ("adapter_norm", "LoRA rank 2"): 52.0,
        ("adapter_norm minus its start", "LoRA rank 2"): 2.0,
    }
    assert [len(row) for row in plots.mean_norm(write("c", full, "full")).rows()] == [2]


def test_training_curves_average_the_loss_in_windows(write: Any) -> None:
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


def low_rank(*sigma: float) -> tuple[Any, Any]:
    """Factors (4, rank) and (rank, 5) of an update with these singular values."""
    return np.eye(4)[:, : len(sigma)] * sigma, np.eye(len(sigma), 5)


def test_spectrum_is_of_the_largest_module_and_knows_its_effective_rank(write: Any) -> None:
    sizes = {
        ("update_norm", "h.0.q"): {9: 9.0},
        ("update_norm", "h.1.q"): {9: 14.3},
        ("update_norm", "words"): {9: 99.0},
    }
    runs = [
        write(f"s{seed}", sizes, seed=seed, factors={"h.0.q": low_rank(9, 0), "h.1.q": low_rank(*sigma)})
        for seed, sigma in enumerate([(10.0, 10.0), (12.0, 8.0)])
    ]
    chart = plots.spectrum(runs)
    assert chart.meta["module"] == "h.1.q"
    assert lookup(chart, "component") == pytest.approx({1: 11.0, 2: 9.0})
    shares = np.array([0.6, 0.4])
    ranks = [2.0, np.exp(-(shares * np.log(shares)).sum())]
    low, high = stats.t.interval(0.95, 1, np.mean(ranks), stats.sem(ranks))
    assert f"LoRA rank 2 {np.mean(ranks):.1f} [{low:.1f}, {high:.1f}]" in chart.caption
    assert lookup(plots.spectrum(runs, module="h.0.q"), "component") == pytest.approx({1: 9.0, 2: 0.0})
    with pytest.raises(ValueError, match=r"not all runs hold words; they hold h\.0\.q, h\.1\.q"):
        plots.spectrum(runs, module="words")


def test_spectra_of_dense_updates_stand_beside_those_of_factors(write: Any) -> None:
    sizes = {("update_norm", "h.0.q"): {9: 9.0}, ("update_norm", "h.1.q"): {9: 1.0}}
    lora = write("a", sizes, factors={"h.0.q": low_rank(9, 1)})
    full = write("b", sizes, "full", sigmas={"h.0.q": [5.0, 4.0, 3.0], "h.1.q": [1.0]})
    chart = plots.spectrum([lora, full])
    assert chart.meta["module"] == "h.0.q"
    assert lookup(chart, "recipe", "component") == pytest.approx(
        {("LoRA rank 2", 1): 9, ("LoRA rank 2", 2): 1, ("full", 1): 5, ("full", 2): 4, ("full", 3): 3}
    )
    with pytest.raises(ValueError, match="kept no snapshots at step 4"):
        plots.spectrum([lora, full], step=4)
    with pytest.raises(ValueError, match="needs the adapters' factors"):
        plots.subspace_similarity([lora, full])


def test_subspace_similarity_of_the_hand_example_beside_chance(write: Any) -> None:
    B = np.eye(4)[:, :2]
    one = write("a", profile(1, 1, 1), factors={"h.0.q": (B, [[2, 0, 0], [0, 1, 0]])})
    two = write("b", profile(1, 1, 1), seed=1, factors={"h.0.q": (B, [[1, 0, 0], [0, 0, 3]])})
    panels = plots.subspace_similarity([one, two])
    seeds, chance = panels.rows()[0]
    assert lookup(seeds, "i", "j", value="phi") == pytest.approx({(1, 1): 0, (1, 2): 1, (2, 1): 0, (2, 2): 0.5})
    assert lookup(chance, "i", "j", value="phi_random") == pytest.approx(
        {(1, 1): 1 / 3, (1, 2): 2 / 3, (2, 1): 2 / 3, (2, 2): 2 / 3}
    )
    assert [chart.marks[0].value for chart in (seeds, chance)] == ["phi", "phi_random"]
    assert seeds.marks[0].limits == chance.marks[0].limits
    assert "φ(1, 1) = 0.00, by chance 0.33; φ(2, 2) = 0.50, by chance 0.67" in seeds.caption


def test_subspace_similarity_takes_all_pairs_of_seeds_and_two_labels_across(write: Any) -> None:
    B, axes = np.eye(4)[:, :1], np.eye(3)
    runs = [
        write(f"s{n}", {}, seed=n, factors={"h.0.q": (B, axes[[n // 2]])}) for n in range(3)
    ]  # two alike, one apart
    seeds = plots.subspace_similarity(runs, module="h.0.q").rows()[0][0]
    assert seeds.data[["phi", "least", "most"]].iloc[0].tolist() == pytest.approx([1 / 3, 0.0, 1.0])
    wide = write("w", {}, "LoRA rank 3", factors={"h.0.q": (np.eye(4)[:, :3], axes)})
    across = plots.subspace_similarity({"narrow": runs[:2], "wide": wide}, module="h.0.q").rows()[0][0]
    assert across.data.shape[0] == 3
    assert across.title == "narrow against wide"


def test_subspace_similarity_of_one_run_is_refused(write: Any) -> None:
    one = write("a", {}, factors={"h.0.q": low_rank(1, 1)})
    with pytest.raises(ValueError, match="compares two runs or more"):
        plots.subspace_similarity(one, module="h.0.q")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("update_norm", "records of update_norm: train with observe=[ls.observe.norms()]"),
        ("norm_over_steps", "records of update_norm: train with observe=[ls.observe.norms()]"),
        ("mean_norm", "records of weight_norm: train with observe=[ls.observe.norms()]"),
        ("training_curves", "records of loss"),
        ("spectrum", "singular values of updates: train with observe=[ls.observe.norms()]"),
        ("subspace_similarity", "the adapters' factors: train with a method that has factors"),
    ],
)
def test_a_figure_names_the_recorder_that_is_missing(write: Any, name: str, reason: str) -> None:
    bare = write("a", {("lr", ""): {1: 0.1}})
    with pytest.raises(ValueError, match=re.escape(f"{name} needs {reason}")) as raised:
        getattr(plots, name)(bare)
    assert "\n" not in str(raised.value)


def test_a_folder_without_history_or_base_is_told_apart_from_missing_records(write: Any) -> None:
    values = {("update_norm", "h.0.q"): {-1: 2.0}, ("weight_norm", "h.0.q"): {-1: np.nan}}
    folder = write("a", values, "LoRA rank 16", seed=None)
    assert lookup(plots.update_norm(folder), "place") == {"0": 2.0}
    with pytest.raises(ValueError, match="update_norm at more than one step"):
        plots.norm_over_steps(folder)
    with pytest.raises(ValueError, match="unknown without the base"):
        plots.update_norm(folder, quantity="weight_norm")


def test_available_agrees_with_what_can_be_drawn(write: Any) -> None:
    run = write("a", profile(1, 3, 4), factors={"h.0.q": low_rank(1, 1)})
    other = write("b", profile(1, 3, 4), seed=1, factors={"h.0.q": low_rank(1, 1)})
    found = plots.available(run).set_index("figure")
    assert set(found.index) == set(plots.FIGURES)
    for name, row in found.iterrows():
        draw = plots.FIGURES[name].draw
        if row["drawable"]:
            draw([run, other][: row["runs"]])
            assert row["missing"] == ""
        else:
            with pytest.raises(ValueError, match=row["missing"].partition(":")[0]):
                draw(run)
    assert found.loc["training_curves", "missing"].startswith("records of loss")


def test_every_figure_says_how_it_is_read_and_when_it_misleads() -> None:
    for entry in plots.FIGURES.values():
        assert getattr(plots, entry.name) is entry.draw
        for text in (entry.reads, entry.misleads):
            assert text.endswith(".")
            assert len(text.split()) > 15


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"steps": 10}}, "differ in settings"),
        ({"recipe": {"name": "lora", "rank": 3}}, "differ in recipe"),
        ({"seed": 0}, r"seeds \[0, 0\]"),
        ({"seed": None}, r"seeds \[0, None\]"),
    ],
)
def test_runs_that_are_no_seeds_of_one_recipe_are_not_averaged(write: Any, change: dict, reason: str) -> None:
    one, two = write("a", profile(1, 3, 4)), write("b", profile(1, 3, 4), **({"seed": 1} | change))
    with pytest.raises(ValueError, match=reason):
        plots.update_norm([one, two])
    assert set(plots.update_norm({"one": one, "two": [two]}).data["recipe"]) == {"one", "two"}


def test_the_same_run_twice_or_none_is_refused(write: Any) -> None:
    run = write("a", profile(1, 3, 4))
    with pytest.raises(ValueError, match="run a twice"):
        plots.update_norm({"one": run, "two": run})
    with pytest.raises(ValueError, match="no run"):
        plots.update_norm([])


def test_trained_runs_draw_every_figure(bert: Any, task: Any, tmp_path: Path) -> None:
    """Recorders and figures agree: block rows, spectra and snapshots as training leaves them."""

    def train(method: Any, seed: int) -> Run:
        settings = {"steps": 4, "batch_size": 4, "progress": False, "device": "cpu"}
        out = tmp_path / f"{type(method).__name__}{seed}"
        return ls.train(bert, task, method, seed=seed, observe=[ls.observe.norms(every=2)], out=out, **settings)

    lora, full = ([train(method, seed) for seed in (0, 1)] for method in (ls.LoRA(rank=2), ls.Full()))
    assert plots.available(lora[0])["drawable"].all()
    for name, entry in plots.FIGURES.items():
        runs = lora if name == "subspace_similarity" else [*lora, *full]
        assert not entry.draw(runs).data.empty
    order = plots.update_norm(full).x.order
    assert (order[:4], order[-1]) == (("embed", "pos_embed", "0", "1"), "head")
    layers = lookup(plots.update_norm(lora[0]), "place")
    summary = lora[0].summary()
    for layer in ("0", "1"):
        inside = summary.loc[summary["layer"] == int(layer), "update_norm"]
        assert layers[layer] == pytest.approx(np.linalg.norm(inside), rel=1e-5)
