"""Training of the second edition: what is trained, what is kept of a run, and that no run is trained twice."""

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lorascope import __version__
from lorascope.methods import ALoRA, AutoLoRA, Full, LoRA
from lorascope.papers.arms import ComputedArm, Scored
from lorascope.papers.judging import kept_study, registered_study
from lorascope.papers.judging import truth_names as names
from lorascope.papers.judging.registered_study import StudyArm, StudyRegistration
from lorascope.papers.judging.study_rates import TUNING_SEEDS
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.papers.setups import planted_truths, quadratic
from lorascope.papers.training import study_training
from lorascope.papers.training.study_training import StudyJob
from lorascope.training.state import restore

EVERYWHERE = {"targets": "all-linear"}
STUDENTS = {
    "LoRA": LoRA(rank=2, **EVERYWHERE),
    "AutoLoRA": AutoLoRA(rank=2, search_steps=2, **EVERYWHERE),
    "ALoRA": Student(ALoRA(init_rank=2, warm_steps=3, round_steps=1, score_rows=2), after=2),
}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    for counts in ("SINGLE", "MIXED", "ISOLATED"):
        monkeypatch.setattr(planted_truths, counts, planted_truths.Rows(64, 8, 8))
    caches = (planted_truths.examples, planted_truths.base_gaps, study_training._hash_once)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


@pytest.fixture
def arms(monkeypatch):
    arms = planted_arms(STUDENTS, (names.UNEVEN,), steps=4)
    arms += planted_arms({"LoRA": LoRA(rank=2, **EVERYWHERE)}, (names.SHARED_A,), steps=2)
    arms += planted_arms({"one task": Student(LoRA(rank=2, **EVERYWHERE), single_task=2)}, (names.SHARED_A,), steps=2)
    by_label = {arm.label: arm for arm in arms}
    monkeypatch.setattr(study_training, "arms_by_label", lambda: by_label)
    return by_label


def rows_of(job, tmp_path):
    return study_training.finish_job(job, tmp_path, {}).rows


def test_kept_gap_is_that_of_the_trained_model(arms, tmp_path):
    job = StudyJob(f"LoRA, {names.UNEVEN}", 200, "judged", 1e-2)
    kept = study_training.finish_job(job, tmp_path, {})
    row = kept.rows.iloc[0]
    run = study_training._train(job, tmp_path)  # finished already, so it is only read
    model = planted_truths.student()
    restore(model, run, run.path / "state" / "last.safetensors")
    gaps = planted_truths.gaps(model, names.UNEVEN, 200, "test")
    assert np.isclose(row["gap"], gaps.item(), rtol=1e-6)
    assert np.isclose(row["base_gap"], planted_truths.base_gaps(names.UNEVEN, 200, "test").item(), rtol=1e-6)
    assert kept.losses["step"].tolist() == [1, 2, 3, 4]
    assert row["seed"] == 200
    assert row["role"] == "judged"


def test_a_tuning_run_is_scored_on_validation_text(arms, tmp_path):
    tuned, judged = (
        rows_of(StudyJob(f"LoRA, {names.UNEVEN}", 9001, role, 1e-2), tmp_path / role) for role in ("tuning", "judged")
    )
    assert tuned["base_gap"].item() == planted_truths.base_gaps(names.UNEVEN, 9001, "validation").item()
    assert judged["base_gap"].item() == planted_truths.base_gaps(names.UNEVEN, 9001, "test").item()


def test_every_phase_and_task_has_a_row(arms, tmp_path):
    searched = rows_of(StudyJob(f"AutoLoRA, {names.UNEVEN}", 200, "judged", 1e-2), tmp_path)
    assert searched["phase"].tolist() == ["search", ""]
    moved = rows_of(StudyJob(f"ALoRA, {names.UNEVEN}", 200, "judged", 1e-2), tmp_path)
    assert moved["phase"].tolist() == ["first round", ""]
    assert moved["gap"].nunique() == 2
    mixed = rows_of(StudyJob(f"LoRA, {names.SHARED_A}", 200, "judged", 1e-2), tmp_path)
    assert mixed["task"].tolist() == ["task 1", "task 2", "task 3", "task 4"]
    single = rows_of(StudyJob(f"one task, {names.SHARED_A}", 200, "judged", 1e-2), tmp_path)
    assert single["task"].tolist() == ["task 3"]
    # The test text of a task is the same in the mixture.
    assert single["base_gap"].item() == mixed["base_gap"].iloc[2]


def test_a_diverged_run_is_kept_without_numbers(arms, tmp_path):
    rows = rows_of(StudyJob(f"LoRA, {names.UNEVEN}", 200, "judged", 1e30), tmp_path)
    assert "gap" not in rows
    assert rows["phase"].tolist() == [""]


def registration_of(arms, **changes):
    registered = {}
    for label in arms:
        registered[label] = StudyArm(label, study_training.study_arm_hash(label), (1e-2,), **changes)
    return StudyRegistration(registered, {})


def test_no_finished_run_is_trained_twice(arms, tmp_path, monkeypatch):
    label = f"LoRA, {names.UNEVEN}"
    registration = registration_of([label], seeds=2)
    study_training.train_study(tmp_path / "kept", tmp_path / "out", registration)
    assert kept_study.read(tmp_path / "kept").seeds(label) == [200, 201]
    monkeypatch.setattr(study_training, "finish_job", lambda *arguments: pytest.fail("trained again"))
    study_training.train_study(tmp_path / "kept", tmp_path / "out", registration)


