"""Atlas of several methods: spectra, norms and angles between their updates, against hand-computed numbers."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import COMMON, MODULES, Values, lookup, manifest, plant

from lorascope import plots
from lorascope.analysis import initial_update, leading_directions
from lorascope.runs.run import Run
from lorascope.runs.writer import RunWriter
from lorascope.schema.records import Factors, Record
from lorascope.updates import Dense, LowRank, Update

NORMS: Values = {("learned_norm", module): {9: size} for module, size in (("h.0.q", 3.0), ("h.0.up", 4.0))}
NORMS = NORMS | {("learned_norm", "h.1.q"): {9: 2.0}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return ``plant`` for the folder of the test, with learned norms."""
    return partial(plant, tmp_path, values=NORMS)


def along(out: int, inner: int, size: float = 1.0) -> tuple[Any, Any]:
    """Return factors (6, 1) and (1, 5) of an update that maps one unit vector to another."""
    return size * np.eye(6)[:, [out]], np.eye(5)[[inner]]


def panels(drawn: Any) -> list[Any]:
    return [chart for row in drawn.rows() for chart in row]


def test_atlas_angles_are_means_over_sides_and_modules(write: Any) -> None:
    """In h.0.q only the outputs are at a right angle (mean 45), in h.1.q outputs and inputs are (mean 90)."""
    first = write("a", label="one", factors={"h.0.q": along(0, 0), "h.1.q": along(0, 0)})
    second = write("b", label="two", factors={"h.0.q": along(1, 0), "h.1.q": along(3, 4), "h.0.up": along(0, 0)})
    heat = panels(plots.atlas([first, second], k=3))[2]
    assert lookup(heat, "row", "column", value="angle") == pytest.approx({("one", "two"): 67.5})
    by_chance = np.mean([leading_directions.chance_angle(dim, 1) for dim in (6, 5)])
    assert lookup(heat, "row", "column") == pytest.approx({("one", "two"): 67.5 - by_chance})
    random, updates = heat.marks
    assert lookup(heat, "row", "column", value=updates.x) == pytest.approx({("one", "two"): 67.5})
    assert list(random.data[random.x]) == pytest.approx([by_chance])
    assert heat.y.order == ("one, two",)
    assert heat.x.limits == (0, 90)
    assert "first 3 singular vectors" in heat.caption


def test_atlas_diagonal_compares_only_seeds_of_a_recipe(write: Any) -> None:
    runs = [write(f"s{seed}", seed=seed, factors={"h.0.q": along(0, seed)}) for seed in (0, 1, 2)]
    other = write("o", label="other", factors={"h.0.q": along(0, 1)})
    heat = panels(plots.atlas([*runs, other]))[2]
    angles = lookup(heat, "row", "column", value="angle")
    assert angles["LoRA rank 2", "LoRA rank 2"] == pytest.approx(45.0)
    assert angles["LoRA rank 2", "other"] == pytest.approx((45 + 0 + 45) / 3)
    assert ("other", "other") not in angles
    assert heat.y.order == ("LoRA rank 2, seeds", "LoRA rank 2, other")


def test_atlas_reports_recipes_without_saved_directions(write: Any) -> None:
    adapter = write("a", label="LoRA", factors={"h.0.q": along(0, 0, 2.0)})
    full = write("b", label="Full", sigmas={"h.0.q": [4.0, 1.0], "score": [9.0]})
    spectrum, _, heat = panels(plots.atlas([adapter, full]))
    assert list(heat.data["row"] + heat.data["column"]) == ["LoRAFull"]
    assert heat.data["value"].isna().all()
    assert list(heat.marks[-1].data["words"]) == ["not saved"]
    assert "no directions: Full." in heat.caption
    assert lookup(spectrum, "recipe", "component") == {("LoRA", 1): 2.0, ("Full", 1): 4.0, ("Full", 2): 1.0}


