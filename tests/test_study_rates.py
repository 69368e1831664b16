"""Choice of learning rates and of numbers of seeds of the second edition, and its registration."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_up_study import comparisons, registration

from lorascope.papers.judging import registered_study
from lorascope.papers.judging.kept_study import STUDY_COLUMNS
from lorascope.papers.judging.study_rates import (
    RateChoice,
    RateScore,
    choose_safe_rate,
    chosen_rates,
    grid_rate,
    number_of_seeds,
    planned_seeds,
    rate_table,
    tuned_evidence,
    tuning_scores,
)

A, B, C, D, E, F, G = 1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2, 1.8e-2, 3.2e-2


def test_grid_has_four_rates_per_decade() -> None:
    assert [grid_rate(A, steps) for steps in range(-1, 7)] == [5.6e-4, A, B, C, D, E, F, G]
    assert grid_rate(F, -3) == C


def gaps(**by_name: float) -> dict[float, RateScore]:
    """Return scores by the names of rates; a negative one marks a rate at which a seed does not learn."""
    return {globals()[name]: RateScore(abs(gap), gap > 0) for name, gap in by_name.items()}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        (gaps(), RateChoice((B, C, D))),
        (gaps(B=0.3, D=0.4), RateChoice((C,))),
        # The best one is inside, and the next higher one is trained.
        (gaps(B=0.3, C=0.2, D=0.4), RateChoice((), C)),
        (gaps(B=0.3, C=0.2, D=-0.9), RateChoice((A,))),
        # C fails the rule of the next higher rate, so B is best, and at the lower end.
        (gaps(A=0.4, B=0.3, C=0.2, D=-0.9), RateChoice((), B)),
        # The best one is the highest: its next higher one is trained, then tried.
        (gaps(B=0.3, C=0.2, D=0.1), RateChoice((E,))),
        (gaps(B=0.3, C=0.2, D=0.1, E=-0.9), RateChoice((), C)),
        (gaps(B=0.3, C=0.2, D=0.1, E=0.2), RateChoice((), D)),
        (gaps(B=0.3, C=0.2, D=0.1, E=0.05), RateChoice((F,))),
        (gaps(B=0.3, C=0.2, D=0.1, E=0.05, F=-1.0), RateChoice((), D)),
    ],
)  # fmt: skip
def test_choice_by_hand(scores: dict[float, RateScore], expected: RateChoice) -> None:
    assert choose_safe_rate([B, C, D], scores) == expected


def test_three_rates_are_added_at_most() -> None:
    lower = [grid_rate(B, -step) for step in (1, 2, 3)]
    scores = gaps(B=0.5, C=0.6, D=0.7) | {rate: RateScore(0.4 - 0.1 * i, True) for i, rate in enumerate(lower)}
    assert choose_safe_rate([B, C, D], scores) == RateChoice((), lower[-1], at_end=True)
    failing = dict.fromkeys([*lower, B, C, D], RateScore(0.1, False))
    assert choose_safe_rate([B, C, D], failing) == RateChoice((), None, at_end=True)
    assert choose_safe_rate([B], {}) == RateChoice((), B)


def tuning_runs(arm: str, gaps_by_rate: dict[float, list[float]]) -> pd.DataFrame:
    """Return the rows of tuning runs with these gaps by seed, of a base gap of 1."""
    rows = []
    for rate, values in gaps_by_rate.items():
        for number, gap in enumerate(values):
            row = dict.fromkeys(STUDY_COLUMNS, np.nan) | {"phase": "", "task": "", "role": "tuning", "base_gap": 1.0}
            rows.append(
                row | {"arm": arm, "seed": 9001 + number, "rate": rate, "gap": gap, "run": f"{arm}{rate}{number}"}
            )
    return pd.DataFrame(rows)


def test_scores_need_all_seeds_and_a_diverged_one_is_worst() -> None:
    runs = tuning_runs("x", {A: [0.1, 0.2, 0.3], B: [0.1, 0.2], C: [0.1, 0.2, math.nan], D: [0.1, 0.2, 0.9]})
    scores = tuning_scores(runs, "x")
    assert scores.keys() == {A, C, D}
    assert scores[A].gap == pytest.approx(0.2)
    assert scores[A].learned
    assert scores[C] == RateScore(math.inf, False)
    assert not scores[D].learned
    # An earlier phase that does not learn makes the rate unsafe, but has no part in the gap.
    search = runs[(runs["rate"] == A) & (runs["seed"] == 9001)].assign(phase="search", gap=0.95)
    assert tuning_scores(pd.concat([runs, search]), "x")[A] == RateScore(scores[A].gap, False)
    text = runs.assign(gap=math.nan, base_gap=math.nan, loss=runs["gap"], accuracy=0.8, majority=0.5)
    assert tuning_scores(text, "x")[A].gap == pytest.approx(0.2)


def test_arms_with_one_part_changed_inherit_the_rate() -> None:
    registered = registration()
    arms = dict(registered.arms)
    first, second = "AdaLoRA, uneven", "AdaLoRA, even"
    arms[first] = registered_study.StudyArm(first, rates=(B, C, D))
    arms[second] = registered_study.StudyArm(second, rate_of=first)
    registered = registered_study.StudyRegistration(arms, registered.claims)
    runs = tuning_runs(first, {B: [0.3] * 3, C: [0.2] * 3, D: [0.4] * 3})
    choices = chosen_rates(registered, runs)
    assert choices[first] == choices[second] == RateChoice((), C)
    table = rate_table(registered, runs)
    assert table[table["chosen"]][["arm", "rate"]].to_numpy().tolist() == [[first, C]]


def test_tuned_runs_can_be_compared() -> None:
    from lorascope.papers.judging.kept_study import StudyEvidence
    from lorascope.papers.judging.study_statistics import GapClosed

    runs = pd.concat([tuning_runs("x", {A: [0.1, 0.2, 0.3], B: [0.5] * 3}), tuning_runs("y", {B: [0.4] * 3})])
    evidence = tuned_evidence(StudyEvidence(runs.reset_index(drop=True)), {"x": A, "y": B})
    effects = (GapClosed("x") - GapClosed("y"))(evidence, (9001, 9002, 9003))
    np.testing.assert_allclose(effects, [30, 20, 10])


def test_seeds_are_planned_from_the_effect_at_the_chosen_rates() -> None:
    from lorascope.papers.judging.kept_study import StudyEvidence

    comparison = comparisons()["gain"]
    registered = registration({"gain": comparison})
    arms = dict(registered.arms)
    first, second = "AdaLoRA, uneven", "LoRA, uneven"
    for label in (first, second):
        arms[label] = registered_study.StudyArm(label, rates=(B, C, D))
    registered = registered_study.StudyRegistration(arms, registered.claims)
    others = {B: [0.5] * 3, D: [0.5] * 3}
    runs = [tuning_runs(first, {C: [0.10, 0.12, 0.14], **others}), tuning_runs(second, {C: [0.2] * 3, **others})]
    evidence = StudyEvidence(pd.concat(runs, ignore_index=True))
    # The effects are 10, 8 and 6 points, so their deviation is 2 and the bound 2.
    assert planned_seeds(registered, {"gain": comparison}, evidence) == {"gain": 40}
    without = StudyEvidence(runs[0])
    assert planned_seeds(registered, {"gain": comparison}, without) == {}


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [
        # 2.1314 * 1.5 * sd / 4 < 1 for sd < 1.2511; 40 seeds give 2.0227 * 1.5 * sd / 6.3246, so sd < 2.0845.
        (1.25, 16), (1.26, 24), (1.84, 32), (2.08, 40), (9.0, 40)
    ],
)  # fmt: skip
def test_number_of_seeds_by_hand(deviation: float, expected: int) -> None:
    assert number_of_seeds([5 - deviation, 5, 5 + deviation], bound=2.0) == expected


REGISTRATION = """
edition = 2
judging = "sha256:1"
[[arm]]
label = "AdaLoRA, uneven"
rates = [1.8e-2, 3.2e-2, 5.6e-2]
seeds = 16
[[arm]]
label = "LoRA, uneven"
rate_of = "AdaLoRA, uneven"
[[claim]]
id = "pair.adalora"
sentence = "It is better."
paper = { arxiv = "2303.10512", place = "table 1", printed = 0.81, printed_unit = "points of accuracy" }
rule = { kind = "gain", bound = 2.0, unit = "points of the gap", seeds = 16, headline = true }
for = ["AdaLoRA, uneven", "LoRA, uneven"]
"""


def test_arms_of_figures_are_read_with_the_registration(tmp_path: Path) -> None:
    file, figures = tmp_path / "registered-2.toml", tmp_path / registered_study.FIGURE_ARMS
    file.write_text(REGISTRATION)
    text = 'edition = 2\n[[arm]]\nlabel = "LoRA, rank 1"\nrate_of = "LoRA, uneven"\nseeds = 3\n'
    figures.write_text(text)
    arms = registered_study.read(file).arms
    assert (arms["LoRA, rank 1"].seeds, arms["LoRA, rank 1"].rate_of) == (3, "LoRA, uneven")
    for before, after, message in (
        ("LoRA, uneven", "LoRA, unevn", "unevn"),
        ("LoRA, rank 1", "LoRA, uneven", "twice"),
        ("= 3", "= ", registered_study.FIGURE_ARMS),
    ):
        figures.write_text(text.replace(before, after, 1))
        with pytest.raises(ValueError, match=message):
            registered_study.read(file)


def test_registration_is_read(tmp_path: Path) -> None:
    file = tmp_path / "registered-2.toml"
    file.write_text(REGISTRATION)
    registered = registered_study.read(file)
    claim = registered.claims["pair.adalora"]
    assert claim.for_arms == ("AdaLoRA, uneven", "LoRA, uneven")
    assert (claim.rule.bound, claim.rule.headline, claim.paper.printed) == (2.0, True, 0.81)
    assert registered.arms["AdaLoRA, uneven"].rates == (1.8e-2, 3.2e-2, 5.6e-2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("bound = 2.0", "bound = -2.0", "bound"),
        ('kind = "gain"', 'kind = "win"', "kind"),
        ("headline", "headlin", "headlin"),
        ('"LoRA, uneven"]', '"LoRA, unevn"]', "unevn"),
        ('rate_of = "AdaLoRA, uneven"', "seeds = 16", "rate_of"),
        ("1.8e-2, 3.2e-2", "3.2e-2, 1.8e-2", "increasing"),
        ('"LoRA, uneven"\nrate', '"AdaLoRA, uneven"\nrate', "twice"),
        ("edition = 2", "edition = ", "registered-2.toml"),
    ],
)
def test_a_wrong_registration_is_rejected(tmp_path: Path, before: str, after: str, message: str) -> None:
    file = tmp_path / "registered-2.toml"
    assert before in REGISTRATION
    file.write_text(REGISTRATION.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        registered_study.read(file)
