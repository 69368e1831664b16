"""Tests of the rule for claims: no effect is never supported, and an effect above the margin is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from lorascope.analysis.seed_intervals import band, t_interval
from lorascope.probes.claims import Claim

CLAIM = Claim(
    sentence="the embedding has a larger fraction of the norm than a random module",
    statistic="fraction of the embedding",
    control="fraction of a random module",
    margin=0.1,
)
REPETITIONS = 20


def measured(effect: float, noise: float, repetition: int, seeds: int = 3) -> tuple[dict[int, float], dict[int, float]]:
    """Draw statistic and control by seed; the part that both share within a seed is much larger than the noise."""
    rng = np.random.default_rng(repetition)
    common = rng.normal(5.0, 10.0, seeds)
    statistic = common + effect + rng.normal(0.0, noise, seeds)
    return dict(enumerate(statistic.tolist())), dict(enumerate(common.tolist()))


@pytest.mark.parametrize("noise", [0.001, 0.03, 0.1, 0.3])
def test_claim_without_effect_is_never_supported(noise: float) -> None:
    outcomes = [CLAIM.judge(*measured(0.0, noise, repetition)).outcome for repetition in range(REPETITIONS)]
    assert "supported" not in outcomes


def test_claim_without_effect_and_with_little_noise_is_not_supported() -> None:
    outcomes = {CLAIM.judge(*measured(0.0, 0.005, repetition)).outcome for repetition in range(REPETITIONS)}
    assert outcomes == {"not supported"}


def test_claim_with_effect_below_margin_is_not_supported() -> None:
    assert CLAIM.judge(*measured(0.05, 0.005, 0)).outcome == "not supported"


def test_claim_with_planted_effect_is_supported() -> None:
    outcomes = {CLAIM.judge(*measured(0.2, 0.005, repetition)).outcome for repetition in range(REPETITIONS)}
    assert outcomes == {"supported"}


def test_claim_with_interval_across_margin_is_inconclusive() -> None:
    verdict = CLAIM.judge({0: 0.0, 1: 0.1, 2: 0.2}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert verdict.outcome == "inconclusive"
    assert verdict.low < CLAIM.margin < verdict.high


@pytest.mark.parametrize("seeds", [1, 2])
def test_claim_with_fewer_than_three_seeds_is_inconclusive_with_numbers(seeds: int) -> None:
    verdict = CLAIM.judge({seed: 9.0 + seed for seed in range(seeds)}, dict.fromkeys(range(seeds), 1.0))
    assert verdict.outcome == "inconclusive"
    assert verdict.effect == np.mean([8.0, 9.0][:seeds])
    assert verdict.values["effect"].tolist() == [8.0, 9.0][:seeds]
    assert f"effect {verdict.effect:.3g}" in str(verdict)


def test_verdict_interval_equals_scipy_t_interval_of_differences() -> None:
    statistic, control = {3: 1.0, 1: 2.5, 2: 4.0}, {1: 0.5, 2: 1.0, 3: 0.25}
    verdict = CLAIM.judge(statistic, control)
    effects = [2.0, 3.0, 0.75]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(effects), scipy.stats.sem(effects))
    assert verdict.values["effect"].tolist() == effects
    assert (verdict.low, verdict.high) == pytest.approx((low, high), rel=1e-12)
    assert str(verdict) == "inconclusive: effect 1.92 [-0.884, 4.72], margin 0.1, 3 seeds"


def test_pairing_by_seed_removes_the_shared_part() -> None:
    statistic, control = measured(0.2, 0.005, 1)
    shuffled = dict(zip(control, [control[1], control[2], control[0]], strict=True))
    assert CLAIM.judge(statistic, control).outcome == "supported"
    assert CLAIM.judge(statistic, shuffled).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("statistic", "control", "reason"),
    [
        ({0: 1.0, 1: 1.0}, {0: 1.0}, r"seeds \[1\]"),
        ({}, {}, "value"),
        ({0: float("nan")}, {0: 1.0}, r"finite.*seeds \[0\]"),
    ],
)
def test_judge_with_invalid_values_raises(statistic: dict, control: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CLAIM.judge(statistic, control)


@pytest.mark.parametrize("margin", [0.0, -0.1, float("nan")])
def test_claim_with_invalid_margin_raises(margin: float) -> None:
    with pytest.raises(ValueError, match=f"margin.*got {margin}"):
        Claim(sentence="s", statistic="a", control="b", margin=margin)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_t_interval_covers_the_mean_in_95_percent_of_draws(n: int) -> None:
    rng = np.random.default_rng(n)
    intervals = [t_interval(rng.normal(1.0, 2.0, n)) for _ in range(2000)]
    covered = np.mean([interval.low < 1.0 < interval.high for interval in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_band_equals_t_interval_of_every_cell() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"layer": np.tile([7, 2, 5], 4), "value": rng.normal(size=12)})
    table = pd.concat([table, pd.DataFrame({"layer": [9], "value": [4.0]})])
    found = band(table, ["layer"]).set_index("layer")
    assert found.index.tolist() == [7, 2, 5, 9]
    for layer in (7, 2, 5):
        interval = t_interval(table.loc[table["layer"] == layer, "value"].to_numpy())
        assert tuple(found.loc[layer]) == pytest.approx(tuple(interval), rel=1e-12)
    assert found.loc[9, "value"] == 4.0
    assert np.isnan(found.loc[9, ["low", "high"]].to_numpy()).all()