def test_atlas_pools_spectra_over_common_modules(write: Any) -> None:
    """The pool is the root mean square over h.0.q and h.1.q; only one run has h.0.up, and the first has rank 1."""
    first = write("a", label="one", factors={"h.0.q": along(0, 0, 3.0), "h.1.q": along(0, 0, 4.0)})
    held = {"h.0.q": [6.0, 1.0, 1e-12], "h.1.q": [8.0, 7.0], "h.0.up": [99.0]}
    second = write("b", label="two", sigmas=held)
    spectrum = panels(plots.atlas([first, second]))[0]
    assert lookup(spectrum, "recipe", "component") == pytest.approx(
        {("one", 1): math.sqrt(12.5), ("two", 1): math.sqrt(50), ("two", 2): 5.0}
    )
    assert "2 modules in blocks" in spectrum.caption
    one = panels(plots.atlas([first, second], module="h.1.q"))[0]
    assert lookup(one, "recipe", "component") == {("one", 1): 4.0, ("two", 1): 8.0, ("two", 2): 7.0}
    assert one.title == "Spectrum of h.1.q"
    with pytest.raises(ValueError, match=r"got 'h\.0\.up'; expected one of h\.0\.q, h\.1\.q"):
        plots.atlas([first, second], module="h.0.up")


def test_atlas_plots_learned_norms(write: Any) -> None:
    drawn = plots.atlas(
        [write("a", factors={"h.0.q": along(0, 0)}), write("b", seed=1, factors={"h.0.q": along(0, 0)})]
    )
    norms = panels(drawn)[1]
    assert lookup(norms, "place") == {"0": 5.0, "1": 2.0}
    assert norms.y.label == "‖ΔW − ΔW₀‖"
    assert len({chart.caption for chart in panels(drawn)}) == 1


def test_atlas_subtracts_a_saved_initial_update_for_any_method(write: Any) -> None:
    draw = np.random.default_rng(0)
    B0, A0, change = draw.standard_normal((6, 2)), draw.standard_normal((2, 5)), 0.1 * draw.standard_normal((2, 5))
    B = B0 + 0.1 * draw.standard_normal((6, 2))
    kept = write("k", label="kept", factors={"h.0.q": (B, A0 + change)}, starts={"h.0.q": (B0, A0)})
    zero = write("z", label="zero", factors={"h.0.q": (B, A0)}, starts={"h.0.q": (0 * B0, A0)})
    added = {"kept": B @ (A0 + change) - B0 @ A0, "zero": B @ A0}
    for run in (kept, zero):
        np.testing.assert_allclose(initial_update.learned_updates(run)["h.0.q"].dense(), added[run.label], atol=1e-12)
    spectrum, _, heat = panels(plots.atlas([kept, zero], k=2))
    for label, matrix in added.items():
        drawn = spectrum.data.loc[spectrum.data["recipe"] == label, "value"]
        sigma = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(drawn, sigma[sigma > 1e-9])
    expected, _ = leading_directions.angle_and_chance(
        *(leading_directions.leading_singular_vectors(Dense(matrix), 2) for matrix in added.values())
    )
    assert lookup(heat, "row", "column", value="angle")["kept", "zero"] == pytest.approx(expected)
    assert "initial update" not in heat.caption


def test_atlas_reports_an_initial_update_that_was_not_saved(write: Any) -> None:
    lost, zero = (
        write(label, label=label, factors={"h.0.q": along(0, 0)}, values=NORMS | {("update_norm", "h.0.q"): norms})
        for label, norms in (("lost", {0: 0.8, 9: 1.0}), ("zero", {0: 1e-6, 9: 1.0}))
    )
    caption = panels(plots.atlas([lost, zero]))[0].caption
    assert re.search(r"initial update.*not saved: lost\.", caption)


def test_atlas_names_the_gates_of_input_dependent_updates(tmp_path: Path, write: Any) -> None:
    B, A = along(0, 0)
    common = COMMON | {"recipe": {"name": "hydralora"}}
    states = {"last": {"step": 9, "ranks": {"h.0.q": 1}}}
    named = {"id": "h", "label": "Hydra", "seed": 0, "modules": MODULES, "states": states}
    writer = RunWriter(tmp_path / "h", manifest(**common | named))
    writer.collect(9, [Record("learned_norm", 1.0, "h.0.q"), Factors("h.0.q", {"B": B, "A": A}, 1.0, exact=False)])
    writer.finish("done")
    plain = write("a", label="LoRA", factors={"h.0.q": (B, A)})
    assert "Updates of Hydra at mean gates." in panels(plots.atlas([Run.read(tmp_path / "h"), plain]))[0].caption
    other = write("b", label="other", factors={"h.0.q": (B, A)})
    assert "gates" not in panels(plots.atlas([plain, other]))[0].caption