def test_judged_runs_wait_for_the_rate_and_their_number(arms):
    label = f"LoRA, {names.UNEVEN}"
    arm = StudyArm(label, rates=(1e-2, 1.8e-2))
    empty = kept_study.read("a folder that does not exist")
    jobs = study_training.open_jobs(StudyRegistration({label: arm}, {}), empty)
    assert {(job.role, job.seed, job.rate) for job in jobs} == {
        ("tuning", seed, rate) for seed in TUNING_SEEDS for rate in (1e-2, 1.8e-2)
    }
    fixed = replace_arm(arm, rates=(1e-2,), seeds=1)
    (job,) = study_training.open_jobs(StudyRegistration({label: fixed}, {}), empty)
    assert job == StudyJob(label, 200, "judged", 1e-2)


def replace_arm(arm, **changes):
    fields = {name: getattr(arm, name) for name in ("label", "hash", "rates", "rate_of", "seeds")}
    return StudyArm(**fields | changes)


def test_an_arm_that_differs_from_the_registered_one_is_not_trained(arms, tmp_path):
    label = f"LoRA, {names.UNEVEN}"
    registration = registration_of([label], seeds=1)
    arms[label] = planted_arms({"LoRA": LoRA(rank=2, alpha=9.0, **EVERYWHERE)}, (names.UNEVEN,), steps=4)[0]
    study_training._hash_once.cache_clear()
    with pytest.raises(ValueError, match="cannot train 'LoRA, uneven ranks': its hash must be"):
        study_training.train_study(tmp_path / "kept", tmp_path / "out", registration)


def test_the_hash_of_an_arm_leaves_out_its_rate_and_what_is_recorded(arms):
    label = f"LoRA, {names.UNEVEN}"
    hash = study_training.study_arm_hash(label)
    for method, is_same in (
        (LoRA(rank=2, lr=1.0, head_lr=1.0, **EVERYWHERE), True),
        (LoRA(rank=3, **EVERYWHERE), False),
    ):
        (arms[label],) = planted_arms({"LoRA": method}, (names.UNEVEN,), steps=4)
        assert (study_training.study_arm_hash(label) == hash) == is_same
    (other,) = planted_arms({"LoRA": LoRA(rank=2, **EVERYWHERE)}, (names.RANK_2,), steps=4)
    arms[label] = replace(other, label=label)
    assert study_training.study_arm_hash(label) != hash


def test_descent_on_the_quadratic_by_hand():
    """Plain gradient steps by formula, with an optimizer of SGD in the place of a method's."""
    import torch

    class Sgd:
        def optimizer(self, model, lr, head_lr, weight_decay):
            return torch.optim.SGD(model.parameters(), lr)

    descent = quadratic.descend(Sgd(), names.MOMENTS_RANK_1, 7, 0.05)
    generator = torch.Generator().manual_seed(7)
    side = quadratic.SIDE
    s = torch.exp(1.5 * torch.randn(side, 1, generator=generator)) @ torch.exp(
        1.5 * torch.randn(1, side, generator=generator)
    )
    h = (s.sqrt() / s.sqrt().mean()).double()
    target = torch.randn(side, side, generator=generator).double()
    weight = torch.zeros(side, side, dtype=torch.float64)
    for step in range(quadratic.STEPS):
        assert math.isclose(descent.losses[step], float((h * (weight - target) ** 2).sum() / 2), rel_tol=1e-3)
        noise = torch.randn(side, side, generator=generator).double()
        weight = weight - 0.05 * (1 - step / quadratic.STEPS) * h * (weight - target + noise)
    assert math.isclose(descent.final, float((h * (weight - target) ** 2).sum() / 2), rel_tol=1e-3)


@pytest.mark.parametrize(("truth", "rank"), [(names.MOMENTS_RANK_4, 4), (names.MOMENTS_RANK_1, 1)])
def test_second_moments_have_their_rank(truth, rank):
    import torch

    moments = quadratic.draw_moments(truth, torch.Generator().manual_seed(0)).double()
    assert (moments > 0).all()
    singular = torch.linalg.svdvals(moments)
    assert singular[rank] < 1e-5 * singular[0] < singular[rank - 1]


def test_an_arm_on_the_quadratic_is_kept_with_its_losses(tmp_path, monkeypatch):
    def compute(method, seed, rate):
        losses = pd.DataFrame({"phase": "", "step": [0, 1], "loss": [2.0, 1.0]})
        return Scored({"phase": "", "task": "", "loss": 0.5, "first_loss": 2.0}, tables={"losses": losses})

    arm = ComputedArm(label="AdamW", method=Full(), setup=quadratic.__name__, compute=compute)
    monkeypatch.setattr(study_training, "arms_by_label", lambda: {"AdamW": arm})
    study_training.train_study(tmp_path / "kept", tmp_path, registration_of(["AdamW"], seeds=1))
    evidence = kept_study.read(tmp_path / "kept")
    assert evidence.final_loss("AdamW", 200) == 0.5
    assert evidence.table("losses", "AdamW", 200)["loss"].tolist() == [2.0, 1.0]


def test_source_tree_without_git_has_the_version_instead_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_commit = study_training.code_commit.__wrapped__
    assert len(code_commit()) == 40
    (tmp_path / "tree" / "data").mkdir(parents=True)
    monkeypatch.setattr(study_training, "DATA", tmp_path / "tree" / "data")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)  # a repository around the tree
    assert code_commit() == __version__
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert code_commit() == __version__


@pytest.mark.slow
def test_arms_are_as_registered() -> None:
    arms = registered_study.read().arms
    assert {label: study_training.study_arm_hash(label) for label in arms} == {
        label: arm.hash for label, arm in arms.items()
    }
