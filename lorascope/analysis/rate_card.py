"""Rate card: the learning rate for each rank, from the runs of a sweep, and the edge of stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorascope.analysis.norms import last_recorded
from lorascope.analysis.seed_intervals import MINIMUM_SEEDS, t_interval
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.result import Result


def rate_card(runs: Sequence[Result]) -> pd.DataFrame:
    """Return the best learning rate of each rank, with the rates that are not worse, and the edge of stability.

    Rates are compared by the final validation loss, paired by seed: a rate is not worse than the best one if the 95%
    t-interval of the difference includes 0. The edge of stability is the largest rate at which no run diverged, of
    those below the first one at which a run did. A run diverged if it ended broken, or above its first loss.

    Parameters
    ----------
    runs : sequence of Run
        Runs of ``sweep`` over ``rank`` and ``lr``, with several seeds.

    Returns
    -------
    DataFrame
        ``rank, seeds, best_lr, loss`` (nats, mean over seeds); ``low_lr, high_lr``, the smallest and largest rate that
        is not worse than the best, NaN with fewer than 3 seeds; ``stable_lr``, the edge of stability, NaN if the
        smallest rate diverged; ``at_end``, whether the best rate is at an end of the range, so that a better one may be
        outside.

    Raises
    ------
    ValueError
        A run has no rank or no validation loss.
    """
    records = pd.DataFrame([_final_loss(run) for run in runs])
    return pd.DataFrame([_card_row(rank, rows) for rank, rows in records.groupby("rank")])


def _final_loss(run: Result) -> dict[str, float]:
    rank = run.meta.recipe.get("rank")
    if rank is None:
        raise ValueError(f"runs must have a rank, got {run.label} (run {run.id})")
    losses = run.table[run.table["quantity"] == "eval_loss"]
    if losses.empty:
        raise ValueError(f"runs must have a validation loss, got none in {run.label} (run {run.id})")
    first, last = losses.sort_values("step")["value"].iloc[0], last_recorded(losses)["value"].iloc[0]
    has_diverged = run.meta.status == "broken" or not last <= first  # negated, so that NaN counts as diverged
    return {
        "rank": rank,
        "lr": run.meta.settings["lr"],
        "seed": run.meta.seed,
        "loss": np.inf if has_diverged else last,
        "diverged": has_diverged,
    }


def _card_row(rank: Any, rows: pd.DataFrame) -> dict[str, float]:
    """Return the row of one rank of the card; rates with a diverged run are not candidates."""
    losses = rows.pivot(index="seed", columns="lr", values="loss")
    diverged = rows.groupby("lr")["diverged"].any()
    stable = diverged.index[~diverged.cummax()]
    row = {"rank": rank, "seeds": len(losses), "stable_lr": stable.max()}
    candidates = losses.loc[:, ~diverged].dropna(axis=1)
    if candidates.empty:
        return row | {"best_lr": np.nan, "loss": np.nan, "low_lr": np.nan, "high_lr": np.nan, "at_end": False}
    best = candidates.mean().idxmin()
    row |= {"best_lr": best, "loss": candidates[best].mean(), "low_lr": np.nan, "high_lr": np.nan}
    row["at_end"] = best in (losses.columns.min(), losses.columns.max())
    if len(losses) < MINIMUM_SEEDS:
        return row
    similar: list[Any] = []
    for rate in candidates:
        if rate == best or t_interval((candidates[rate] - candidates[best]).to_numpy()).low <= 0:
            similar.append(rate)
    return row | {"low_lr": min(similar), "high_lr": max(similar)}