@pytest.mark.parametrize(("first", "is_learned"), [(0.27, False), (0.4, True)])
@pytest.mark.parametrize("figure", ["atlas", "adapter_pairs"])
def test_unlearned_mixtures_are_named(tmp_path: Path, write: Any, figure: str, first: float, is_learned: bool) -> None:
    B, A = along(0, 0)
    named = {"id": "h", "label": "Hydra", "seed": 0, "modules": MODULES, "recipe": {"name": "hydralora"}}
    named["states"] = {"last": {"step": 9, "ranks": {"h.0.q": 1}}}
    writer = RunWriter(tmp_path / "h", manifest(**COMMON | named))
    gates = np.array([first, 0.25, 0.25, 0.5 - first])
    arrays = {"B": np.stack([B] * 4), "A": A, "gates": gates}
    norms = [Record(quantity, 1.0, "h.0.q") for quantity in ("learned_norm", "update_norm")]
    writer.collect(9, [*norms, Factors("h.0.q", arrays, 1.0, exact=False)])
    writer.finish("done")
    plain = write("a", values={("update_norm", "h.0.q"): {9: 1.0}} | NORMS, label="LoRA", factors={"h.0.q": (B, A)})
    caption = panels(plots.FIGURES[figure].draw([Run.read(tmp_path / "h"), plain]))[0].caption
    assert "Updates of Hydra at mean gates." in caption
    assert ("The gates of Hydra are within 10% of uniform" in caption) != is_learned


@pytest.mark.parametrize(("key", "one", "two"), [("task", "t", "poems"), ("model", "m", "gpt")])
def test_atlas_with_different_tasks_or_models_raises(write: Any, key: str, one: str, two: str) -> None:
    runs = [
        write("a", factors={"h.0.q": along(0, 0)}),
        write("b", label="B", factors={"h.0.q": along(0, 0)}, **{key: two}),
    ]
    with pytest.raises(ValueError, match=f"{key}, got {one} .run a. and {two} .run b.$"):
        plots.atlas(runs)


def test_atlas_pools_each_runs_own_modules_if_none_is_common(write: Any) -> None:
    """Two runs have the head, but it is outside the blocks and does not count."""
    first = write("a", label="one", factors={"h.0.q": along(0, 0, 3.0), "score": along(0, 0, 50.0)})
    second = write("b", label="two", factors={"h.1.q": along(0, 0, 4.0), "h.0.up": along(0, 0, 2.0)})
    third = write("c", label="three", sigmas={"h.1.q": [5.0], "score": [70.0]})
    spectrum, _, heat = panels(plots.atlas([first, second, third]))
    assert lookup(spectrum, "recipe", "component") == pytest.approx(
        {("one", 1): 3.0, ("two", 1): math.sqrt((16 + 4) / 2), ("three", 1): 5.0}
    )
    assert "each run's own modules" in spectrum.caption
    words = lookup(heat, "row", "column", value="words")
    assert (words["one", "two"], words["one", "three"]) == ("none shared", "not saved")


def test_atlas_of_one_run_or_without_modules_in_blocks_raises(write: Any) -> None:
    first = write("a", label="one", factors={"h.0.q": along(0, 0)})
    with pytest.raises(ValueError, match=r"atlas.*got 1"):
        plots.atlas(first)
    with pytest.raises(ValueError, match=r"spectrum.*run b"):
        plots.atlas([first, write("b", label="two", factors={"score": along(0, 0)})])
    with pytest.raises(ValueError, match=r"^k must.*got 0"):
        plots.atlas([first, write("c", label="two", factors={"h.0.q": along(0, 0)})], k=0)


