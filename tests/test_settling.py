"""The step from which modules settle, and the rotation of their subspaces, against worked numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planted import low_rank, plant
from scipy.linalg import subspace_angles
from test_series import Q, V, write

import lorascope as ls
from lorascope.analysis import settling, subspace_rotation
from lorascope.analysis.leading_directions import chance_angle
from lorascope.charts.marks import Rule

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def series(tmp_path: Path) -> ls.Series:
    """Four checkpoints whose relative distances to the last one are known, see the tests."""
    first = {10: 0.0, 20: 9.5, 30: 10.5, 40: 10.0}
    second = {10: 10.0, 20: 10.5, 30: 8.0, 40: 10.0}
    for step in first:
        both = {Q: low_rank(0.0, first[step]), V: low_rank(second[step], 0.0)}
        if step > 10:
            both[UP] = low_rank(0.0)
        write(tmp_path / f"out/checkpoint-{step}", both)
    return ls.load(tmp_path / "out")


def test_distances_are_relative_to_the_last_update(series: ls.Series) -> None:
    found = settling.update_distances(series)
    assert found.steps == (10, 20, 30, 40)
    np.testing.assert_allclose(found.values[Q], [10.0, 0.5, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(found.relative([Q]), [1.0, 0.05, 0.05, 0.0], atol=1e-7)
    np.testing.assert_allclose(found.relative([V]), [0.0, 0.05, 0.2, 0.0], atol=1e-7)
    both = np.sqrt(np.array([100.0, 0.5, 0.25 + 4.0, 0.0]) / 200)
    np.testing.assert_allclose(found.relative([Q, V]), both, atol=1e-7)
    np.testing.assert_array_equal(found.relative([UP]), [np.nan, 0.0, 0.0, 0.0])


def test_module_settles_at_the_first_step_that_all_later_ones_stay_near(series: ls.Series) -> None:
    found = settling.update_distances(series)
    assert found.settled([Q]) == 20
    assert found.settled([V]) == 40  # it was near the end at steps 10 and 20, and left it again
    assert found.settled([V], 0.2 + 1e-7) == 10
    assert found.settled([Q], 0.04) == 40
    assert found.settled([Q, V], 0.2) == 20
    assert found.settled([UP]) == 20  # unknown at step 10
    assert found.settled([V, UP]) == 40


def test_table_has_the_steps_of_modules_and_of_layers(series: ls.Series) -> None:
    table = settling.settling_steps(series).set_index("module")
    assert table["settled"].to_dict() == {Q: 20, V: 40, UP: 20}
    assert table["layer_settled"].to_dict() == {Q: 20, V: 40, UP: 40}
    assert table["last_change"].to_dict() == pytest.approx({Q: 0.05, V: 0.2, UP: 0.0}, abs=1e-7)
    assert table["norm"].to_dict() == pytest.approx({Q: 10.0, V: 10.0, UP: 0.0})
    assert table["layer"].to_dict() == {Q: 0, V: 1, UP: 1}


def test_distance_equals_that_of_dense_matrices(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for step, rank in enumerate((2, 3, 3)):
        write(tmp_path / f"step-{step}", {Q: (draw.normal(size=(4, rank)), draw.normal(size=(rank, 5)))})
    series = ls.load_series([tmp_path / f"step-{step}" for step in range(3)])
    dense = [series.updates(step)[Q].dense() for step in range(3)]
    expected = [np.linalg.norm(each - dense[-1]) for each in dense]
    np.testing.assert_allclose(settling.update_distances(series).values[Q], expected, rtol=1e-12)


def test_run_with_stored_factors_has_the_same_figures(tmp_path: Path) -> None:
    pair = (np.eye(4)[:, :1], np.eye(1, 5))
    run = plant(tmp_path, "a", {("update_norm", "h.0.q"): {9: 4.0}}, factors={"h.0.q": (4 * pair[0], pair[1])},
                starts={"h.0.q": pair})  # fmt: skip
    assert run.update_steps() == [0, 9]
    np.testing.assert_allclose(settling.update_distances(run).relative(["h.0.q"]), [0.75, 0.0], atol=1e-7)
    once = plant(tmp_path, "b", {("update_norm", "h.0.q"): {9: 4.0}}, factors={"h.0.q": pair})
    with pytest.raises(ValueError, match=r"two steps or more, got steps \[9\]"):
        settling.update_distances(once)


def test_settling_draws_the_step_of_each_layer_below_the_last_step(series: ls.Series) -> None:
    chart = ls.plots.settling(series)
    assert chart.data.set_index("place")["value"].to_dict() == {"0": 20, "1": 40}
    (rule,) = chart.marks_of(Rule)
    assert (rule.y, rule.label) == (40, "last step")


def turned(degrees: float, size: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Return factors whose column space is turned in the plane of the first two outputs, with fixed inputs."""
    angle = np.radians(degrees)
    return size * np.array([[np.cos(angle)], [np.sin(angle)], [0.0], [0.0]]), np.eye(1, 5)


