"""Excerpts of runs: chosen records and arrays, and comparison with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorascope import observe
from lorascope.inputs.task_parts import first_test_rows
from lorascope.methods import AutoLoRA, LoRA, NeFT
from lorascope.papers.figures import excerpt as excerpts
from lorascope.papers.figures.excerpt import excerpt_differences, write_excerpt
from lorascope.papers.judging import kept_runs, registration
from lorascope.papers.judging.verdicts import PHASES
from lorascope.papers.training.train_arms import keep_phases
from lorascope.runs.run import Run
from lorascope.training import loop


@pytest.fixture(scope="module")
def train(bert: str, task: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    from lorascope.inputs import models

    def trained(method: Any, seed: int = 0) -> Run:
        settings = {"steps": 4, "batch_size": 4, "eval_size": 8, "test_size": 8, "progress": False, "device": "cpu"}
        root = tmp_path_factory.mktemp("runs")
        model = models.load(bert, task=task)
        return loop.train(model, task, method, seed=seed, root=root, observe=[observe.norms(every=2)], **settings)

    return trained


@pytest.fixture(scope="module")
def run(train: Callable[..., Run]) -> Run:
    return train(LoRA(rank=2))


def test_excerpt_has_the_named_records_and_arrays_only(run: Run, tmp_path: Path) -> None:
    excerpt = write_excerpt(run, tmp_path / "part", {"update_norm", "loss"}, {"singular_values"})
    kept = run.table[run.table["quantity"].isin(["update_norm", "loss"])]
    assert excerpt.table.astype("object").equals(kept.astype("object").reset_index(drop=True))
    arrays = [name for name in run.snapshot_names() if name.endswith("/singular_values")]
    assert arrays
    assert excerpt.snapshot_names() == arrays
    for name in arrays:
        assert excerpt.snapshot(name, 4).equals(run.snapshot(name, 4))
    assert excerpt.score == run.score
    assert excerpt.ranks() == run.ranks()
    assert excerpt.update_steps() == []
    assert {path.name for path in excerpt.path.iterdir()} == {"run.json", "records.parquet", "snapshots"}


def test_excerpt_with_all_factors_has_the_updates(run: Run, tmp_path: Path) -> None:
    excerpt = write_excerpt(run, tmp_path / "part", (), {"A", "B"})
    assert excerpt.updates().keys() == run.updates().keys()
    for module, update in run.updates().items():
        np.testing.assert_array_equal(excerpt.updates()[module].dense(), update.dense())
    assert write_excerpt(run, tmp_path / "half", (), {"A"}).update_steps() == []


def test_excerpt_of_the_last_phase_has_the_earlier_ones(train: Callable[..., Run], tmp_path: Path) -> None:
    run = train(AutoLoRA(rank=2, search_steps=2))
    excerpt = write_excerpt(run, tmp_path / "part", {"alpha"}, ())
    assert excerpt.path.parent == tmp_path / "part"
    (search,) = excerpt.parents
    assert search.id == run.parents[0].id
    assert set(search.table["quantity"]) == {"alpha"}


def test_earlier_phases_are_kept_unless_only_a_head_trains(train: Callable[..., Run], task: Any) -> None:
    test = task.split("test").head(8)
    kept = keep_phases(train(AutoLoRA(rank=2, search_steps=2)), first_test_rows(task, 8))
    assert set(kept["phase"]) == {"search"}
    frequent = test.groupby("group")["label"].agg(lambda labels: labels.value_counts().iloc[0] / len(labels))
    assert dict(zip(kept["group"], kept["chance"], strict=True)) == frequent.to_dict()
    assert keep_phases(train(NeFT(select_by="probed", num_neurons=8, tune_steps=2)), task).empty
    assert keep_phases(train(LoRA(rank=2)), task).empty


def test_kept_phases_have_the_scores_of_the_excerpts() -> None:
    folder = registration.FILE.parent / "evidence"
    phases = kept_runs.read(folder).kept[PHASES]
    assert len(phases) > 30
    for run, table in phases.items():
        (path,) = (folder / excerpts.EXCERPTS / run).glob("1-*")
        phase = Run.read(path)
        assert set(table["phase"]) == {phase.meta.phase[0]}
        scores = phase.score.groups or {"": phase.score.metric}
        assert table.set_index("group")["accuracy"].to_dict() == scores


def test_differences_name_the_field_the_quantity_and_the_array(
    run: Run, train: Callable[..., Run], tmp_path: Path
) -> None:
    shown = ({"update_norm", "loss"}, {"singular_values"})
    excerpt = write_excerpt(run, tmp_path / "part", *shown)
    assert excerpt_differences(excerpt, write_excerpt(run, tmp_path / "again", *shown)) == []
    arrays = [f"{name} at step 4" for name in excerpt.snapshot_names()]
    other = write_excerpt(train(LoRA(rank=2), seed=1), tmp_path / "other", *shown)
    found = excerpt_differences(excerpt, other)
    assert found == ["id", "seed", "states", "records of loss", "records of update_norm", *arrays]


@pytest.mark.parametrize("less", [0, 1])
def test_records_and_arrays_of_one_excerpt_only_are_differences(run: Run, tmp_path: Path, less: int) -> None:
    both = [
        write_excerpt(run, tmp_path / "all", {"loss"}, {"singular_values"}),
        write_excerpt(run, tmp_path / "no", (), ()),
    ]
    found = excerpt_differences(both[less], both[1 - less])
    assert found[:2] == ["quantities", "records of loss"]
    assert len(found) == 2 + len(both[0].snapshot_names())


def test_rounding_is_no_difference(run: Run, tmp_path: Path) -> None:
    one, two = (write_excerpt(run, tmp_path / name, {"update_norm"}, ()) for name in ("a", "b"))
    vars(two)["table"] = two.table.assign(value=two.table["value"] * (1 + 1e-12))
    assert excerpt_differences(one, two) == []
    vars(two)["table"] = two.table.assign(value=two.table["value"] * (1 + 1e-6))
    assert excerpt_differences(one, two) == ["records of update_norm"]


def test_an_excerpt_that_cannot_be_written_leaves_the_earlier_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_excerpt(run, tmp_path / "part", {"loss"}, ())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(excerpts, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        write_excerpt(run, tmp_path / "part", {"update_norm"}, ())
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert excerpt_differences(Run.read(tmp_path / "part"), before) == []


def test_a_rewritten_excerpt_has_no_earlier_files(run: Run, tmp_path: Path) -> None:
    write_excerpt(run, tmp_path / "part", (), {"A", "B"})
    excerpt = write_excerpt(run, tmp_path / "part", {"loss"}, ())
    assert {path.name for path in excerpt.path.iterdir()} == {"run.json", "records.parquet"}