def test_atlas_skips_zero_updates_in_angles(write: Any) -> None:
    zero = (np.zeros((6, 2)), np.ones((2, 5)))
    first = write("a", label="one", factors={"h.0.q": zero, "h.1.q": along(0, 0)})
    second = write("b", label="two", factors={"h.0.q": along(0, 0), "h.1.q": along(0, 1)})
    heat = panels(plots.atlas([first, second]))[2]
    assert lookup(heat, "row", "column", value="angle")["one", "two"] == pytest.approx(45.0)


def test_mean_angle_of_a_hand_example() -> None:
    """The output planes share one direction and have 30 degrees between the others; the input planes are equal."""

    def angle(*updates: tuple[Update, int]) -> float:
        directions = (leading_directions.leading_singular_vectors(update, k) for update, k in updates)
        return leading_directions.angle_and_chance(*directions)[0]

    turned = np.array([[1, 0], [0, math.cos(math.pi / 6)], [0, math.sin(math.pi / 6)]])
    first = LowRank(np.eye(3)[:, :2] * (2, 1), np.eye(2, 4))
    second = Dense(turned * (2, 1) @ np.eye(2, 4))
    assert angle((first, 2), (second, 2)) == pytest.approx((0 + 30 + 0 + 0) / 4)
    assert angle((first, 1), (second, 2)) == pytest.approx(0.0, abs=1e-6)
    within = LowRank(np.eye(3)[:, 1:2], np.eye(2, 4)[1:])  # the second direction of the other update
    assert angle((within, 2), (first, 2)) == pytest.approx(90)


def test_chance_angle_matches_random_subspaces() -> None:
    assert leading_directions.chance_angle(4, 4) == pytest.approx(0.0, abs=1e-6)
    assert leading_directions.chance_angle(3, 1) == pytest.approx(math.degrees(1), abs=2)  # mean arccos, uniform
    assert leading_directions.chance_angle(2, 1) == pytest.approx(45, abs=2)


@pytest.mark.parametrize(("dim", "k"), [(40, 3), (7, 3), (5, 3), (9, 1)])
def test_chance_angle_with_many_draws_is_that_of_two_drawn_subspaces(
    dim: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, draw = 20_000, np.random.default_rng(5)
    monkeypatch.setattr(leading_directions, "_DRAWS", draws)
    U, V = (np.linalg.qr(draw.standard_normal((draws, dim, k)))[0] for _ in range(2))
    cosines = np.linalg.svd(U.swapaxes(1, 2) @ V, compute_uv=False)
    angles = np.degrees(np.arccos(np.minimum(cosines, 1))).mean(1)
    error = angles.std() * (2 / draws) ** 0.5
    assert leading_directions.chance_angle.__wrapped__(dim, k) == pytest.approx(angles.mean(), abs=4 * error)


def test_atlas_has_the_profiles_of_neurons_of_runs_that_recorded_them(write: Any) -> None:
    sizes = np.linspace(1.0, 5.0, 6)
    recorded: Values = {}
    for module in ("h.0.q", "h.1.q"):
        recorded["sensitivity_out", module] = {9: sizes}
        recorded["shuffled_sensitivity_out", module] = {9: np.full(6, 2.0)}
    for module in ("h.0.q", "h.1.q", "h.0.up"):
        recorded["sensitivity_in", module] = {9: sizes}
    one = write("a", values=NORMS | recorded, label="one", factors={"h.0.q": along(0, 0)})
    two = write("b", label="two", factors={"h.0.q": along(1, 0)})
    drawn = plots.atlas([one, two])
    assert [len(row) for row in drawn.rows()] == [2, 2]
    profile = drawn.rows()[1][1]
    assert profile.title == "Sorted neurons"
    assert set(profile.data["recipe"]) == {"one"}
    assert profile.data["value"].max() == pytest.approx(np.quantile(sizes, 0.99) / 3)
    null = profile.marks[0].data
    assert set(null["recipe"]) == {"gradients shuffled"}
    assert null["value"].to_list() == pytest.approx([1.0] * len(null))
    assert "Neurons" in profile.caption
    assert len(plots.atlas([two, write("c", label="three", factors={"h.0.q": along(0, 0)})]).rows()[1]) == 1
