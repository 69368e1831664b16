"""Questions about the instruments: effects by hand, whole questions on made-up tables, and their registration."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import spearmanr
from test_rank_prices import made_price

from lorascope.analysis.rank_prices import RUNS
from lorascope.files.data_folder import DATA
from lorascope.papers import instruments
from lorascope.papers.instruments import (
    FLIPPED,
    FORK_STEP,
    LATE_STEP,
    ORDER_BOUND,
    QUESTIONS,
    SENTENCES,
    TEACHER,
    best_scale,
    halvings,
    norm_order,
    repeat_order,
    student_loss,
)
from lorascope.papers.judging import registered_study
from lorascope.papers.judging.code_hash import comparison_hash, judging_hash
from lorascope.papers.judging.kept_study import STUDY_COLUMNS, StudyEvidence
from lorascope.papers.judging.study_results import compute
from lorascope.papers.judging.study_verification import verify_study
from lorascope.papers.training import instrument_training
from lorascope.papers.training.student_measures import Measured

REGISTERED = DATA / "instruments" / "registered.toml"
SEEDS = range(200, 240)
SCALES = np.arange(0.25, 1.5, 0.25)
MODULE_COLUMNS = ["norm", "learn_even", "learn_odd"]


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


def test_norm_order_is_the_rank_correlation_with_learn_on_all_rows() -> None:
    modules = pd.DataFrame(np.random.default_rng(0).normal(size=(36, 3)), columns=MODULE_COLUMNS).round(1)
    learn = modules["learn_even"] + modules["learn_odd"]
    assert norm_order(modules) == pytest.approx(spearmanr(modules["norm"], learn)[0], abs=1e-12)


def test_repeat_order_predicts_the_correlation_of_twice_as_many_rows() -> None:
    # Four equally noisy measurements of one quantity: two halves, and the halves of as many other rows.
    generator = np.random.default_rng(0)
    measured = generator.normal(size=20_000) + 1.5 * generator.normal(size=(4, 20_000))
    halves = pd.DataFrame({"learn_even": measured[0], "learn_odd": measured[1]})
    assert repeat_order(halves) == pytest.approx(np.corrcoef(measured[:2].sum(0), measured[2:].sum(0))[0, 1], abs=0.03)


@pytest.mark.parametrize("flipped", [0.0, 0.3])
def test_best_scale_of_a_parabola_is_its_minimum(flipped: float) -> None:
    def loss(scale: Any) -> Any:
        return (1 - flipped) * (scale - 0.9) ** 2 + flipped * (scale - 0.5) ** 2

    curve = pd.DataFrame({"scale": SCALES, "loss": (SCALES - 0.9) ** 2, "wrong_loss": (SCALES - 0.5) ** 2})
    assert best_scale(curve, flipped) == pytest.approx(minimize_scalar(loss).x, abs=1e-6)


def test_best_scale_beyond_the_scales_is_their_end() -> None:
    assert best_scale(pd.DataFrame({"scale": SCALES, "loss": -SCALES, "wrong_loss": SCALES})) == 1.25


def made_up_tables(claim: str, effect: float, control: float, generator: np.random.Generator) -> dict[str, Any]:
    """Return the tables of a seed in which a claim has an effect and a positive control."""
    if claim == "instruments.norm":
        return {"modules": made_up_modules(-effect, ORDER_BOUND - control, generator)}
    effect, control = np.array([effect, control]) + generator.normal(size=2) * 0.02 * abs(BOUNDS[claim])
    if claim == "instruments.scale":
        # The vertex of a weighted mean of two parabolas is the weighted mean of their vertices.
        vertex = 1 - (control - (1 - FLIPPED) * effect) / FLIPPED
        losses = {"loss": (SCALES - 1 + effect) ** 2, "wrong_loss": (SCALES - vertex) ** 2}
        return {"curve": pd.DataFrame({"scale": SCALES} | losses)}
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


def made_up_modules(order: float, repeat: float, generator: np.random.Generator) -> pd.DataFrame:
    """Return modules whose norm has a correlation with learn, which has one with learn on as many other rows."""
    common, *noise = generator.normal(size=(4, 400))
    of_halves = max(repeat, 0.0) / (2 - max(repeat, 0.0))
    halves = np.sqrt(of_halves) * common + np.sqrt(1 - of_halves) * np.array(noise[:2])
    learn = halves.sum(0) / halves.sum(0).std()
    norm = order * learn + np.sqrt(1 - order**2) * noise[2]
    return pd.DataFrame(np.array([norm, *halves]).T, columns=MODULE_COLUMNS)


REGISTRATION = registered_study.read(REGISTERED)
BOUNDS = {id: claim.rule.bound for id, claim in REGISTRATION.claims.items()}


def made_up_evidence(claim: str, effect: float, control: float, learned: float = 0.8) -> StudyEvidence:
    (label,) = REGISTRATION.claims[claim].for_arms
    generator = np.random.default_rng(0)
    rows, tables = [], {}
    for seed in SEEDS:
        run: dict[str, Any] = {"run": f"r{seed}", "arm": label, "arm_hash": REGISTRATION.arms[label].hash}
        run |= {"role": "judged", "seed": seed, "rate": REGISTRATION.arms[label].rates[0], "threads": 1}
        of_arm = {"gap": 1 - learned, "base_gap": 1.0}
        if label == SENTENCES:
            of_arm = {"accuracy": learned, "majority": 0.5}
        rows.append(run | of_arm)
        for name, table in made_up_tables(claim, effect, control, generator).items():
            tables.setdefault(name, []).append(table.assign(arm=label, seed=seed, run=f"r{seed}"))
    texts = {name: "" for name, kind in STUDY_COLUMNS.items() if kind.dtype == "str"}
    runs = pd.DataFrame(rows).assign(**{name: text for name, text in texts.items() if name not in rows[0]})
    return StudyEvidence(runs.reindex(columns=list(STUDY_COLUMNS)), {name: pd.concat(t) for name, t in tables.items()})


def judge(claim: str, effect: float, control: float, learned: float = 0.8) -> str:
    only = replace(REGISTRATION, claims={claim: REGISTRATION.claims[claim]})
    return str(compute(only, QUESTIONS, made_up_evidence(claim, effect, control, learned)).results["word"].item())


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
    assert judge("instruments.placement", 0.02, 0.02, learned=0.15) == "not learned"


def test_an_arm_near_the_most_frequent_class_is_not_learned() -> None:
    assert judge("instruments.norm", 0.0, -0.4, learned=0.55) == "not learned"


def test_registration_has_the_hashes_of_the_code() -> None:
    assert REGISTRATION.judging == judging_hash()
    for id, claim in REGISTRATION.claims.items():
        assert claim.code == comparison_hash(instruments.__name__, id)
        arms = {name: statistic.arms() for name, statistic in QUESTIONS[id].statistics().items()}
        assert {name: set(labels) for name, labels in claim.labels().items() if labels} == arms
    assert set(REGISTRATION.claims) == set(QUESTIONS)
    assert set(REGISTRATION.arms) == {SENTENCES, TEACHER}


ROWS_OF_RUNS = {
    TEACHER: pd.DataFrame({"phase": "", "task": ["rank 4", "rank 2"], "gap": 0.1, "base_gap": 1.0}),
    SENTENCES: pd.DataFrame({"phase": "", "task": ["products"], "accuracy": 0.8, "majority": 0.6}),
}


def train_made_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Train with measurements that return made-up tables, and return the measured arms and seeds."""
    measured: list[tuple[str, int]] = []

    def measure(seed: int, out: Path, label: str) -> Measured:
        measured.append((label, seed))
        tables = {}
        for claim in QUESTIONS:
            if label not in REGISTRATION.claims[claim].for_arms:
                continue
            generator = np.random.default_rng([seed, len(claim)])
            for name, table in made_up_tables(claim, BOUNDS[claim], BOUNDS[claim] / 2, generator).items():
                tables.setdefault(name, []).append(table)
        joined = {name: pd.concat(pieces, ignore_index=True) for name, pieces in tables.items()}
        return Measured(ROWS_OF_RUNS[label], pd.DataFrame({"phase": [""], "step": [1], "loss": [3.0]}), joined)

    for label in ROWS_OF_RUNS:
        arm = instrument_training.ARMS[label]._replace(measure=partial(measure, label=label))
        monkeypatch.setitem(instrument_training.ARMS, label, arm)
    instrument_training.train_instruments(folder / "evidence", folder / "runs", folder / "registered.toml")
    return measured


