"""Questions about the instruments: effects by hand, whole questions on made-up tables, and their registration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_rank_prices import made_price

from lorascope.analysis.rank_prices import RUNS
from lorascope.papers import instruments
from lorascope.papers.instruments import FORK_STEP, LATE_STEP, QUESTIONS, TEACHER, halvings, student_loss
from lorascope.papers.judging import registered_study
from lorascope.papers.judging.code_hash import comparison_hash, judging_hash
from lorascope.papers.judging.data_folder import DATA
from lorascope.papers.judging.kept_study import STUDY_COLUMNS, StudyEvidence
from lorascope.papers.judging.study_results import compute
from lorascope.papers.judging.study_verification import verify_study
from lorascope.papers.training import instrument_training
from lorascope.papers.training.student_measures import Measured

REGISTERED = DATA / "instruments" / "registered.toml"
SEEDS = range(200, 240)


def test_halvings_counts_doublings_from_fork_effects_to_independent_seeds() -> None:
    trunk = np.array([1.0, 2.0, 3.0])
    # Effects 0.5 times as spread as the trunks, and independent of them in this order.
    fork = trunk + np.array([0.5, -1.0, 0.5])
    forks = pd.DataFrame({"step": 100, "loss_trunk": trunk, "loss_fork": fork})
    other = forks.assign(step=175, loss_fork=0.0)
    spread = np.sqrt(np.var(fork, ddof=1) + np.var(trunk, ddof=1)) / np.std(fork - trunk, ddof=1)
    assert halvings(pd.concat([forks, other]), 100) == pytest.approx(np.log2(spread / 2))


def test_difference_of_students_is_the_placement_of_a_price() -> None:
    rows = [(2, 0, 1e-2, 0, 3.0, 0.0), (2, 0, 3e-2, 0, 2.9, 0.0), (2, 1, 1e-2, 0, 2.8, 0.0), (2, 1, 3e-2, 0, 2.85, 0.0)]
    runs = pd.DataFrame(rows, columns=RUNS)
    students = runs.assign(student=np.where(runs["placed"] == 1, "placed ranks", "rank 2"))
    difference = student_loss(students, "rank 2", best=True) - student_loss(students, "placed ranks", best=True)
    estimate = made_price(runs=runs).placement(2)
    assert estimate is not None
    assert difference == pytest.approx(-estimate.mean)


def made_up_tables(claim: str, effect: float, control: float, generator: np.random.Generator) -> dict[str, Any]:
    """Return the tables of a seed in which a claim has an effect and a positive control."""
    effect, control = np.array([effect, control]) + generator.normal(size=2) * 0.02 * abs(BOUNDS[claim])
    if claim == "instruments.forks":
        pieces = []
        for step, value in ((FORK_STEP, effect), (LATE_STEP, control)):
            trunk, change = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([-1.0, -1.0, 1.0, 1.0])
            # Uncorrelated with the trunk: the spread of independent seeds is hypot(1, 1, change).
            size = np.sqrt(2 / (4 ** (value + 1) - 1))
            pieces.append(pd.DataFrame({"step": step, "loss_trunk": trunk, "loss_fork": trunk + size * change}))
        return {"forks": pd.concat(pieces, ignore_index=True)}
    names = {"instruments.retrained": ("cut to rank 2", "rank 2", "rank 2, a quarter of the steps")}
    first, *others = names.get(claim, ("rank 2", "placed ranks", "planted ranks"))
    rows = [(first, 1e-2, 3.0), *((name, 1e-2, 3.0 - v) for name, v in zip(others, (effect, control), strict=True))]
    return {"students": pd.DataFrame(rows, columns=["student", "lr", "loss"])}


REGISTRATION = registered_study.read(REGISTERED)
BOUNDS = {id: claim.rule.bound for id, claim in REGISTRATION.claims.items()}


def made_up_evidence(claim: str, effect: float, control: float, closed: float = 0.8) -> StudyEvidence:
    (label,) = REGISTRATION.claims[claim].for_arms
    generator = np.random.default_rng(0)
    rows, tables = [], {}
    for seed in SEEDS:
        run: dict[str, Any] = {"run": f"r{seed}", "arm": label, "arm_hash": REGISTRATION.arms[label].hash}
        run |= {"role": "judged", "seed": seed, "rate": REGISTRATION.arms[label].rates[0], "threads": 1}
        rows.append(run | {"gap": 1 - closed, "base_gap": 1.0})
        for name, table in made_up_tables(claim, effect, control, generator).items():
            tables.setdefault(name, []).append(table.assign(arm=label, seed=seed, run=f"r{seed}"))
    texts = {name: "" for name, kind in STUDY_COLUMNS.items() if kind.dtype == "str"}
    runs = pd.DataFrame(rows).assign(**{name: text for name, text in texts.items() if name not in rows[0]})
    return StudyEvidence(runs.reindex(columns=list(STUDY_COLUMNS)), {name: pd.concat(t) for name, t in tables.items()})


def judge(claim: str, effect: float, control: float, closed: float = 0.8) -> str:
    only = replace(REGISTRATION, claims={claim: REGISTRATION.claims[claim]})
    return str(compute(only, QUESTIONS, made_up_evidence(claim, effect, control, closed)).results["word"].item())


# Effects in bounds, and the words of a gain and of a cost claim.
WORDS = [
    (1.8, "gain", "no cost"),
    (0.0, "no gain", "no cost"),
    (0.5, "gain below m", "no cost"),
    (-1.8, "loss", "cost"),
]


@pytest.mark.parametrize("claim", QUESTIONS)
@pytest.mark.parametrize(("effect", "gain", "cost"), WORDS)
def test_made_up_effects_have_their_words(claim: str, effect: float, gain: str, cost: str) -> None:
    is_gain = REGISTRATION.claims[claim].rule.kind == "gain"
    control = BOUNDS[claim] * (0.8 if is_gain else -0.8)
    assert judge(claim, effect * BOUNDS[claim], control) == (gain if is_gain else cost)


@pytest.mark.parametrize("claim", QUESTIONS)
def test_a_control_without_an_effect_leaves_no_headroom(claim: str) -> None:
    wrong = -0.5 if REGISTRATION.claims[claim].rule.kind == "gain" else 0.5
    assert judge(claim, 0.0, wrong * BOUNDS[claim]) == "no headroom"


def test_an_arm_far_from_its_teacher_is_not_learned() -> None:
    assert judge("instruments.placement", 0.02, 0.02, closed=0.15) == "not learned"


def test_registration_has_the_hashes_of_the_code() -> None:
    assert REGISTRATION.judging == judging_hash()
    for id, claim in REGISTRATION.claims.items():
        assert claim.code == comparison_hash(instruments.__name__, id)
        arms = {name: statistic.arms() for name, statistic in QUESTIONS[id].statistics().items()}
        assert {name: set(labels) for name, labels in claim.labels().items() if labels} == arms
    assert set(REGISTRATION.claims) == set(QUESTIONS)
    assert set(REGISTRATION.arms) == {TEACHER}


def train_made_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Train with a measurement that returns made-up tables, and return the measured seeds."""
    measured: list[int] = []

    def measure(seed: int, out: Path) -> Measured:
        measured.append(seed)
        tables = {}
        for claim in QUESTIONS:
            generator = np.random.default_rng([seed, len(claim)])
            for name, table in made_up_tables(claim, BOUNDS[claim], BOUNDS[claim] / 2, generator).items():
                tables.setdefault(name, []).append(table)
        joined = {name: pd.concat(pieces, ignore_index=True) for name, pieces in tables.items()}
        rows = pd.DataFrame({"phase": "", "task": ["rank 4", "rank 2"], "gap": 0.1, "base_gap": 1.0})
        return Measured(rows, pd.DataFrame({"phase": [""], "step": [1], "loss": [3.0]}), joined)

    arm = instrument_training.ARMS[TEACHER]._replace(measure=measure)
    monkeypatch.setitem(instrument_training.ARMS, TEACHER, arm)
    instrument_training.train_instruments(folder / "evidence", folder / "runs", folder / "registered.toml")
    return measured


def verify(folder: Path) -> list[str]:
    file = folder / "registered.toml"
    return verify_study(folder / "evidence", file, QUESTIONS, lambda id: instruments.__name__, sentences=False)


def test_seeds_are_trained_once_and_a_changed_word_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registered.toml").write_bytes(REGISTERED.read_bytes())
    assert train_made_up(tmp_path, monkeypatch) == list(range(200, 232))
    assert train_made_up(tmp_path, monkeypatch) == []
    assert verify(tmp_path) == []
    results = tmp_path / "evidence" / "results.csv"
    assert set(pd.read_csv(results)["word"]) <= {"gain", "gain below m", "no headroom", "open"}
    results.write_text(results.read_text("utf-8").replace("gain", "loss"), "utf-8")
    assert verify(tmp_path)


def test_an_arm_that_differs_from_the_registered_one_is_not_trained(tmp_path: Path) -> None:
    content = REGISTERED.read_text("utf-8").replace(REGISTRATION.arms[TEACHER].hash, "sha256:0")
    (tmp_path / "registered.toml").write_text(content, "utf-8")
    with pytest.raises(ValueError, match="hash must be sha256:0"):
        instrument_training.train_instruments(tmp_path / "evidence", tmp_path, tmp_path / "registered.toml")