def test_rotation_of_one_direction_is_its_angle(tmp_path: Path) -> None:
    for step, degrees in {1: 0.0, 2: 10.0, 3: 40.0}.items():
        write(tmp_path / f"out/checkpoint-{step}", {Q: turned(degrees, size=step)})
    table = subspace_rotation.rotations(ls.load(tmp_path / "out"))
    angles = table.set_index(["step", "against", "space"])["angle"].to_dict()
    assert angles == pytest.approx({
        (1, "last", "columns"): 40.0, (1, "last", "rows"): 0.0,
        (2, "previous", "columns"): 10.0, (2, "previous", "rows"): 0.0,
        (2, "last", "columns"): 30.0, (2, "last", "rows"): 0.0,
        (3, "previous", "columns"): 30.0, (3, "previous", "rows"): 0.0,
    }, abs=1e-5)  # fmt: skip
    assert set(table["k"]) == {1}
    np.testing.assert_array_equal(table["largest"], table["angle"])
    assert set(table["chance"]) == {chance_angle(4, 1), chance_angle(5, 1)}


def test_rotation_equals_scipy_and_does_not_depend_on_the_factors(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pairs = [(draw.normal(size=(12, 4)), draw.normal(size=(4, 9))) for _ in range(2)]
    mixed = draw.normal(size=(4, 4))
    for step, (B, A) in enumerate(pairs):
        write(tmp_path / f"a/step-{step}", {Q: (B, A)})
        write(tmp_path / f"b/step-{step}", {Q: (B @ mixed, np.linalg.inv(mixed) @ A)})
    tables = [subspace_rotation.rotations(ls.load(tmp_path / name), k=3) for name in "ab"]
    U, V3 = zip(*((svd[0][:, :3], svd[2][:3].T) for svd in (np.linalg.svd(B @ A) for B, A in pairs)), strict=True)
    expected = [np.degrees(subspace_angles(*sides)) for sides in (U, V3)]
    for table in tables:
        own = table[table["against"] == "previous"]
        assert own["angle"].tolist() == pytest.approx([each.mean() for each in expected], abs=1e-3)
        assert own["largest"].tolist() == pytest.approx([each.max() for each in expected], abs=1e-3)


def test_rotation_has_no_row_where_an_update_is_zero_or_absent_or_not_finite(series: ls.Series, tmp_path: Path) -> None:
    table = subspace_rotation.rotations(series)
    assert set(table["module"]) == {Q, V}
    assert set(table.query("module == @Q")["step"]) == {30, 20, 40}
    assert set(table.query("module == @Q and against == 'previous'")["step"]) == {30, 40}
    assert subspace_rotation.rotations(series, modules=[V])["module"].unique().tolist() == [V]
    write(tmp_path / "nan/step-1", {Q: low_rank(np.nan)})
    write(tmp_path / "nan/step-2", {Q: low_rank(1.0)})
    assert subspace_rotation.rotations(ls.load(tmp_path / "nan")).empty
