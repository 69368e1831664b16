"""Kept runs of the second edition: added one by one, merged, killed at every write, and their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lorascope.papers.judging import kept_study
from lorascope.papers.judging.kept_study import StudyEvidence, StudyRun, add_run, compact
from lorascope.papers.judging.study_statistics import Accuracy, GapClosed, LogLoss, OfTable, are_learned, pair

RIGHT = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 1], bool)
TEST_ROWS = pd.DataFrame({"cluster": [7, 7, 3, 1, 2, 2, 5, 8, 9, 9], "text": list("abcdefghij")})


def made_run(id: str, arm: str = "None", seed: int = 200, **values: Any) -> StudyRun:
    """Return a run with two phases and two tasks, a table and, unless it has other values, test rows."""
    common = {"run": id, "arm": arm, "arm_hash": "sha256:1", "role": "judged", "seed": seed, "rate": 1e-3}
    rows = pd.DataFrame([
        common | {"phase": "search", "task": "a", "gap": 0.5, "base_gap": 1.0},
        common | {"phase": "", "task": "a", "gap": 0.1, "base_gap": 1.0},
        common | {"phase": "", "task": "b", "gap": 0.3, "base_gap": 0.5},
    ])  # fmt: skip
    losses = pd.DataFrame({"phase": ["search", ""], "step": [0, 1], "loss": [2.0, 1 / 3]})
    ranks = pd.DataFrame({"module": ["q", "v"], "planted": [0, 4], "rank": [seed, 3]})
    return StudyRun(rows.assign(**values), losses, {"ranks": ranks}, RIGHT, TEST_ROWS)


def same(left: StudyEvidence, right: StudyEvidence) -> bool:
    """Return whether two folders have the same runs, regardless of their order."""

    def ordered(table: pd.DataFrame) -> pd.DataFrame:
        return table.sort_values(list(table.columns), ignore_index=True)

    assert left.tables.keys() == right.tables.keys()
    pairs = [(left.runs, right.runs), (left.rows, right.rows)]
    pairs += [(left.tables[name], right.tables[name]) for name in left.tables]
    for old, new in pairs:
        pd.testing.assert_frame_equal(ordered(old), ordered(new))
    return {run: bits.tolist() for run, bits in left.right.items()} == {
        run: bits.tolist() for run, bits in right.right.items()
    }


def test_an_empty_folder_has_no_runs(tmp_path: Path) -> None:
    evidence = kept_study.read(tmp_path / "new")
    assert len(evidence.runs) == 0
    assert evidence.seeds("a") == []


def test_a_run_is_read_as_it_was_added_before_and_after_merging(tmp_path: Path) -> None:
    add_run(tmp_path, made_run("r2", seed=201))
    add_run(tmp_path, made_run("r1"))
    for _ in range(2):
        evidence = kept_study.read(tmp_path)
        assert evidence.seeds("None") == [200, 201]
        # 100 (1 - 0.1 / 1) and 100 (1 - 0.3 / 0.5), averaged.
        assert evidence.closed("None", 200) == pytest.approx((90 + 40) / 2)
        assert evidence.closed("None", 200, "search") == pytest.approx(50)
        assert evidence.table("ranks", "None", 201)["rank"].tolist() == [201, 3]
        assert list(evidence.tables["ranks"].columns[:3]) == ["arm", "seed", "run"]
        losses = evidence.table("losses", "None", 200)["loss"]
        assert losses.dtype == np.float16
        assert losses.tolist() == [2.0, float(np.float16(1 / 3))]
        assert evidence.correct("None", 200).tolist() == (100.0 * RIGHT).tolist()
        assert evidence.clusters("None", 201).tolist() == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6]
        assert len(evidence.rows) == len(RIGHT)
        compact(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "losses.parquet",
        "ranks.parquet",
        "right.npz",
        "rows.parquet",
        "runs.csv.gz",
    ]


def test_merging_is_independent_of_the_order_of_training(tmp_path: Path) -> None:
    contents = []
    for name, seeds in (("a", (200, 201, 202)), ("b", (202, 200, 201))):
        for seed in seeds:
            add_run(tmp_path / name, made_run(f"r{seed}", seed=seed))
        compact(tmp_path / name)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_a_run_cannot_be_added_twice_with_other_numbers(tmp_path: Path) -> None:
    add_run(tmp_path, made_run("r1"))
    for _ in range(2):
        add_run(tmp_path, made_run("r1", cpu_seconds=9.0, commit="new"))
        with pytest.raises(ValueError, match="other numbers"):
            add_run(tmp_path, made_run("r1", gap=0.2))
        with pytest.raises(ValueError, match="other numbers"):  # also at another rate: there is one judged run per seed
            add_run(tmp_path, made_run("r2", rate=1.8e-3))
        assert len(kept_study.read(tmp_path).runs) == 3
        compact(tmp_path)
    for rate in (1e-3, 1.8e-3):
        add_run(tmp_path, made_run(f"t{rate}", role="tuning", rate=rate, seed=9001))
    assert len(kept_study.read(tmp_path).runs) == 9


def test_a_diverged_run_has_no_numbers_and_no_losses(tmp_path: Path) -> None:
    add_run(tmp_path, made_run("r1"))
    compact(tmp_path)
    run = made_run("r2", seed=201, gap=np.nan)
    add_run(tmp_path, StudyRun(run.rows, pd.DataFrame(columns=["phase", "step", "loss"], dtype="float64")))
    for _ in range(2):
        evidence = kept_study.read(tmp_path)
        assert np.isnan(evidence.closed("None", 201))
        assert evidence.tables["losses"].dtypes.astype(str).tolist() == [
            "str",
            "int64",
            "str",
            "str",
            "int64",
            "float16",
        ]
        compact(tmp_path)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_kill_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(tmp_path, made_run("r1"))
    compact(tmp_path)
    add_run(tmp_path, made_run("r2", seed=201))
    add_run(tmp_path, made_run("r3", seed=202))
    whole = kept_study.read(tmp_path)
    write, unlink = kept_study.write_bytes, Path.unlink
    remaining = 0

    def killing(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal remaining
            if remaining == 0:
                raise Killed
            remaining -= 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(kept_study, "write_bytes", killing(write))
    monkeypatch.setattr(Path, "unlink", killing(unlink))
    for count in range(30):
        remaining = count
        try:
            compact(tmp_path)
        except Killed:
            monkeypatch.setattr(Path, "unlink", unlink)
            assert same(kept_study.read(tmp_path), whole), count
            monkeypatch.setattr(Path, "unlink", killing(unlink))
        else:
            break
    assert count > 6  # each file of the folder, and each added one
    assert same(kept_study.read(tmp_path), whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"role": "baseline"}, "role"),
        ({"run": "../x"}, "run id"),
        ({"phase": "search"}, "phase"),
        ({"seed": [1, 2, 3]}, "agree"),
        ({"colour": 1}, "colour"),
    ],
)
def test_an_incomplete_run_is_rejected(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    run = made_run("r1")
    with pytest.raises(ValueError, match=message):
        add_run(tmp_path, StudyRun(run.rows.assign(**values), run.losses))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    add_run(tmp_path, made_run("r1"))
    compact(tmp_path)
    for name in ("losses.parquet", "right.npz", "runs.csv.gz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=name):
            kept_study.read(tmp_path)
        (tmp_path / name).write_bytes(content)


def test_statistics_by_hand(tmp_path: Path) -> None:
    for seed, gap in ((200, 0.2), (201, 0.4)):
        add_run(tmp_path, made_run(f"m{seed}", "LoRA, even", seed, gap=gap, base_gap=1.0, loss=0.5))
        add_run(tmp_path, made_run(f"c{seed}", "full, even", seed, gap=0.5, base_gap=1.0, loss=1.0))
        add_run(tmp_path, made_run(f"a{seed}", "LoRA, flat", seed, gap=0.1, base_gap=1.0))
        add_run(tmp_path, made_run(f"b{seed}", "full, flat", seed, gap=0.1, base_gap=1.0))
        add_run(tmp_path, made_run(f"p{seed}", "best, even", seed, gap=0.0, base_gap=1.0))
    evidence, seeds = kept_study.read(tmp_path), (200, 201)
    comparison = pair("LoRA", "full", "best", truths=("even", "flat"))
    values = {name: statistic(evidence, seeds) for name, statistic in comparison.statistics().items()}
    np.testing.assert_allclose(values["for"], [30, 10])
    np.testing.assert_allclose(values["against"], [0, 0], atol=1e-12)
    np.testing.assert_allclose(values["positive"], [50, 50])
    assert comparison.arms() == {"LoRA, even", "full, even", "LoRA, flat", "full, flat", "best, even"}
    percent = (LogLoss("LoRA, even") - LogLoss("full, even"))(evidence, seeds)
    np.testing.assert_allclose(percent, 100 * np.log([2, 2]))
    points = (Accuracy("LoRA, even") / 2)(evidence, seeds)
    np.testing.assert_array_equal(points, np.tile(50.0 * RIGHT, (2, 1)))
    assert OfTable(_first_rank, "ranks", "LoRA, even")(evidence, seeds).tolist() == [200, 201]
    assert GapClosed("LoRA, even").arms() == {"LoRA, even"}


def test_a_worse_method_as_positive_control_at_the_other_truth() -> None:
    comparison = pair("LoRA, rank 4", "full", "LoRA, rank 1", truths=("low", "high"), positive_truth="high", of=LogLoss)
    assert comparison.positive is not None
    assert comparison.positive.arms() == {"LoRA, rank 1, high", "full, high"}
    assert pair("FourierFT", "random", truths=("a", "b")).positive is None


def _first_rank(table: pd.DataFrame) -> float:
    return float(table["rank"].iloc[0])


def test_lines_of_learning() -> None:
    nothing = dict.fromkeys(["gap", "base_gap", "accuracy", "majority", "loss", "first_loss"], np.nan)
    expected = [
        ({"gap": 0.79, "base_gap": 1.0}, True),
        ({"gap": 0.81, "base_gap": 1.0}, False),
        ({"accuracy": 0.625, "majority": 0.5}, True),
        ({"accuracy": 0.59, "majority": 0.5}, False),
        ({"loss": 0.19, "first_loss": 1.0}, True),
        ({"loss": 0.2, "first_loss": 1.0}, False),
        ({}, False),
    ]
    rows = pd.DataFrame([nothing | values for values, _ in expected])
    assert are_learned(rows).tolist() == [learned for _, learned in expected]
