"""Small versions of the papers' studies, on tiny planted runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_study_retraining import CONTROL, LABELS, METHOD, data, run_command  # noqa: F401
from test_study_training import arms, few_texts  # noqa: F401

import lorascope as ls
from lorascope.files.data_folder import DATA
from lorascope.papers import adalora, registry
from lorascope.papers.judging import registered_study
from lorascope.papers.training import small_studies, study_seeds
from lorascope.papers.training.study_training import StudyJob, finish_job

RATES = dict.fromkeys(LABELS, 1e-2)


@pytest.fixture(autouse=True)
def registered(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Register the arms of the tests as those of AdaLoRA."""
    monkeypatch.setattr(small_studies, "COMPARISONS", study_seeds.COMPARISONS)


def closed(seed: int, out: Path) -> dict[str, float]:
    """Return the gap closed by each arm, from its rows."""
    points = {}
    for label in LABELS:
        rows = finish_job(StudyJob(label, seed, "judged", 1e-2), out, RATES).rows.query("phase == ''")
        points[label] = 100 * (1 - rows["gap"] / rows["base_gap"]).item()
    return points


@pytest.mark.slow
def test_small_version_has_the_effects_and_figures_of_its_seeds(tmp_path: Path) -> None:
    study = ls.papers.adalora.run(seeds=2, out=tmp_path / "report", progress=False)
    points = [closed(seed, tmp_path / "again") for seed in (200, 201)]
    (effect,) = study.table.to_dict("records")
    assert effect["yours"] == pytest.approx(sum(by_arm[METHOD] - by_arm[CONTROL] for by_arm in points) / 2)
    assert sorted(study.runs["seed"]) == [200, 200, 201, 201]
    assert set(study.runs["learned"]) == {"no"}  # after 4 steps
    assert list(study.figures) == ["pairs-adalora", "losses"]
    page = study.path.read_text(encoding="utf-8")
    assert study.path == tmp_path / "report" / "adalora.html"
    assert "AdaLoRA, small version" in page
    assert "did not learn" in repr(study)


def test_jupyter_shows_table_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda *objects: shown.extend(objects))
    study = ls.papers.adalora.run(out=tmp_path, progress=False)
    study._ipython_display_()
    table, *figures = shown
    assert table.columns.tolist() == ["claim", "effect", "unit", "yours"]  # there is no kept run
    assert figures == list(study.figures.values())


def test_finished_runs_are_not_trained_again(tmp_path: Path) -> None:
    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("run.json")}

    first = ls.papers.adalora.run(out=tmp_path, progress=False)
    before = times()
    again = ls.papers.adalora.run(out=tmp_path, progress=False)
    assert times() == before
    assert len(before) == 2
    assert again.table.equals(first.table)


def test_motive_is_trained_with_fewer_steps_and_labeled(tmp_path: Path) -> None:
    paper = replace(adalora.PAPER, motive={CONTROL: {"steps": 2}})
    registration = registered_study.read(registered_study.STUDY_FILE)
    jobs = small_studies.small_jobs(paper, [], [200], registration, RATES)
    table = study_seeds.run_table(study_seeds.train_jobs(jobs, tmp_path, RATES, progress=False))
    assert table[["arm", "steps"]].to_numpy().tolist() == [[CONTROL, 2]]
    note = small_studies.small_note(table, paper.motive)
    assert note == "Small version: 1 seed (200), 2 of 4 steps; 0 of 1 run learned. "


def test_motives_are_whole_sets_of_registered_arms() -> None:
    """A kept table of a set needs all its runs, so a small version trains all of them or none."""
    assert set(registry.PAPERS) == set(ls.papers.NAMES)
    registration = registered_study.read(DATA / "registered-2.toml")
    for paper in registry.PAPERS.values():
        assert paper.motive.keys() <= registration.arms.keys()
        for tables in registry.KEPT_TABLES.values():
            for labels, _ in tables:
                assert labels[-1] not in paper.motive or set(labels) <= paper.motive.keys()


def test_command_prints_effects_and_the_path_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--paper", "AdaLoRA", "--seed", 31, "-o", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Zhang et al., AdaLoRA, arXiv 2303.10512"
    assert lines[-1] == str(tmp_path / "adalora.html")
    assert run_command("--paper", "adalora", "--seed", 31, "-o", tmp_path, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {run["seed"] for run in result["runs"]} == {31}


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    page = tmp_path / "adalora.html"
    page.write_text("<html>mine</html>", encoding="utf-8")
    with pytest.raises(FileExistsError, match="was not written by lorascope"):
        ls.papers.adalora.run(out=tmp_path, progress=False)
    assert [file.name for file in tmp_path.iterdir() if file.name != "data"] == ["adalora.html"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--paper", "hydra"), "unknown paper 'hydra'; expected one of lora, lisa, adalora, autolora, alora,"),
        (("--paper", "lora", "--claim", "pair.lora"), "--claim, --evidence and --instruments cannot be combined"),
        (("--paper", "lora", "--evidence", "x"), "cannot be combined"),
        (("--instruments", "x", "--paper", "lora"), "--evidence and --instruments cannot be combined"),
        (("--instruments", "x", "--claim", "pair.lora", "--seed", 31), "--instruments cannot be combined"),
        (("--instruments", "x", "--evidence", "y"), "--evidence and --instruments cannot be combined"),
        (("--paper", "lora", "--seed", -1), "--seed must be from 0"),
    ],
)
def test_wrong_arguments_give_one_line(words: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(*words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_output_is_neither_a_file_nor_in_the_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for out, message in ((tmp_path / "file", "--out must be a folder"), (tmp_path / "data", "--out must be outside")):
        assert run_command("--paper", "adalora", "-o", out) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_unknown_paper_raises() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dora'"):
        ls.papers.dora  # noqa: B018
    assert "hydralora" in dir(ls.papers)


@pytest.mark.parametrize("seeds", [0, -1, [], [3, 3], [2**32]])
def test_invalid_seeds(seeds: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed"):
        ls.papers.adalora.run(seeds=seeds, out=tmp_path)
