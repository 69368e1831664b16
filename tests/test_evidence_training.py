"""Training of the evidence: two tiny arms and word counts, from nothing to verdicts that verify."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from joblib import parallel_config

from lorascope.evidence import registration, store, verification
from lorascope.evidence.judging import untrained_arms
from lorascope.evidence.statistics.base import Accuracy, Constant, OfRun
from lorascope.evidence.statistics.ranks import RANKS
from lorascope.methods import Full, LoRA
from lorascope.probes import evidence
from lorascope.probes.base import Arm, Probe
from lorascope.probes.kept_ranks import keep_ranks
from lorascope.probes.tfidf_baseline import tfidf_arm
from lorascope.runs.run import Run

TOML = """
[[stage]]
claims = ["*"]
looks = [0, 1]

[[arm]]
label = "A"
hash = "HASH_A"
rates = [1e-3, 1e-2, 1e-1]
fields = { lr = 1.0, head_lr = 0.5 }
may_void = false

[[arm]]
label = "B"
hash = "HASH_B"
rates = [1e-3]
tuning_seeds = []
fields = { lr = 1.0, head_lr = 1.0 }
may_void = false

[[arm]]
label = "words"
hash = "HASH_words"
tuning_seeds = []
baseline = true
"""
CLAIM = """
[[claim]]
id = "p.{name}"
paper = {{ arxiv = "1", place = "table 1", tier = "secondary" }}
text = {{ sentence = "s", statistic = "x", control = "y", control_kind = "arm" }}
bound = {{ kind = "superiority", margin = 0.1, unit = "accuracy", from = "planted" }}
design = {{ interval = "{interval}", looks = [{seeds}], levels = [0.025], first_seed = 100 }}
arms = {arms}
code = "sha256:p.{name}"
"""
SEEDS = 3


def total(table: pd.DataFrame) -> float:
    return float(table["value"].sum())


PAIRS: Any = {
    "p.better": (Accuracy("A"), Accuracy("B")),
    "p.words": (Accuracy("A"), Accuracy("words")),
    "p.rank": (OfRun(total, RANKS, "A"), Constant(1.0)),
}


class Study:
    """A registration of three claims on tiny arms, with its folders."""

    def __init__(self, root: Path) -> None:
        self.folder, self.out, self.file = root / "evidence", root / "runs", root / "registered.toml"
        rows = [("better", "two-way", '["A", "B"]'), ("words", "two-way", '["A", "words"]'), ("rank", "t", '["A"]')]
        claims = [CLAIM.format(name=name, interval=how, seeds=SEEDS, arms=arms) for name, how, arms in rows]
        self.file.write_text(TOML + "".join(claims), encoding="utf-8")
        hashes = evidence.arm_hashes(registration.read(self.file))
        self.edit(lambda text: "".join(_filled(part, hashes) for part in text.split("\n\n")))

    def edit(self, change: Callable[[str], str]) -> None:
        self.file.write_text(change(self.file.read_text(encoding="utf-8")), encoding="utf-8")

    def write(self, **options: Any) -> None:
        with parallel_config(n_jobs=1):
            evidence.write_evidence(self.folder, self.out, registered=self.file, **options)

    def differences(self) -> list[str]:
        code: Callable[[str], str] = "sha256:{}".format
        return verification.verify(self.folder, self.file, registration.read(self.file), PAIRS, code)


def _filled(part: str, hashes: dict[str, str]) -> str:
    for label, found in hashes.items():
        part = part.replace(f"HASH_{label}", found)
    return part + "\n\n"


@pytest.fixture
def study(bert: str, tmp_path: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> Study:
    settings = {"steps": 3, "batch_size": 4, "eval_every": 0, "eval_size": 20}
    lora = LoRA(rank=2, targets="all-linear")

    probe = Probe(
        name="p",
        title="",
        source="",
        question="",
        arms=lambda: [
            Arm(label="A", method=lora, settings=settings, model=bert, task=task),
            Arm(label="B", method=Full(), settings=settings, model=bert, task=task),
            tfidf_arm("words", task),
        ],
        keep={(RANKS, "A"): keep_ranks},
    )
    monkeypatch.setattr(evidence, "PROBES", {"p": probe})
    monkeypatch.setattr(evidence, "PAIRS", PAIRS)
    evidence.registered_arms.cache_clear()
    yield Study(tmp_path)
    evidence.registered_arms.cache_clear()


def count(study: Study) -> dict[tuple[str, str], int]:
    runs = store.read(study.folder).runs
    return {key: int(number) for key, number in runs.groupby(["arm", "role"]).size().items()}


def test_from_nothing_to_verdicts_that_verify(study: Study) -> None:
    study.write()
    found = count(study)
    assert found.pop(("A", "tuning")) >= 3  # three registered rates, and further ones if the best is at an end
    assert found == {("A", "judged"): SEEDS, ("B", "judged"): SEEDS, ("words", "baseline"): 1}
    assert study.differences() == []
    verdicts = pd.read_csv(study.folder / "verdicts.csv").set_index("claim")
    assert verdicts["n"].eq(SEEDS).all()
    ranks = 2 * len(store.read(study.folder).table(RANKS, "A", 100))
    assert verdicts.loc["p.rank", "effect"] == ranks - 1
    rate = pd.read_csv(study.folder / "tuning.csv").query("chosen")["rate"].item()
    judged = store.read(study.folder).runs.query("arm == 'A' and role == 'judged'")
    assert judged["rate"].eq(rate).all()


def test_kept_predictions_are_those_of_the_runs_and_states_are_removed(study: Study) -> None:
    study.write()
    kept = store.read(study.folder)
    for file in study.out.glob("*/run.json"):
        run = Run.read(file.parent)
        assert not run.restorable
        if run.seed == 100:
            arm = "A" if run.meta.method["name"] == "lora" else "B"
            assert kept.correct(arm, 100).mean() == run.score.metric


def test_a_finished_study_trains_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    study.write()
    before = {file: file.read_bytes() for file in study.folder.rglob("*") if file.is_file()}
    monkeypatch.setattr(evidence, "train_job", None)
    study.write()
    assert before == {file: file.read_bytes() for file in study.folder.rglob("*") if file.is_file()}


def test_an_interrupted_study_loses_no_finished_run(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], evidence.train_job

    def interrupted(job: Any) -> Run:
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(job)
        return train(job)

    monkeypatch.setattr(evidence, "train_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.write()
    assert sum(count(study).values()) == 5
    trained.clear()
    monkeypatch.setattr(evidence, "train_job", lambda job: trained.append(job) or train(job))
    study.write()
    assert len(trained) == sum(count(study).values()) - 5 - 1  # the baseline is not trained
    assert study.differences() == []


def test_no_run_starts_after_the_given_minutes(study: Study) -> None:
    study.write(minutes=0)
    assert not study.folder.exists()


def test_a_rate_that_diverges_is_kept_and_not_chosen(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    train = evidence.train_job

    def diverging(job: Any) -> Run:
        if job.method.lr == 1e-3:
            raise FloatingPointError("the loss became nan")
        return train(job)

    monkeypatch.setattr(evidence, "train_job", diverging)
    study.edit(lambda text: text.replace("may_void = false", ""))
    study.write()
    tuning = pd.read_csv(study.folder / "tuning.csv").set_index("rate")
    assert tuning.loc[1e-3, "validation_loss"] == float("inf")
    assert not tuning.loc[1e-3, "chosen"]
    verdicts = pd.read_csv(study.folder / "verdicts.csv").set_index("claim")
    assert verdicts.loc["p.better", "outcome"] == "void"
    assert "B" in untrained_arms(store.read(study.folder))  # it has no other rate


def test_another_arm_than_registered_is_refused_before_training(study: Study) -> None:
    study.edit(lambda text: text.replace("head_lr = 0.5", "head_lr = 0.25"))
    with pytest.raises(ValueError, match=r"^cannot train 'A': it differs from the registered arm, .* sha256:"):
        study.write()
    assert not study.folder.exists()


def test_runs_trained_again_agree_and_show_a_consistent_forgery(study: Study) -> None:
    study.write()
    with parallel_config(n_jobs=1):
        assert evidence.retrain(study.folder, 100, study.file) == []
    kept = store.read(study.folder)
    run = kept.run("A", 101)
    margins = kept.margins[run].copy()
    margins[np.flatnonzero(margins > 0)[:2]] = -5  # two right rows become wrong, and every number follows from them
    np.savez_compressed(study.folder / "predictions" / f"{run}.npz", margin=margins)
    rows = kept.runs.assign(
        test_metric=kept.runs["test_metric"].where(kept.runs["run"] != run, float((margins > 0).mean()))
    )
    (study.folder / "runs.csv").write_bytes(store.to_csv(rows))
    study.write()
    assert study.differences() == []
    lines = evidence.retrain(study.folder, 100, study.file)
    assert lines[0] == "A, seed 101: margin of 2 rows differs"
    assert lines[1].startswith("A, seed 101: test_metric: kept ")


def test_hashes_of_all_arms_are_as_registered() -> None:
    claims = registration.read()
    assert evidence.arm_hashes(claims) == {label: arm.hash for label, arm in claims.arms.items()}
