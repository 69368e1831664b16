"""Choice of learning rates: by hand-made losses."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorascope.papers.judging.learning_rates import Choice, choose_rate, losses_by_rate, tuning_table

GRID = (3e-5, 1e-4, 3e-4)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, Choice(GRID)),
        ({3e-5: 1.0, 3e-4: 1.0}, Choice((1e-4,))),
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: 0.6}, Choice((), 1e-4)),
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: 0.4}, Choice((), 1e-4)),  # a tie goes to the smaller rate
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: 0.3}, Choice((1e-3,))),
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: 0.3, 1e-3: 0.9}, Choice((), 3e-4)),
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: 0.3, 1e-3: 0.2}, Choice((3e-3,))),
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: 0.3, 1e-3: 0.2, 3e-3: 0.1}, Choice((), 3e-3, at_end=True)),
        ({3e-5: 0.1, 1e-4: 0.4, 3e-4: 0.6}, Choice((1e-5,))),
        ({3e-5: 0.1, 1e-4: 0.4, 3e-4: 0.6, 1e-5: 0.05}, Choice((3e-6,))),
        ({3e-5: 0.1, 1e-4: 0.4, 3e-4: 0.6, 1e-5: 0.05, 3e-6: 0.2}, Choice((), 1e-5)),
        ({3e-5: 0.5, 1e-4: 0.4, 3e-4: math.nan}, Choice((), 1e-4)),
        ({3e-5: 0.5, 1e-4: 0.6, 3e-4: math.inf, 1e-5: 0.9}, Choice((), 3e-5)),
    ],
)
def test_choice(losses: dict[float, float], expected: Choice) -> None:
    assert choose_rate(GRID, losses) == expected


def test_grids_of_half_decades_continue_by_the_same_factors() -> None:
    best_above = dict(zip((1.5e-2, 5e-2, 1.5e-1), (3.0, 2.0, 1.0), strict=True))
    assert choose_rate((1.5e-2, 5e-2, 1.5e-1), best_above).missing == (0.5,)


def runs() -> pd.DataFrame:
    rows = [
        ("A", "tuning", seed, rate, loss)
        for rate, losses in {3e-5: (0.5, 0.7), 1e-4: (0.3, 0.5), 3e-4: (0.9, np.nan)}.items()
        for seed, loss in zip((9001, 9002), losses, strict=True)
    ]
    rows += [("A", "judged", 100, 1e-4, 0.1), ("B", "tuning", 9001, 1e-4, 0.0)]
    return pd.DataFrame(rows, columns=["arm", "role", "seed", "rate", "validation_loss"])


def test_losses_are_means_over_tuning_seeds_of_complete_rates() -> None:
    assert losses_by_rate(runs(), "A", (9001, 9002)) == pytest.approx({3e-5: 0.6, 1e-4: 0.4, 3e-4: np.nan}, nan_ok=True)
    part = runs().drop(index=3)  # the rate 1e-4 of seed 9002
    assert set(losses_by_rate(part, "A", (9001, 9002))) == {3e-5, 3e-4}


def test_table_marks_the_chosen_rate() -> None:
    table = tuning_table(runs(), {"A": (GRID, (9001, 9002))})
    assert table["chosen"].tolist() == [False, False, True, True, False, False]
    assert not table["at_end_of_grid"].any()
    assert tuning_table(runs(), {}).empty
