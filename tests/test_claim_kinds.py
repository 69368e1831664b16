"""Kinds of claims and looks: the table of outcomes, agreement with intervals, and the error over all looks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from lorascope.analysis.seed_intervals import Estimate, t_estimate, two_way_estimate
from lorascope.papers.judging.claims import Claim, format_effect, side
from lorascope.papers.judging.looks import ERROR, STOPPED, Looks, judge_at_looks

TEXT: Any = {"id": "a.b"}
S = Claim(**TEXT, kind="superiority", margin=1.0)
N = Claim(**TEXT, kind="non-inferiority", tolerance=1.0)
E = Claim(**TEXT, kind="equivalence", tolerance=1.0)
L3, L2, F5 = Looks((5, 10, 20), (0.005, 0.0075, 0.015)), Looks((5, 10), (0.005, 0.0215)), Looks((5,), (0.025,))


def spread(low: float, high: float, level: float = ERROR) -> Estimate:
    """Return an estimate of 5 seeds with this interval at the level."""
    half = (high - low) / 2
    return Estimate((low + high) / 2, 5, ((half / scipy.stats.t.ppf(1 - level, 4), 4.0),))


@pytest.mark.parametrize(
    ("low", "high", "superiority", "non_inferiority", "equivalence"),
    [
        (1.2, 2.0, "supported", "supported", "not supported"),
        (0.2, 0.8, "not supported", "supported", "supported"),
        (0.5, 1.5, "inconclusive", "supported", "inconclusive"),
        (-0.8, -0.2, "not supported", "supported", "supported"),
        (-0.8, 1.3, "inconclusive", "supported", "inconclusive"),
        (-1.5, 0.5, "not supported", "inconclusive", "inconclusive"),
        (-1.5, 1.5, "inconclusive", "inconclusive", "inconclusive"),
        (-2.0, -1.2, "not supported", "not supported", "not supported"),
    ],
)
@pytest.mark.parametrize("level", [0.005, 0.0215, 0.025])
def test_outcome_follows_from_where_the_interval_lies(
    low: float, high: float, superiority: str, non_inferiority: str, equivalence: str, level: float
) -> None:
    effect = spread(low, high, level)
    assert [claim.outcome(effect, level) for claim in (S, N, E)] == [superiority, non_inferiority, equivalence]


def test_two_seeds_decide_nothing_and_three_may() -> None:
    assert S.outcome(t_estimate(np.array([9.0, 9.001])), ERROR) == "inconclusive"
    assert S.outcome(t_estimate(np.array([9.0, 9.001, 9.002])), ERROR) == "supported"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "superiority"}, "margin must be a finite number > 0, got None: claim a.b"),
        ({"kind": "superiority", "margin": 0.0}, "margin must be a finite number > 0, got 0.0: claim a.b"),
        ({"kind": "superiority", "margin": math.inf}, "margin must be a finite number > 0, got inf: claim a.b"),
        ({"kind": "superiority", "margin": math.nan}, "margin must be a finite number > 0, got nan: claim a.b"),
        (
            {"kind": "superiority", "margin": 1.0, "tolerance": 1.0},
            "tolerance must be left out of a claim of superiority",
        ),
        ({"kind": "equivalence", "margin": 1.0}, "margin must be left out of a claim of equivalence"),
        ({"kind": "non-inferiority"}, "tolerance must be a finite number > 0, got None: claim a.b"),
        (
            {"kind": "parity", "margin": 1.0},
            "kind must be one of superiority, non-inferiority, equivalence, got 'parity'",
        ),
    ],
)
def test_claim_refuses_other_bounds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        Claim(**TEXT, **arguments)


def test_p_is_twice_the_smaller_tail_and_agrees_with_the_outcome() -> None:
    values = np.array([1.1, 1.9, 1.4, 1.2, 1.6])
    for claim, bound, alternative in ((S, 1.0, "greater"), (N, -1.0, "greater")):
        tail = scipy.stats.ttest_1samp(values, bound, alternative=alternative).pvalue
        assert claim.p(t_estimate(values)) == pytest.approx(2 * tail)
    assert E.p(t_estimate(values)) == pytest.approx(
        2 * scipy.stats.ttest_1samp(values, 1.0, alternative="greater").pvalue
    )
    # Equivalence needs both tests, so its p-value is the larger of the two.
    inside = np.array([0.1, 0.3, -0.1, 0.4, 0.2])
    tails = [scipy.stats.ttest_1samp(inside, b, alternative=a).pvalue for b, a in ((-1, "greater"), (1, "less"))]
    assert E.p(t_estimate(inside)) == pytest.approx(2 * max(tails))
    rng = np.random.default_rng(0)
    for _ in range(300):
        effect = t_estimate(rng.normal(rng.uniform(-2, 2), rng.uniform(0.1, 1), 5))
        for claim in (S, N, E):
            assert (claim.outcome(effect, ERROR) != "inconclusive") == (claim.p(effect) < 2 * ERROR)


def test_side_tells_where_the_interval_lies() -> None:
    assert [side(*ends) for ends in ((0.1, 0.4), (-0.4, -0.1), (-0.1, 0.4))] == [
        "above 0",
        "below 0",
        "",
    ]


@pytest.mark.parametrize(
    ("effect", "low", "high", "text"),
    [
        (0.0112, 0.00412, 0.01831, "0.0112 [0.00412, 0.0183]"),
        (1.5, 1.00004, 2.0, "1.50000 [1.00004, 2.00000]"),  # just above the bound of 1
        (1.2, 0.999_96, 1.4, "1.2000 [0.99996, 1.4000]"),
        (0.5, 1e-9, 0.9, "0.500 [1.00e-09, 0.900]"),
        (0.5, math.nan, math.nan, "0.500 [no interval]"),
        (1.5, 1.0, 2.0, "1.50 [1.00, 2.00]"),
        (0.1195, 0.0589, 0.1802, "0.119 [0.0589, 0.180]"),
        (100.0, 99.96, 1234.5, "100 [100, 1234]"),
        (-12345.0, -23456.0, 0.0, "-12345 [-23456, 0.00]"),
    ],
)
def test_numbers_show_on_which_side_of_the_bound_they_lie(effect: float, low: float, high: float, text: str) -> None:
    assert format_effect(S, effect, low, high) == text


def looks_at(values: np.ndarray) -> Any:
    return lambda n: t_estimate(values[:n])


def test_claim_ends_at_the_first_look_that_decides() -> None:
    clear = np.array([2.0, 2.1, 1.9, 2.05, 1.95, *[-50.0] * 15])
    verdict = judge_at_looks(S, L3, looks_at(clear), 20)
    assert (verdict.outcome, verdict.look, verdict.effect.n, verdict.level) == ("supported", 1, 5, 0.005)
    low, high = scipy.stats.t.interval(0.99, 4, clear[:5].mean(), scipy.stats.sem(clear[:5]))
    assert (verdict.effect.low, verdict.effect.high) == pytest.approx((low, high))
    assert verdict.p_looks == pytest.approx(5 * verdict.p)


def test_verdict_has_the_degrees_of_freedom_and_the_half_widths_over_seeds_and_over_rows() -> None:
    table, clusters = np.array([[1.0, 0, -1, 0], [1, 1, 0, 0], [0, 0, 0, 1]]), np.array([0, 0, 1, 2])
    crossed = two_way_estimate(table, clusters)  # of worked variances: 43/768 over rows and in all, 1/48 over seeds
    verdict = judge_at_looks(S, L2, lambda n: replace(crossed, n=n), 5)
    assert verdict.half_seed == pytest.approx(scipy.stats.t.ppf(1 - verdict.level, 2) / 48**0.5, rel=1e-12)
    assert verdict.effect.high - verdict.effect.mean == pytest.approx(verdict.half_seed * (43 / 16) ** 0.5, rel=1e-12)
    assert verdict.half_row == pytest.approx(scipy.stats.t.ppf(1 - verdict.level, 2) * (43 / 768) ** 0.5, rel=1e-12)
    assert math.isnan(judge_at_looks(S, L2, looks_at(np.array([2.0, 2.1, 1.9, 2.05, 1.95])), 5).half_row)
    assert judge_at_looks(S, L2, lambda n: Estimate(0.25, n, ((0.3, 7.5), (0.2, 4.0))), 5).degrees == 7.5


def test_undecided_claim_goes_on_to_its_last_look_and_stays_inconclusive() -> None:
    undecided = np.tile([0.0, 2.0], 10)
    verdict = judge_at_looks(S, L3, looks_at(undecided), 20)
    assert (verdict.outcome, verdict.look, verdict.effect.n, verdict.note) == ("inconclusive", 3, 20, "")
    part = judge_at_looks(S, L3, looks_at(undecided), 14)
    assert (part.outcome, part.look, part.effect.n, part.note) == ("inconclusive", 2, 10, STOPPED)


def test_seeds_beyond_the_look_are_not_read() -> None:
    asked: list[int] = []

    def estimate(n: int) -> Estimate:
        asked.append(n)
        return t_estimate(np.tile([0.0, 2.0], 10)[:n])

    judge_at_looks(S, L2, estimate, 9)
    assert asked == [5]


@pytest.mark.parametrize(("looks", "error"), [(L3, 0.0242), (L2, 0.0248), (F5, 0.025)])
def test_error_of_all_looks_together(looks: Looks, error: float) -> None:
    # At the margin's edge "supported" is an error. The share of 200,000 has a standard error of 0.00035.
    values = np.random.default_rng(1).normal(1.0, 1.0, (200_000, max(looks.seeds)))
    supported, open_ = np.zeros(len(values), bool), np.ones(len(values), bool)
    for n, level in zip(looks.seeds, looks.levels, strict=True):
        part = values[:, :n]
        t = (part.mean(1) - 1) / (part.std(1, ddof=1) / np.sqrt(n))
        limit = scipy.stats.t.ppf(1 - level, n - 1)
        supported |= open_ & (t > limit)
        open_ &= np.abs(t) <= limit
    assert supported.mean() == pytest.approx(error, abs=4 * 0.00035)
    verdicts = [judge_at_looks(S, looks, looks_at(row), len(row)).outcome == "supported" for row in values[:300]]
    assert verdicts == supported[:300].tolist()


def test_looks_of_other_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"looks must be .*, got \[5, 7\] at \[0.025, 0.025\]"):
        Looks((5, 7), (0.025, 0.025))
