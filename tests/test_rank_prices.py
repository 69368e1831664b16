"""Verdicts, direction counts, tables and the track record of prices from worked numbers, without a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lorascope.analysis.gradient_signal import ModuleSignal, count_directions, signal_p, smallest_signal, total_inside
from lorascope.analysis.rank_prices import (
    MODULES,
    RUNS,
    CutPrice,
    Evidence,
    Price,
    components_within,
    count_unused,
    judge_rank,
    rows_for_verdict,
    tabulate_prices,
)
from lorascope.analysis.seed_intervals import Estimate
from lorascope.analysis.track_record import add_entries, conformal_bounds, read_residuals
from lorascope.plots import price as draw_price
from lorascope.runs.receipt import Receipt

BLOCKS = 20
TOLERANCE = 0.01


def estimate(mean: float, error: float = 0.001) -> Estimate:
    return Estimate(mean, 200, ((error, 199.0),))


def noise(seed: int, modules: int, directions: int = 6, mean: float = 0.0) -> dict[str, ModuleSignal]:
    rng = np.random.default_rng(seed)
    signals = {}
    for number in range(modules):
        halves = tuple(rng.normal(mean, 1, (BLOCKS, directions)) for _ in range(2))
        values = tuple(rng.normal(mean, 1, BLOCKS) for _ in range(2))
        signals[f"m{number}"] = ModuleSignal(halves, values, values)
    return signals


def test_directions_without_signal_are_rarely_counted() -> None:
    """In 200 adapters of 28 modules without signal, at most 5% have a direction in one half; a count needs both."""
    assert sum(any(count_directions(noise(seed, 28)).values()) for seed in range(200)) <= 2


def test_directions_count_if_both_halves_have_them() -> None:
    signals = noise(0, 3, mean=-1.0)
    strong = noise(1, 1, mean=4.0)["m0"]
    assert count_directions(signals | {"m1": strong}) == {"m0": 0, "m1": 6, "m2": 0}
    half = replace(strong, projections=(strong.projections[0], signals["m1"].projections[1]))
    assert count_directions(signals | {"m1": half})["m1"] == 0


def test_one_direction_has_the_p_value_of_scipys_t_test() -> None:
    values = np.random.default_rng(3).normal(0.4, 1, BLOCKS)
    p = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    assert signal_p([values, -np.abs(values)]) == pytest.approx(2 * p)


def test_signal_is_unbiased_for_the_squared_norm_of_the_mean() -> None:
    """The inner product of two independent means has the squared norm as its mean, and 0 without a signal."""
    rng = np.random.default_rng(4)
    for size in (0.0, 0.5):
        estimates = []
        for _ in range(400):
            M = rng.normal(size, 1, (2 * BLOCKS, 30))
            outside = M[:BLOCKS] @ M[BLOCKS:].mean(0), M[BLOCKS:] @ M[:BLOCKS].mean(0)
            signal = ModuleSignal((np.zeros((BLOCKS, 0)),) * 2, outside, outside)
            assert signal.signal == pytest.approx(float(outside[1].mean()))
            estimates.append(signal.signal)
        expected = 30 * size**2
        assert abs(np.mean(estimates) - expected) < 3 * np.std(estimates) / math.sqrt(400)


def test_reach_is_the_fraction_inside() -> None:
    ones = np.ones(BLOCKS)
    signal = ModuleSignal((np.zeros((BLOCKS, 0)),) * 2, (ones, ones), (3 * ones, 3 * ones))
    assert signal.reach == 0.75
    assert replace(signal, outside=(-ones, -ones)).reach == 1.0
    assert math.isnan(replace(signal, inside=(-ones, -ones)).reach)


def test_total_inside_adds_modules_block_by_block() -> None:
    signals = noise(5, 4)
    for half, values in enumerate(total_inside(signals)):
        np.testing.assert_allclose(values, sum(signal.inside[half] for signal in signals.values()))
    assert smallest_signal(signals) == pytest.approx(stats.t.ppf(1 - 0.05 / 24, BLOCKS - 1) ** 2 / BLOCKS, rel=0.3)


def test_unused_components_have_less_than_an_even_share() -> None:
    rng = np.random.default_rng(6)
    counts = np.full(10, 100.0)
    shares = {"a": rng.normal([50.0, 20.0, 0.0], 1, (10, 3)), "b": rng.normal([0.0, 0.0], 1, (10, 2))}
    shares["b"][:, 1] = rng.normal(0, 100, 10)  # too noisy to be called unused
    assert count_unused(shares, counts) == {"a": 1, "b": 1}


def test_components_within_a_budget_are_the_largest() -> None:
    sigma = {"a": np.array([5.0, 1.0]), "b": np.array([4.0, 3.0, 1.0])}
    assert components_within(sigma, 3) == {"a": 1, "b": 2}
    assert components_within(sigma, 4) == {"a": 2, "b": 2}  # of equal ones, the first
    with pytest.raises(ValueError, match="budget must be a number of components from 1 to 5, got 6"):
        components_within(sigma, 6)


SHORT = Evidence(
    retrained=[], half=estimate(0.05), directions=7, control=0, doubled=2, inside_p=0.001
)  # fmt: skip


def test_every_verdict_has_its_condition() -> None:
    cheap, unsure = estimate(0.002), estimate(0.009, 0.01)
    assert judge_rank(SHORT, TOLERANCE) == "short"
    assert judge_rank(SHORT._replace(half=cheap), TOLERANCE) == "wasteful"
    assert judge_rank(SHORT._replace(half=unsure), TOLERANCE) == "short"
    assert judge_rank(SHORT._replace(half=cheap, retrained=[estimate(0.05), cheap]), TOLERANCE) == "enough"
    assert judge_rank(SHORT._replace(doubled=None), TOLERANCE) == "not finished"
    assert judge_rank(SHORT._replace(doubled=7), TOLERANCE) == "not finished"
    assert judge_rank(SHORT._replace(doubled=None, inside_p=0.2), TOLERANCE) == "undecided"


def test_control_with_directions_forbids_verdicts_from_gradients() -> None:
    assert judge_rank(SHORT._replace(control=1), TOLERANCE) == "undecided"
    assert judge_rank(SHORT._replace(control=1, half=estimate(0.002)), TOLERANCE) == "wasteful"


def test_rows_for_a_verdict_are_those_that_take_the_interval_to_the_tolerance() -> None:
    assert rows_for_verdict(estimate(0.008, 0.002), TOLERANCE, 200) == math.ceil(200 * 1.96**2)
    assert rows_for_verdict(estimate(TOLERANCE), TOLERANCE, 200) == math.inf


CUTS = [
    CutPrice(1, 4, 400, estimate(0.2)),
    CutPrice(2, 8, 800, estimate(0.05), estimate(-0.01)),
    CutPrice(8, 32, 3200, None),
    CutPrice(None, 6, 600, estimate(0.1)),
]


def test_table_has_a_row_per_cut_and_rate() -> None:
    runs = pd.DataFrame(
        [(2, 0, 0.1, seed, 1.0, change) for seed, change in enumerate((0.01, 0.02, 0.03))], columns=RUNS
    )
    placed = runs.assign(placed=1, change=-1.0)  # not among those of the rank
    runs = pd.concat([runs, runs.assign(lr=0.3, change=0.05), placed], ignore_index=True)
    table = tabulate_prices(CUTS, runs)
    assert table["rank"].to_list()[:4] == [1, 2, 2, 8]
    assert table["components"].to_list() == [4, 8, 8, 32, 6]
    retrained = table[table["seeds"] == 3].set_index("lr")
    low, high = stats.t.interval(0.95, 2, 0.02, 0.01 / math.sqrt(3))
    assert retrained.loc[0.1, "retrained_low"] == pytest.approx(low)
    assert retrained.loc[0.1, "retrained_high"] == pytest.approx(high)
    assert retrained.loc[0.3, ["retrained", "retrained_low"]].to_list() == pytest.approx([0.05, 0.05])
    assert table["cut"].isna().to_list() == [False, False, False, True, False]
    assert table.loc[1, "cut_high"] == pytest.approx(0.05 + 0.001 * stats.t.ppf(0.975, 199))


def made_price(**changes: Any) -> Price:
    modules = pd.DataFrame(
        [("a", 4, "ffn_in", 4, 0, 2.0, 0.001, 5, 0, 0.4), ("b", 0, "q", 4, 3, 0.1, 0.4, 2, 0, 0.9)], columns=MODULES
    )
    fields: dict[str, Any] = {
        "label": "runs/lora",
        "rank": 4,
        "table": tabulate_prices(CUTS, pd.DataFrame(columns=RUNS)),
        "modules": modules,
        "runs": pd.DataFrame(columns=RUNS),
        "sigma": {"a": np.ones(4), "b": np.ones(4)},
        "verdict": "undecided",
        "tolerance": TOLERANCE,
        "rows_needed": 900.0,
        "smallest_signal": 0.25,
        "residuals": np.zeros(0),
        "next_command": "lorascope price runs/lora --ranks 2 --retrain 3",
        "next_cost": "9 runs, about 19 minutes",
        "receipt": Receipt(run="abc", base="minilm", rows={"task": "192 rows 5f2a1c"}),
    }
    return Price(**fields | changes)


def test_printed_form() -> None:
    lines = repr(made_price()).splitlines()
    assert lines[:8] == [
        "runs/lora: undecided, tolerance 0.01 nats; about 900 rows would decide on rank 2",
        "rank 4 -> 1    cut now +0.200 nats [0.198, 0.202]   after retraining: not measured",
        "rank 4 -> 2    cut now +0.050 nats [0.048, 0.052]   after retraining: not measured",
        "rank 4 -> 8    cannot cut to a larger rank          after retraining: not measured",
        "6 components   cut now +0.100 nats [0.098, 0.102]   after retraining: not measured",
        "placed by size the 8 largest components instead of rank 2: -0.010 nats [-0.012, -0.008]",
        "beyond rank 4  signal in 7 directions; 0 with drawn labels (control); largest in layer 4 ffn_in",
        "next           lorascope price runs/lora --ranks 2 --retrain 3",
    ]
    assert lines[8].strip() == "9 runs, about 19 minutes"
    assert "do not cover the seed" in lines[9]
    assert lines[10].startswith("receipt        run abc, task 192 rows 5f2a1c")
    nothing = made_price(modules=made_price().modules.assign(directions=0), verdict="wasteful", rows_needed=math.nan)
    assert "signal in 0 directions; 0 with drawn labels (control); one above 0.25 would" in repr(nothing)
    assert repr(nothing).startswith("runs/lora: wasteful, tolerance 0.01 nats\n")


def test_a_cell_is_hatched_if_the_control_found_directions_in_one_of_its_modules() -> None:
    modules = pd.DataFrame(
        [
            ("encoder.a", 4, "q", 4, 0, 2.0, 0.001, 5, 0, 0.4),
            ("decoder.a", 4, "q", 4, 0, 1.0, 0.001, 5, 2, 0.4),
            ("b", 0, "q", 4, 3, 0.1, 0.4, 2, 0, 0.9),
        ],
        columns=MODULES,
    )
    chart = draw_price(made_price(modules=modules)).panels[1]
    signals = chart.data.set_index("layer")["signal"]
    assert np.isnan(signals["4"])  # the signal of the other module has no cell of its own
    assert signals["0"] == 0.1
    assert "Hatched: the control found directions in 1 of 2 cells" in chart.caption
    assert "Hatched" not in draw_price(made_price()).panels[1].caption


def test_a_map_without_directions_says_what_would_have_been_found_and_is_pale() -> None:
    quiet = made_price(modules=made_price().modules.assign(directions=0, signal=[0.01, -0.02]))
    chart = draw_price(quiet).panels[1]
    assert chart.caption.startswith("0 directions beyond the rank, 0 with drawn labels (control). Nothing was found: ")
    assert "a squared gradient above 0.25 along one direction would have been" in chart.caption
    (heat,) = chart.marks
    assert heat.limits == (-0.25, 0.25)
    (heat,) = draw_price(made_price()).panels[1].marks
    assert heat.limits is None


def test_placement_compares_each_at_its_better_rate() -> None:
    losses = {
        (0, 0.1): (1.0, 1.1, 1.2),
        (0, 0.3): (2.0, 2.0, 2.0),
        (1, 0.1): (3.0, 3.0, 3.0),
        (1, 0.3): (0.9, 1.2, 1.2),
    }
    rows = []
    for (placed, lr), values in losses.items():
        rows += [(2, placed, lr, seed, value, 0.0) for seed, value in enumerate(values)]
    price = made_price(runs=pd.DataFrame(rows, columns=RUNS))
    placement = price.placement(2)
    assert placement is not None
    expected = stats.ttest_rel(losses[1, 0.3], losses[0, 0.1]).confidence_interval(0.95)
    assert placement.interval(0.025)[1:3] == pytest.approx(tuple(expected))
    assert price.placement(1) is None


def test_interval_after_retraining_is_printed_from_39_cells_on() -> None:
    residuals = np.linspace(-0.05, 0.03, 39)
    assert "conformal" not in repr(made_price(residuals=residuals[1:]))
    text = repr(made_price(residuals=residuals))
    assert "after retraining: +0.150 to +0.230 nats expected (conformal, 95%, 39 cells)" in text
    assert text.count("conformal") == 2  # neither for a larger rank nor for a budget


def test_conformal_bounds_contain_a_further_cell_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(4000):
        *residuals, further = rng.standard_cauchy(40)
        bounds = conformal_bounds(np.array(residuals))
        inside += bounds.low <= further <= bounds.high
    assert bounds.coverage == pytest.approx(0.95)
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)
    assert conformal_bounds(np.arange(79.0)) == (1.0, 77.0, 0.95)
    with pytest.raises(ValueError, match="residuals must be of at least 39 cells, got 38"):
        conformal_bounds(np.zeros(38))


ENTRY = {"run": "a", "task": "t", "base": "b", "rank": 8, "to": 4, "seeds": 3, "cut": 0.5, "retrained": 0.3}


def test_record_has_one_residual_per_cell(tmp_path: Path) -> None:
    record = tmp_path / "prices.jsonl"
    assert len(read_residuals(record, "z")) == 0
    add_entries(record, [ENTRY, ENTRY | {"to": 2, "retrained": 0.6}, ENTRY | {"to": 1, "seeds": 2}])
    add_entries(record, [ENTRY, ENTRY | {"run": "c", "retrained": 0.4}])
    assert len(record.read_text().splitlines()) == 4  # a repeated measurement is not added
    np.testing.assert_allclose(read_residuals(record, "z"), [-0.1, 0.1])  # the last run of a cell
    np.testing.assert_allclose(read_residuals(record, "c"), [-0.2, 0.1])
    assert len(read_residuals(record, "a")) == 1
    record.write_text(json.dumps(ENTRY) + "\n[1]\n")
    with pytest.raises(ValueError, match="line 2 is not an entry of a track record"):
        read_residuals(record, "z")
