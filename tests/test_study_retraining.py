"""Retraining, own seeds and the training command of the second edition, on tiny planted runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config
from test_study_training import arms, few_texts, registration_of  # noqa: F401
from test_study_verification import write_registration

from lorascope.cli import main as cli
from lorascope.cli import reproduce as command
from lorascope.cli import verify as verify_command
from lorascope.papers import registry
from lorascope.papers.judging import kept_study, registered_study, study_verification
from lorascope.papers.judging import truth_names as names
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import PaperPlace, StudyClaim, StudyRule
from lorascope.papers.judging.study_rates import TUNING_SEEDS
from lorascope.papers.judging.study_statistics import Comparison, GapClosed
from lorascope.papers.training import study_retraining, study_seeds, study_training
from lorascope.papers.training.study_retraining import retrain_study
from lorascope.papers.training.study_training import StudyJob, finish_job
from lorascope.training.processor import processor_name

METHOD, CONTROL = f"ALoRA, {names.UNEVEN}", f"LoRA, {names.UNEVEN}"
LABELS = [METHOD, CONTROL]
CLAIM = "pair.made_up"
TRAINED: dict[str, bytes] = {}
"""Files of the evidence, once they are trained."""


def energies(*runs: Any) -> pd.DataFrame:
    """Return a table that needs the saved parameters of all runs of a set."""
    tables = []
    for number, run in enumerate(runs):
        values = [float(np.linalg.norm(update.B @ update.A)) for update in run.updates().values()]
        tables.append(pd.DataFrame({"number": number, "module": list(run.updates()), "energy": values}))
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def data(arms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811
    """Yield a folder with the registration of a claim with three judged seeds, none of which is trained."""
    registered = registration_of(LABELS, seeds=3)
    paper, rule = PaperPlace("2303.10512", "table 1"), StudyRule("gain", 2.0, "points of the gap", 3)
    claim = StudyClaim(CLAIM, "It gains.", paper, rule, for_arms=(METHOD, CONTROL))
    (tmp_path / "data").mkdir()
    write_registration(tmp_path / "data" / "registered-2.toml", replace(registered, claims={CLAIM: claim}))
    comparisons = {CLAIM: Comparison(GapClosed(METHOD) - GapClosed(CONTROL))}
    for module in (registry, study_seeds, study_training, verify_command):
        monkeypatch.setattr(module, "COMPARISONS", comparisons)
    monkeypatch.setattr(verify_command, "module_of", lambda id: "papers")
    monkeypatch.setattr(study_verification, "comparison_hash", lambda module, id: "")
    monkeypatch.setattr(study_training, "KEPT_TABLES", {"energies": [((CONTROL, METHOD), energies)]})
    monkeypatch.setattr(registered_study, "STUDY_FILE", tmp_path / "data" / "registered-2.toml")
    monkeypatch.setattr(command.os, "environ", command.os.environ.copy())
    with parallel_config(n_jobs=1):  # other processes lack the changes of this one
        yield tmp_path / "data"


@pytest.fixture
def folder(data: Path) -> Path:
    """Return the folder of evidence with the runs of all seeds."""
    folder = data / "evidence-2"
    if not TRAINED:
        study_training.train_study(folder, data.parent / "runs", registered())
        TRAINED.update({file.name: content for file, content in contents(folder).items()})
    folder.mkdir(exist_ok=True)
    for name, content in TRAINED.items():
        (folder / name).write_bytes(content)
    return folder


def registered() -> registered_study.StudyRegistration:
    return registered_study.read(registered_study.STUDY_FILE)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def retrain(folder: Path, tmp_path: Path) -> list[str]:
    return retrain_study(folder, tmp_path / "retrained", registered(), 100)


def forge(folder: Path, change: Callable[[StudyEvidence], None]) -> None:
    evidence = kept_study.read(folder)
    change(evidence)
    for file in folder.glob("*.parquet"):
        file.unlink()
    kept_study.write(folder, evidence)


def add_to_gap(amount: float) -> Callable[[StudyEvidence], None]:
    def change(evidence: StudyEvidence) -> None:
        is_forged = (evidence.runs["arm"] == CONTROL) & (evidence.runs["seed"] == 200)
        evidence.runs.loc[is_forged, "gap"] += amount

    return change


def test_runs_trained_again_are_equal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = kept_study.read(folder).runs
    assert set(runs["processor"]) == {processor_name()}
    capsys.readouterr()
    assert retrain(folder, tmp_path) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    closed = kept_study.read(folder).closed(CONTROL, 201)
    assert f"{CONTROL}, seed 201: stored {closed:.4g}, yours {closed:.4g} points closed, same processor: equal" in lines


def change_loss(evidence: StudyEvidence) -> None:
    losses = evidence.tables["losses"]
    row = losses.index[(losses["arm"] == CONTROL) & (losses["seed"] == 200)][2]
    losses.loc[row, "loss"] += 2 * np.spacing(losses.loc[row, "loss"])


def change_energy(evidence: StudyEvidence) -> None:
    table = evidence.tables["energies"]
    table.loc[table["seed"] == 201, "energy"] += 1e-4


@pytest.mark.parametrize(
    ("change", "run", "text"),
    [
        (add_to_gap(1e-5), f"{CONTROL}, seed 200", "gap: 1 row: kept "),
        (change_loss, f"{CONTROL}, seed 200", "losses: loss: 1 row, step 3: kept "),
        (change_energy, f"{METHOD}, seed 201", "energies: energy: 56 rows: kept "),
        (
            lambda evidence: evidence.tables.pop("energies"),
            f"{METHOD}, seed 20",
            "energies: only one of the kept and the retrained run has",
        ),
    ],
)
def test_a_forged_number_is_named(
    folder: Path, tmp_path: Path, change: Callable[[StudyEvidence], None], run: str, text: str
) -> None:
    forge(folder, change)
    lines = retrain(folder, tmp_path)
    assert lines
    for line in lines:
        assert line.startswith(run)
        assert text in line


@pytest.mark.parametrize(("deviations", "is_named"), [(2.5, False), (3.5, True)])
def test_another_processor_uses_three_standard_deviations(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    deviations: float,
    is_named: bool,
) -> None:
    here = study_training.machine() | {"processor": "another one"}
    monkeypatch.setattr(study_retraining, "machine", lambda: here)
    runs = kept_study.read(folder).runs
    gaps = runs[runs["arm"] == CONTROL].set_index("seed")["gap"]
    forge(folder, add_to_gap(deviations * gaps[[201, 202]].std()))
    lines = retrain(folder, tmp_path)
    assert [line.startswith(f"{CONTROL}, seed 200: gap: kept ") for line in lines] == [True] * is_named
    assert "another machine (processor " in capsys.readouterr().out


def test_losses_agree_apart_from_half_a_step_of_float16() -> None:
    exact = np.array([3.14159, 0.0101, 1e-4, 60000.0])
    stored, half = exact.astype(np.float16), np.spacing(exact.astype(np.float16)).astype(float) / 2
    assert study_retraining._are_close(stored, exact).all()
    edge = stored.astype(float) + half
    assert study_retraining._are_close(stored, edge + 0.9e-6).all()
    assert not study_retraining._are_close(stored, edge + 1.1e-6 * np.maximum(1, exact)).any()
    lost = np.array([np.inf, np.nan], np.float16)
    assert study_retraining._are_close(lost, np.array([1e5, np.nan])).all()
    assert not study_retraining._are_close(lost, np.array([1.0, 1.0])).any()


def states(out: Path) -> set[str]:
    return {file.relative_to(out).parts[0] for file in out.rglob("state/*.safetensors")}


def test_states_are_removed_when_the_table_of_their_set_is_kept(data: Path, tmp_path: Path) -> None:
    kept, out = data / "evidence-2", tmp_path / "runs"
    study_training.train_study(kept, out, registered(), only=lambda label: label == CONTROL)
    assert len(states(out)) == 3  # the table of the other arm reads them
    assert not (kept / "added").exists()
    assert len(kept_study.read(kept).runs) == 3
    study_training.train_study(kept, out, registered())
    assert states(out) == set()
    table = kept_study.read(kept).table("energies", METHOD, 201)
    assert set(table["number"]) == {0, 1}


def run_command(*words: Any) -> int:
    return cli.main(["reproduce", *map(str, words)])


def test_own_seed_is_compared_with_the_kept_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_verification.write_study(folder, registered_study.STUDY_FILE, registry.COMPARISONS)
    before = contents(folder.parent)
    capsys.readouterr()
    assert run_command("--claim", CLAIM, "--seed", 31, "-o", tmp_path / "report", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert contents(folder.parent) == before
    closed = {}
    for label in LABELS:
        job = StudyJob(label, 31, "judged", 1e-2)
        rows = finish_job(job, tmp_path / "again", {CONTROL: 1e-2}).rows.query("phase == ''")
        closed[label] = 100 * (1 - rows["gap"] / rows["base_gap"]).item()
    assert {arm["arm"]: arm["score"] for arm in result["arms"]} == pytest.approx(closed)
    (effect,) = result["effects"]
    kept = pd.read_csv(folder / "results.csv").iloc[0]
    assert effect["yours"] == pytest.approx(closed[METHOD] - closed[CONTROL])
    assert [effect[name] for name in ("kept", "low", "high")] == pytest.approx(kept[["effect", "low", "high"]].tolist())
    assert effect["unit"] == "points of the gap"
    assert result["summary"].startswith("Kept: 3 seeds; ")


def test_own_seed_without_kept_runs_has_no_interval(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--claim", CLAIM, "--seed", 31, "-o", tmp_path / "report") == 0
    printed = capsys.readouterr().out
    assert "Kept: 0 seeds; not run" in printed
    assert "nan" not in printed
    assert not (data / "evidence-2").exists()


def test_own_seed_has_the_chosen_rate_or_else_the_middle_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def stop(jobs: list[StudyJob], *arguments: Any) -> None:
        rates.append(jobs[0].rate)
        raise InterruptedError

    monkeypatch.setattr(study_seeds, "train_jobs", stop)
    study = registered()
    tried = msgspec.structs.replace(study.arms[METHOD], rates=(1e-3, 1.8e-3, 3.2e-3))
    study = replace(study, arms={**study.arms, METHOD: tried})
    for gaps in ({}, {5.6e-4: 0.3, 1e-3: 0.1, 1.8e-3: 0.2, 3.2e-3: 0.4}):
        for rate, gap in gaps.items():
            for seed in TUNING_SEEDS:
                row = {"run": f"t{seed}-{rate}", "arm": METHOD, "role": "tuning", "seed": seed, "rate": rate}
                rows = pd.DataFrame([row | {"phase": "", "task": "", "gap": gap, "base_gap": 1.0}])
                losses = pd.DataFrame({"phase": "", "step": [1], "loss": [1.0]})
                kept_study.add_run(data / "evidence-2", kept_study.StudyRun(rows, losses))
        with pytest.raises(InterruptedError):
            study_seeds.train_seed(CLAIM, 31, tmp_path / "report", study, data / "evidence-2")
    assert rates == [1.8e-3, 1e-3]


def test_own_seed_is_never_trained_into_the_evidence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--claim", CLAIM, "--seed", 31, "-o", data / "evidence-2") == 2
    assert "--out must be outside" in capsys.readouterr().err
    assert not (data / "evidence-2").exists()


def test_an_unknown_claim_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--claim", "pair.made_op", "--seed", 31) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"did you mean '{CLAIM}'" in line


def test_the_command_trains_the_registered_runs(data: Path, tmp_path: Path) -> None:
    assert run_command("--evidence", data / "evidence-2", "-o", tmp_path, "--minutes", 0) == 0
    assert kept_study.read(data / "evidence-2").runs.empty
    assert run_command("--evidence", data / "evidence-2", "-o", tmp_path) == 0
    assert kept_study.read(data / "evidence-2").seeds(METHOD) == [200, 201, 202]
    assert pd.read_csv(data / "evidence-2" / "results.csv")["n"].tolist() == [3]
    assert verify_command._verify_second(write=False, retrain=1) == ["beliefs.toml: no such file"]


def test_the_command_needs_a_registration(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registered_study.STUDY_FILE.unlink()
    assert run_command("--evidence", data / "evidence-2", "-o", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "its claims are not registered" in line
