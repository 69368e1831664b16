"""Turning points of a series: worked Gram matrices, dense matrices, and a planted change of the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import plant
from test_series import Q, V, write

import lorascope as ls
from lorascope.analysis import turning_points
from lorascope.cli.main import main
from lorascope.papers.setups import planted_teacher

COUNT = 16
TURN = 8


def write_series(folder: Path, headings: list[float], steps: list[int] | None = None) -> ls.Series:
    """Write checkpoints whose displacements have length 1 and these headings in degrees, in a plane of two modules."""
    angles = np.radians(headings)
    places = np.cumsum([(0.0, 0.0), *zip(np.cos(angles), np.sin(angles), strict=True)], axis=0)
    for number, place in enumerate(places):
        modules = {}
        for module, size in zip((Q, V), place, strict=True):
            modules[module] = (np.array([[size], [0.0], [0.0], [0.0]]), np.eye(1, 5))
        step = 10 * number if steps is None else steps[number]
        write(folder / f"checkpoint-{step}", modules)
    return ls.load(folder)


def alternating(turn: float) -> list[float]:
    """Return headings that change by 30 degrees to one side and the other, and once by ``turn``."""
    headings = [30.0 * (number % 2) for number in range(COUNT - 1)]
    return [heading + (turn if number >= TURN else 0.0) for number, heading in enumerate(headings)]


def test_cosine_equals_the_worked_displacements(tmp_path: Path) -> None:
    turns = ls.turns(write_series(tmp_path / "out", alternating(90.0)))
    expected = np.full(COUNT, np.cos(np.radians(30.0)))
    expected[[0, -1]] = np.nan
    expected[TURN] = np.cos(np.radians(90.0 - 30.0))  # an odd heading of 30 before, and an even one of 90 after
    np.testing.assert_allclose(turns.table["cosine"], expected, atol=1e-6)
    assert turns.table["step"].tolist() == list(range(0, 10 * COUNT, 10))
    assert turns.table["drop"][TURN] == pytest.approx(0.5 - np.cos(np.radians(30.0)), abs=1e-6)
    assert turns.summary()["step"].tolist() == [10 * TURN]
    assert "turning point at step 80" in repr(turns)


def test_gram_matrix_of_worked_updates_is_exact() -> None:
    updates = {
        Q: [ls.updates.LowRank(np.array([[b], [0.0]]), np.array([[3.0, 4.0]]), 0.5) for b in (1.0, 2.0, -2.0)],
        V: [ls.updates.Dense(np.array([[0.0, value]])) for value in (0.0, 1.0, 3.0)],
    }
    # <dW_i, dW_j> of Q is 0.25 * 25 * b_i * b_j, and that of V the product of the values.
    expected = 6.25 * np.outer([1.0, 2.0, -2.0], [1.0, 2.0, -2.0]) + np.outer([0.0, 1.0, 3.0], [0.0, 1.0, 3.0])
    np.testing.assert_array_equal(turning_points.gram_of_updates(list(updates.values())), expected)


def test_gram_matrix_equals_that_of_dense_matrices_for_factors_of_other_ranks() -> None:
    draw = np.random.default_rng(0)
    updates = [ls.updates.LowRank(draw.normal(size=(7, r)), draw.normal(size=(r, 5)), 1.5) for r in (1, 3, 3, 2)]
    dense = np.stack([update.dense().ravel() for update in updates])
    np.testing.assert_allclose(turning_points.gram_of_updates([updates]), dense @ dense.T, rtol=1e-12)


def test_path_has_the_distances_of_the_checkpoints_in_a_plane(tmp_path: Path) -> None:
    headings = alternating(90.0)
    turns = ls.turns(write_series(tmp_path / "out", headings))
    angles = np.radians(headings)
    places = np.cumsum([(0.0, 0.0), *zip(np.cos(angles), np.sin(angles), strict=True)], axis=0)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    path = turns.path[["first", "second"]].to_numpy()
    np.testing.assert_allclose(np.linalg.norm(path[:, None] - path[None], axis=-1), distances, atol=1e-6)
    assert sum(turns.explained) == pytest.approx(1.0)
    assert turns.explained[0] >= turns.explained[1]


def test_turn_needs_both_bounds(tmp_path: Path) -> None:
    small = ls.turns(write_series(tmp_path / "small", alternating(45.0)))  # cosine 0.97: a rise, no fall
    assert small.summary().empty
    assert "no turning point in 16 checkpoints" in repr(small)
    noisy = [0.0, 60.0, 20.0, 100.0, 10.0, 30.0, -50.0, 40.0, 0.0, 90.0, 20.0, -20.0, 60.0, 10.0, 80.0]
    spread = ls.turns(write_series(tmp_path / "noisy", noisy))
    fallen = spread.table["drop"] < turning_points.SMALLEST_DROP
    assert fallen.any()
    assert spread.summary().empty  # no drop is far outside the spread of all


@pytest.mark.parametrize(("steps", "match"), [
    (list(range(0, 110, 10)), "at least 12 checkpoints, got 11"),
    ([2**number for number in range(COUNT)], "evenly spaced"),
])  # fmt: skip
def test_too_few_comparable_checkpoints_are_rejected(tmp_path: Path, steps: list[int], match: str) -> None:
    series = write_series(tmp_path / "out", alternating(90.0)[: len(steps) - 1], steps)
    with pytest.raises(ValueError, match=match):
        ls.turns(series)


def test_displacements_over_other_spans_and_zero_ones_have_no_cosine(tmp_path: Path) -> None:
    steps = [*range(0, 10 * (COUNT - 1), 10), 10 * (COUNT - 2) + 4]
    table = ls.turns(write_series(tmp_path / "out", alternating(0.0), steps)).table
    assert table["cosine"].isna().to_numpy().nonzero()[0].tolist() == [0, COUNT - 2, COUNT - 1]
    still = plant(
        tmp_path, "still", {("update_norm", "h.0.q"): {9: 1.0}}, factors={"h.0.q": (np.ones((4, 1)), np.eye(1, 5))}
    )
    with pytest.raises(ValueError, match="at least 12"):
        ls.turns(still)


def test_result_is_json_with_a_receipt(tmp_path: Path) -> None:
    turns = ls.turns(write_series(tmp_path / "out", alternating(90.0)))
    content = turns.to_json()
    assert content["turns"] == [80]
    assert content["checkpoints"] == COUNT
    assert content["table"][0]["cosine"] is None
    assert content["receipt"]["run"] == turns.receipt.run
    assert str(turns.receipt) in repr(turns)


def test_figure_rings_the_turn_and_has_a_column_per_run(tmp_path: Path) -> None:
    turned, straight = (write_series(tmp_path / str(turn), alternating(turn)) for turn in (90.0, 0.0))
    (cosines, *_), (path, *_) = ls.plots.turns(turned).rows()
    assert (cosines.title, path.title) == ("Cosine by step", "Path of the updates")
    rings = [mark.data["step"].tolist() for chart in (cosines, path) for mark in chart.marks if mark.data is not None]
    assert rings == [[10 * TURN], [10 * TURN]]
    assert "Turning point at step 80, of 16 checkpoints" in cosines.caption
    both = ls.plots.turns({"turned": turned, "straight": straight})
    assert [chart.title for row in both.rows() for chart in row] == [
        *("turned", "straight"),
        *("turned, path", "straight, path"),
    ]
    assert "straight: no turning point in 16 checkpoints" in both.panels[0].caption
    assert all(mark.data is None for mark in both.rows()[0][1].marks)


def test_figure_names_what_a_short_series_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = write_series(tmp_path / "out", alternating(0.0)[:8])
    assert not ls.plots.available(series).set_index("figure").loc["turns", "drawable"]
    assert main(["plot", "turns", str(series.path)]) == 2
    assert "factors at 12 steps or more" in capsys.readouterr().err


# -- a planted change of the task -------------------------------------------------------------------------------


def train_decoder(folder: Path, seed: int, change: bool) -> ls.Run:
    """Train LoRA on planted text for 200 steps at a constant rate, on the text of another teacher from step 100."""
    torch.manual_seed(seed)
    model = planted_teacher.student()
    method = ls.LoRA(rank=4, targets="all-linear")
    method.attach(model)
    optimizer = method.optimizer(model, 3e-3, 3e-3, 0.0)
    reader = ls.models.processor(model)
    encoded = []
    for teacher in (0, 1):
        task = planted_teacher.task(teacher)
        encoded.append(task.encode(reader, task.split("train"), planted_teacher.LENGTH))
    draw = np.random.default_rng(seed)
    with ls.record(model, optimizer, folder, [ls.observe.factors(every=10)], steps=200, seed=seed) as recorder:
        for step in range(200):
            rows = encoded[int(change and step >= 100)]
            loss = model(**rows.batch(draw.choice(len(rows), 16, replace=False).tolist())).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            recorder.step(loss)
            optimizer.zero_grad()
    return ls.load(folder)


@pytest.mark.slow
def test_planted_change_is_found_and_unchanged_runs_have_no_turn(tmp_path: Path) -> None:
    found = false_alarms = 0
    for seed in range(10):
        changed = ls.turns(train_decoder(tmp_path / f"changed-{seed}", seed, True)).summary()["step"]
        found += bool(changed.between(90, 110).any())
        unchanged = ls.turns(train_decoder(tmp_path / f"unchanged-{seed}", seed, False)).summary()
        false_alarms += not unchanged.empty
    assert found >= 9
    assert false_alarms <= 1
