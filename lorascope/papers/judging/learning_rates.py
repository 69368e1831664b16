"""Choice of the learning rate of each arm, before its first judged run, by the validation loss of its tuning seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lorascope.papers.judging.registration import RegisteredArm, Registration

MAX_EXTENSIONS = 2
"""Number of further rates that are tried if the best is at an end of the grid."""


@dataclass(frozen=True)
class Choice:
    """State of the choice of a learning rate: the rates still to train, or the chosen one.

    Parameters
    ----------
    missing : tuple of float
        Rates whose loss is needed before anything can be chosen; empty if a rate is chosen.
    rate : float or None
        The chosen rate.
    at_end : bool
        Whether the chosen rate is at an end of the grid, even after its extensions.
    """

    missing: tuple[float, ...]
    rate: float | None = None
    at_end: bool = False


def choose_rate(grid: Sequence[float], losses: Mapping[float, float]) -> Choice:
    """Choose the learning rate with the lowest loss; ties go to the smaller one.

    If the best rate is at an end of the grid, one further rate beyond it is tried, at most twice. A further rate is
    ten times, or a tenth of, the last rate but one, which continues a grid of factors of about three.

    Parameters
    ----------
    grid : sequence of float
        Registered rates, increasing. A single one is chosen without losses.
    losses : mapping rate -> loss
        Mean validation loss at the last step over the tuning seeds. A loss that is not finite counts as the worst.
    """
    if len(grid) == 1:
        return Choice((), grid[0])
    rates = list(grid)
    for extension in range(MAX_EXTENSIONS + 1):
        if missing := tuple(rate for rate in rates if rate not in losses):
            return Choice(missing)
        # In this order, a loss that is NaN counts as infinite.
        best = min(rates, key=lambda rate: (min(math.inf, losses[rate]), rate))
        inside = rates[0] < best < rates[-1]
        if inside or extension == MAX_EXTENSIONS:
            break
        if best == rates[-1]:
            rates.append(_round(rates[-2] * 10))
        else:
            rates.insert(0, _round(rates[1] / 10))
    return Choice((), best, not inside)


def _round(rate: float) -> float:
    # 0.0003 * 10 is 0.0029999999999999996, and runs are found by their rate.
    return float(f"{rate:.6g}")


def losses_by_rate(runs: pd.DataFrame, arm: str, seeds: Sequence[int]) -> dict[float, float]:
    """Return the mean validation loss of an arm at each learning rate that all tuning seeds have trained.

    Parameters
    ----------
    runs : DataFrame
        ``runs.csv`` of the evidence.
    arm : str
        Label of the arm.
    seeds : sequence of int
        Tuning seeds.
    """
    rows = runs[(runs["arm"] == arm) & (runs["role"] == "tuning") & runs["seed"].isin(list(seeds))]
    losses = {}
    for rate, of_rate in rows.groupby("rate"):
        if of_rate["seed"].nunique() == len(set(seeds)):
            # A seed that diverged makes the whole rate the worst, so it must not be skipped.
            losses[float(str(rate))] = float(of_rate["validation_loss"].mean(skipna=False))
    return losses


def choice_of_arm(registration: Registration, runs: pd.DataFrame, arm: str) -> tuple[RegisteredArm, Choice]:
    """Return the arm whose learning rate an arm takes, which may be itself, and the state of the choice.

    Parameters
    ----------
    registration : Registration
        Registered arms.
    runs : DataFrame
        ``runs.csv`` of the evidence.
    arm : str
        Label of an arm that has a rate.
    """
    tuned = registration.arms[registration.arms[arm].rate_of or arm]
    return tuned, choose_rate(tuned.rates, losses_by_rate(runs, tuned.label, tuned.tuning_seeds))


def tuning_table(runs: pd.DataFrame, grids: Mapping[str, tuple[Sequence[float], Sequence[int]]]) -> pd.DataFrame:
    """Tabulate the tuning runs and the chosen learning rates.

    Parameters
    ----------
    runs : DataFrame
        ``runs.csv`` of the evidence.
    grids : mapping arm -> (grid, tuning seeds)
        Registered rates and tuning seeds of the arms that are tuned.

    Returns
    -------
    DataFrame
        ``arm, rate, seed, validation_loss, at_end_of_grid, chosen``: one row per tuning run.
    """
    columns = ["arm", "rate", "seed", "validation_loss"]
    tables = []
    for arm, (grid, seeds) in grids.items():
        choice = choose_rate(grid, losses_by_rate(runs, arm, seeds))
        rows = runs.loc[(runs["arm"] == arm) & (runs["role"] == "tuning"), columns].sort_values(["rate", "seed"])
        is_chosen = rows["rate"] == choice.rate
        tables.append(rows.assign(at_end_of_grid=is_chosen & choice.at_end, chosen=is_chosen))
    return pd.concat(tables or [pd.DataFrame(columns=[*columns, "at_end_of_grid", "chosen"])], ignore_index=True)