def verify(folder: Path) -> list[str]:
    file = folder / "registered.toml"
    return verify_study(folder / "evidence", file, QUESTIONS, lambda id: instruments.__name__, sentences=False)


def test_seeds_are_trained_once_and_a_changed_word_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "registered.toml").write_bytes(REGISTERED.read_bytes())
    expected = []
    for label, arm in REGISTRATION.arms.items():
        expected += [(label, seed) for seed in range(200, 200 + arm.seeds)]
    assert sorted(train_made_up(tmp_path, monkeypatch)) == sorted(expected)
    assert train_made_up(tmp_path, monkeypatch) == []
    assert verify(tmp_path) == []
    results = tmp_path / "evidence" / "results.csv"
    assert set(pd.read_csv(results)["word"]) <= {"gain", "gain below m", "no cost", "no headroom", "open"}
    results.write_text(results.read_text("utf-8").replace("gain", "loss"), "utf-8")
    assert verify(tmp_path)


def test_an_arm_that_differs_from_the_registered_one_is_not_trained(tmp_path: Path) -> None:
    content = REGISTERED.read_text("utf-8").replace(REGISTRATION.arms[TEACHER].hash, "sha256:0")
    (tmp_path / "registered.toml").write_text(content, "utf-8")
    with pytest.raises(ValueError, match="hash must be sha256:0"):
        instrument_training.train_instruments(tmp_path / "evidence", tmp_path, tmp_path / "registered.toml")
