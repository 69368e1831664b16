"""Figures of FourierFT and of test metric by size, against hand-computed numbers."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import ENTRIES, SHAPE, C, lookup, low_rank, plant, plant_fourier

import lorascope as ls
from lorascope import plots
from lorascope.analysis import fourier as analysis
from lorascope.analysis import initial_update, leading_directions
from lorascope.charts.marks import Band
from lorascope.runs.manifest import Parameters
from lorascope.runs.run import Run
from lorascope.updates import Dense, Fourier

# Coefficient of each entry and its mirror, by frequency (row, column) from the center of the spectrum.
PLACES = {
    (0, 0): 1.0,
    (1, 2): -2.0,
    (-1, -2): -2.0,
    (-2, -1): 0.5,
    (-2, 1): 0.5,
    (-1, 1): 3.0,
    (1, -1): 3.0,
}


@pytest.fixture
def fourier(tmp_path: Path) -> Any:
    """Return ``plant_fourier`` for the folder of the test."""
    return partial(plant_fourier, tmp_path)


def panels(drawn: Any) -> list[Any]:
    return [chart for row in drawn.rows() for chart in row]


def test_places_of_a_hand_example() -> None:
    found = analysis.list_frequencies(Fourier(C, ENTRIES, SHAPE, 12.0))
    assert dict(zip(zip(found["row"], found["column"], strict=True), found["coefficient"], strict=True)) == PLACES
    np.testing.assert_allclose(found["radius"], np.hypot(found["row"], found["column"]))


def test_places_add_the_coefficients_of_an_entry_and_its_mirror() -> None:
    entries = np.array([[1, 3, 0], [2, 4, 3]])  # (-1, -2) is (3, 4); (0, 3) is its own mirror
    update = Fourier(np.array([2.0, -0.5, 7.0]), entries, SHAPE)
    found = analysis.list_frequencies(update)
    assert dict(zip(zip(found["row"], found["column"], strict=True), found["coefficient"], strict=True)) == {
        (1, 2): 1.5,
        (-1, -2): 1.5,
        (0, -3): 7.0,
    }
    assert analysis.radial_profile(update, bins=1)["value"].tolist() == pytest.approx([math.sqrt((1.5**2 + 7**2) / 2)])


def test_profile_is_the_root_mean_square_over_frequencies_by_radius() -> None:
    """The radii are 0, sqrt 5, sqrt 5 and sqrt 2, that of the corner is sqrt 13; a frequency counts once."""
    found = analysis.radial_profile(Fourier(C, ENTRIES, SHAPE), bins=2)
    half = math.hypot(2, 3) / 2
    assert found["radius"].tolist() == pytest.approx([half / 2, 1.5 * half])
    assert found["value"].tolist() == pytest.approx([math.sqrt((1 + 9) / 2), math.sqrt((4 + 0.25) / 2)])


def test_fourier_spectrum_subtracts_saved_initial_coefficients(fourier: Any) -> None:
    run = fourier("a", {"h.0.q": {0: [0.5, 0.0, 0.5, -1.0], 9: C}, "h.1.q": {0: C, 9: C}})
    chart, profile = panels(plots.fourier_spectrum(run))
    learned = {place: abs(value) for place, value in PLACES.items()}
    learned |= {(0, 0): 0.5, (-2, -1): 0.0, (-2, 1): 0.0, (-1, 1): 4.0, (1, -1): 4.0}
    shown = {place: value for place, value in learned.items() if value}
    assert lookup(chart, "row", "column", value="size") == pytest.approx(shown)
    assert chart.data["log"].tolist() == pytest.approx(np.log10(chart.data["size"]).tolist())
    faint = fourier("f", {"h.0.q": {9: [1e-6, 0.0, 0.0, 3.0]}})
    assert sorted(panels(plots.fourier_spectrum(faint))[0].data["log"]) == pytest.approx(np.log10([0.03, 3, 3]))
    # The frequencies are from -3 to 3 and from -2 to 2, and no dot is cut.
    assert (chart.x.limits, chart.y.limits) == ((-3.12, 3.12), (-2.08, 2.08))
    assert chart.marks[0].columns() == {"x": "column", "y": "row", "color": "log"}
    assert "minus step 0" in chart.caption
    assert "h.0.q" in chart.caption  # the larger update
    assert profile.data["value"].dropna().max() == pytest.approx(4.0)


def test_fourier_spectrum_has_a_band_of_shuffled_coefficients(fourier: Any) -> None:
    def band_and_profile(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
        _, chart = panels(plots.fourier_spectrum(run))
        (band,) = chart.marks_of(Band)
        return band.data.dropna(), chart.data.dropna(subset="value")

    band, _ = band_and_profile(fourier("a", {"h.0.q": {9: C}}))
    assert set(band["recipe"]) == {"FourierFT, shuffled"}
    assert band["low"].min() >= 0.5
    assert band["high"].max() <= 3
    assert (band["low"] < band["high"]).all()
    equal, flat = band_and_profile(fourier("b", {"h.0.q": {9: np.full(4, 2.0)}}))
    assert [*equal["low"], *equal["high"]] == pytest.approx(2 * [*flat["value"]])


def test_fourier_spectrum_shows_all_coefficients_if_initial_ones_were_not_saved(fourier: Any) -> None:
    chart, _ = panels(plots.fourier_spectrum(fourier("a", {"h.0.q": {9: C}})))
    assert lookup(chart, "row", "column", value="size") == {place: abs(value) for place, value in PLACES.items()}
    assert "minus step 0" not in chart.caption


def test_fourier_spectrum_pools_seeds_and_has_one_panel_per_recipe(fourier: Any) -> None:
    seeds = [fourier(f"s{seed}", {"h.0.q": {9: C * (1 + seed)}}, seed=seed) for seed in (0, 1)]
    other = fourier("o", {"h.0.q": {9: C}}, "other", entries=(ENTRIES + 1) % [[4], [6]])
    first, second, profile = panels(plots.fourier_spectrum([*seeds, other]))
    assert (first.title, second.title) == ("FourierFT", "other")
    assert lookup(first, "row", "column", value="size")[0, 0] == pytest.approx(math.sqrt((1 + 4) / 2))
    assert set(profile.data["recipe"]) == {"FourierFT", "other"}


def test_atlas_subtracts_the_random_initial_update(fourier: Any) -> None:
    start = [0.0, -1.0, 0.25, 1.0]
    kept = fourier("a", {"h.0.q": {0: start, 9: C}}, "kept")
    lost = fourier("b", {"h.0.q": {9: C}}, "lost")
    spectrum, _, heat = panels(plots.atlas([kept, lost], k=2))
    for label, change in (("kept", C - start), ("lost", C)):
        sigma = np.linalg.svd(Fourier(change, ENTRIES, SHAPE, 12.0).matrix, compute_uv=False)
        drawn = spectrum.data.loc[spectrum.data["recipe"] == label, "value"]
        np.testing.assert_allclose(drawn, sigma[sigma > 1e-9])
    expected, _ = leading_directions.angle_and_chance(
        *(leading_directions.leading_singular_vectors(Fourier(c, ENTRIES, SHAPE), 2) for c in (C - start, C))
    )
    assert lookup(heat, "row", "column", value="angle")["kept", "lost"] == pytest.approx(expected)
    assert re.search(r"initial update.*not saved: lost\.", heat.caption)


def test_fourier_spectrum_of_a_run_without_frequencies_raises(write: Any) -> None:
    run = write("a", {("update_norm", "h.0.q"): {9: 1.0}}, factors={"h.0.q": low_rank(1)})
    with pytest.raises(ValueError, match=r"fourier_spectrum.*Fourier coefficients.*FourierFT"):
        plots.fourier_spectrum(run)


def test_update_image_is_in_units_of_its_root_mean_square(fourier: Any, write: Any) -> None:
    wave = fourier("a", {"h.0.q": {9: C}})
    B, A = np.arange(1.0, 5).reshape(4, 1), np.ones((1, 6))
    flat = write("b", {("update_norm", "h.0.q"): {9: 1.0}}, "LoRA", factors={"h.0.q": (B, A)})
    left, right = panels(plots.update_image([wave, flat]))
    matrix = Fourier(C, ENTRIES, SHAPE, 12.0).matrix
    shown = left.data.pivot(index="row", columns="column", values="value").to_numpy()
    np.testing.assert_allclose(shown, matrix / np.sqrt(np.mean(matrix**2)))
    rows = right.data.pivot(index="row", columns="column", values="value").to_numpy()
    np.testing.assert_allclose(rows, B @ A / math.sqrt(7.5))
    assert left.marks[0].limits == right.marks[0].limits
    assert left.marks[0].scale == "diverging"
    corner = panels(plots.update_image([wave, flat], cells=3))[0]
    assert corner.data["row"].max() == corner.data["column"].max() == 2
    assert "the first 3 rows and columns" in corner.caption
    assert "all rows and columns" in left.caption
    assert plots.update_image([wave, flat]).title == "Update of h.0.q"


START = [0.5, 0.0, 0.5, -1.0]


def test_added_subtracts_the_initial_update(fourier: Any, write: Any) -> None:
    kept, lost = fourier("a", {"h.0.q": {0: START, 9: C}}), fourier("b", {"h.0.q": {9: C}}, "lost")
    B, A = np.arange(1.0, 5).reshape(4, 1), np.ones((1, 6))
    flat = write("c", {("update_norm", "h.0.q"): {9: 1.0}}, "LoRA", factors={"h.0.q": (B, A)})
    one, other, third = panels(plots.update_image([kept, lost, flat], added=True))
    for chart, matrix in (
        (one, Fourier(C - START, ENTRIES, SHAPE).matrix),
        (other, Fourier(C, ENTRIES, SHAPE).matrix),
        (third, B @ A),
    ):
        shown = chart.data.pivot(index="row", columns="column", values="value").to_numpy()
        np.testing.assert_allclose(shown, matrix / np.sqrt(np.mean(matrix**2)))
    assert "ΔW − ΔW₀ of h.0.q" in one.caption
    assert re.search(r"initial update.*not saved: lost\.", one.caption)
    spectrum = plots.spectrum(kept, added=True)
    sigma = np.linalg.svd(Fourier(C - START, ENTRIES, SHAPE, 12.0).matrix, compute_uv=False)
    np.testing.assert_allclose(spectrum.data["value"], sigma, atol=1e-12)
    assert "ΔW − ΔW₀" in spectrum.caption
    whole = plots.spectrum(kept)
    np.testing.assert_allclose(
        whole.data["value"], np.linalg.svd(Fourier(C, ENTRIES, SHAPE, 12.0).matrix)[1], atol=1e-12
    )
    assert "ΔW₀" not in whole.caption


@pytest.mark.parametrize("basis", ["random", "orthogonal"])
def test_learned_update_on_another_basis_is_rebuilt_from_its_seed(fourier: Any, basis: str) -> None:
    run = fourier("a", {"h.0.q": {0: START, 9: C}}, basis=basis, entry_seed=5)
    lost = fourier("b", {"h.0.q": {9: C}}, "lost", basis=basis, entry_seed=5)
    generator = np.random.default_rng(5)
    left, right = (generator.standard_normal((side, side)) / math.sqrt(side) for side in SHAPE)
    if basis == "orthogonal":
        left, right = np.linalg.qr(left)[0], np.linalg.qr(right)[0]
    F = np.zeros(SHAPE)
    F[tuple(ENTRIES)] = C - START
    matrix = 12 / math.sqrt(2 * 4 * 6) * left @ F @ right.T
    np.testing.assert_allclose(initial_update.learned_updates(run)["h.0.q"].dense(), matrix, atol=1e-12)
    assert not initial_update.learned_updates(lost)
    chart = plots.spectrum(run, added=True)
    np.testing.assert_allclose(chart.data["value"], np.linalg.svd(matrix, compute_uv=False), atol=1e-6)
    assert plots.spectrum(run).data["value"].tolist() == [1.0] * 4
    assert (initial_update.lacks_initial_update(run), initial_update.lacks_initial_update(lost)) == (False, True)


def test_zero_initial_update_is_not_reported_as_missing(fourier: Any) -> None:
    for basis in ("fourier", "random"):
        run = fourier(basis, {"h.0.q": {9: C}}, init="zeros", basis=basis, entry_seed=5)
        assert not initial_update.lacks_initial_update(run)
        assert "not saved" not in plots.spectrum(run, added=True).caption


def test_accuracy_by_parameters_joins_the_sizes_of_one_method(write: Any) -> None:
    def run(id: str, label: str, parameters: int, metric: float, seed: int = 0, **sizes: Any) -> Run:
        values = {("test_metric", ""): {9: metric}}
        return write(id, values, label, seed, parameters={"trained": parameters}, recipe={"name": label} | sizes)

    runs = [
        run("a", "LoRA, rank 2", 200, 0.7, rank=2),
        run("b", "LoRA", 400, 0.8, rank=4),  # labels omit default values
        run("c", "LoRA", 400, 0.9, 1, rank=4),
        run("d", "FourierFT, coefficients 64, basis random", 64, 0.6, coefficients=64),
        run("e", "Full", 9000, 0.95),
    ]
    chart = plots.accuracy_by_parameters(runs)
    assert lookup(chart, "recipe", "parameters") == pytest.approx(
        {
            ("LoRA, rank 2", 200): 0.7,
            ("LoRA", 400): 0.85,
            ("FourierFT, coefficients 64, basis random", 64): 0.6,
            ("Full", 9000): 0.95,
        }
    )
    assert dict(zip(chart.data["recipe"], chart.data["family"], strict=True)) == {
        "LoRA, rank 2": "LoRA",
        "LoRA": "LoRA",
        "FourierFT, coefficients 64, basis random": "FourierFT, basis random",
        "Full": "Full",
    }
    assert chart.data["size"].tolist() == ["2", "4", "64", ""]
    assert chart.x.log
    assert chart.data["right"].gt(chart.data["parameters"]).all()
    assert chart.colors == ("LoRA", "FourierFT, basis random", "Full")


def test_accuracy_by_parameters_writes_labels_of_equal_sizes_above_and_below(write: Any) -> None:
    sizes = [("a", 190, 0.82), ("b", 200, 0.80), ("c", 9000, 0.82), ("d", 40, 0.7)]
    runs = {
        id: write(
            id, {("test_metric", ""): {9: value}}, recipe={"name": "lora", "rank": 2}, parameters={"trained": number}
        )
        for id, number, value in sizes
    }
    drawn = plots.accuracy_by_parameters(runs).data
    assert (drawn["above"] > drawn["value"]).tolist() == [True, False, True, True]
    assert (drawn["right"] > 1.01 * drawn["parameters"]).all()
    assert (plots.accuracy_by_parameters(runs["a"]).data["right"] > 1.01 * 190).all()  # one size


def test_accuracy_by_parameters_counts_default_coefficients_and_ignores_alpha_equal_to_rank(
    write: Any, fourier: Any
) -> None:
    default = fourier("f", {"h.0.q": {9: C}})
    default.table = pd.concat([default.table, write("z", {("test_metric", ""): {9: 0.7}}).table.assign(run="f")])
    default.meta.parameters = Parameters(trained=4)
    values = {("test_metric", ""): {9: 0.8}}
    runs = [
        write(
            f"l{rank}", values, label, recipe={"name": "lora", "rank": rank, "alpha": alpha}, parameters={"trained": 9}
        )
        for rank, alpha, label in ((2, 2, "LoRA, rank 2, alpha 2"), (8, 8, "LoRA"), (4, 8, "LoRA, rank 4, alpha 8"))
    ]
    chart = plots.accuracy_by_parameters({run.label: run for run in (default, *runs)})
    assert chart.data["size"].tolist() == ["4", "2", "8", "4"]
    assert chart.data["family"].tolist() == ["FourierFT", "LoRA", "LoRA", "LoRA, alpha 8"]


def test_accuracy_by_parameters_reads_sizes_from_labels_of_runs_without_updates(write: Any) -> None:
    values = {("test_metric", ""): {9: 0.8}}
    labels = {"FourierFT, 48 coefficients": 48, "FourierFT, 1536 coefficients": None, "FourierFT, uniform rank": None}
    runs = [
        write(
            label,
            values,
            label,
            recipe={"name": "fourierft", "coefficients": number},
            parameters={"trained": 9 + place},
        )
        for place, (label, number) in enumerate(labels.items())
    ]
    drawn = plots.accuracy_by_parameters(runs).data
    assert drawn["size"].tolist() == ["48", "1536", ""]
    assert drawn["family"].tolist() == ["FourierFT", "FourierFT", "FourierFT, uniform rank"]


def test_accuracy_by_parameters_with_two_tasks_raises(write: Any) -> None:
    values = {("test_metric", ""): {9: 0.5}}
    runs = [write(id, values, id, task=task, parameters={"trained": 1}) for id, task in (("a", "t"), ("b", "u"))]
    with pytest.raises(ValueError, match=r"task, got t \(run a\) and u \(run b\)"):
        plots.accuracy_by_parameters(runs)


@pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")
@pytest.mark.parametrize(("shape", "value"), [("runs/x", "str"), ((0, 5), r"\(0, 5\)"), ((5,), r"\(5,\)")])
def test_frequency_bias_of_anything_but_a_shape_is_rejected(shape: Any, value: str) -> None:
    with pytest.raises(ValueError, match=rf"shape must be two integers >= 1 \(outputs, inputs\), got {value}"):
        plots.frequency_bias(shape)


def test_frequency_bias_by_distance_has_the_values_of_the_paper() -> None:
    """The values are p of Eq. 5 at width 200, for centers 0, 100, 200 and distances 0, 50, 100, 200, 300."""
    chart = plots.frequency_bias((768, 768), (0, 100, 200), 200)
    # Half of the highest probability: (d² - 100²) / 200 d = ±√ln 2, so d = √(100² + u²) ± u with u = 100 √ln 2.
    half = 100 * math.sqrt(math.log(2))
    ends = re.search(r"center 100: distances (\d+) to (\d+) have at least half", chart.title)
    expected_ends = [math.hypot(100, half) - half, math.hypot(100, half) + half]
    step = panels(chart)[0].data["distance"].diff().max()
    assert ends is not None
    assert [float(end) for end in ends.groups()] == pytest.approx(expected_ends, abs=step + 0.5)
    assert chart.mpl().legends[0].get_title().get_text() == "center"
    curves, *maps = panels(chart)
    table = {
        0: [1, 0.9394, 0.7788, 0.3679, 0.1054],
        100: [0, 0.5698, 1, 0.5698, 0.1690],
        200: [0, 0, 0.1054, 1, 0.4994],
    }
    for center, values in table.items():
        line = curves.data[curves.data["center"] == f"{center}"]
        found = np.interp([0, 50, 100, 200, 300], line["distance"], line["probability"])
        np.testing.assert_allclose(found, values, atol=6e-5)
        highest = line.loc[line["probability"].idxmax(), "distance"]
        assert highest == pytest.approx(center, abs=line["distance"].diff().max())
    assert len(maps) == 3
    for chart, center in zip(maps, table, strict=True):
        cells = lookup(chart, "row", "column", value="probability")
        assert cells[0, 0] == (1.0 if center == 0 else 0.0)
        across, expected = np.array([c for r, c in cells if r == 0]), []
        for column in across:
            distance = abs(column) or 1e-9
            expected.append(math.exp(-(((distance**2 - center**2) / (distance * 200)) ** 2)))
        np.testing.assert_allclose([cells[0, column] for column in across], expected, atol=1e-9)
        assert chart.marks[0].limits == (0, 1)


def test_spectrum_omits_components_that_are_rounding_errors(tmp_path: Path) -> None:
    """A removed component of AdaLoRA leaves a singular value at the rounding error of the others."""
    run = plant(tmp_path, "run", {}, factors={"h.0.q": low_rank(5.0, 1.0, 1e-17)})
    assert plots.spectrum(run, module="h.0.q").data["value"].tolist() == pytest.approx([5, 1, 0], abs=0)
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 40))
    sigma = Dense(matrix).singular_values()
    dense = plant(tmp_path, "dense", {}, factors={"h.0.q": (np.diag(sigma), np.eye(40))})
    assert np.count_nonzero(plots.spectrum(dense, module="h.0.q").data["value"]) == 3
    assert leading_directions.pool_spectra({"h.0.q": sigma}, ["h.0.q"])["value"].tolist() == sigma[:3].tolist()
