"""Rate card: the learning rate for each rank, from the runs of a sweep, and the edge of stability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorascope.analysis.norms import last_recorded
from lorascope.analysis.seed_intervals import MINIMUM_SEEDS, t_interval
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.result import Result

_GROUP = ["model", "task", "method", "rank"]


def rate_card(runs: Sequence[Result]) -> pd.DataFrame:
    """Return the best learning rate of each rank, with the rates that are not worse, and the edge of stability.

    Rates are compared by the final validation loss, paired by seed: a rate is not worse than the best one if the 95%
    t-interval of the difference includes 0. The edge of stability is the largest rate at which no run diverged, of
    those below the first one at which a run did. A run diverged if it ended broken, or above its first loss.

    Parameters
    ----------
    runs : sequence of Run
        Runs that ``ls.sweep`` returns, over ``rank``, ``lr`` and seeds.

    Returns
    -------
    DataFrame
        ``model, task, method, rank`` (NaN for full fine-tuning) and ``seeds``; ``best_lr`` and its ``loss`` (nats, mean
        over seeds), NaN if no rate has all seeds without divergence; ``low_lr, high_lr``, the smallest and largest rate
        that is not worse than the best, NaN with fewer than 3 seeds; ``stable_lr``, the edge of stability, NaN if the
        smallest rate diverged; ``at_end``, whether the best rate is at an end of the range, so that a better one may be
        outside.

    Raises
    ------
    ValueError
        A run has no validation loss, or two runs do not differ in model, task, method, rank, rate or seed.
    """
    records = _final_losses(runs)
    twice = records[records.duplicated([*_GROUP, "lr", "seed"])]
    if len(twice):
        run = twice.iloc[0]
        raise ValueError(
            f"runs must differ in model, task, method, rank, learning rate or seed, got two of {run['method']} with "
            f"rank {run['rank']:g}, learning rate {run['lr']:g} and seed {run['seed']}: pass those of one setting"
        )
    rows = []
    for group, losses in records.groupby(_GROUP, dropna=False):
        rows.append(dict(zip(_GROUP, group, strict=True)) | _card_row(losses))
    return pd.DataFrame(rows)


def compares_rates(runs: Sequence[Result]) -> bool:
    """Return whether runs have several rates, and do not otherwise differ within a rank and seed."""
    settings = pd.DataFrame([_setting(run) for run in runs])
    if settings.empty or settings.duplicated([*_GROUP, "lr", "seed"]).any():
        return False
    return bool(settings.groupby(_GROUP, dropna=False)["lr"].nunique().max() > 1)


def _setting(run: Result) -> dict[str, Any]:
    meta = run.meta
    rank = meta.recipe.get("rank")
    setting = {"model": meta.model, "task": meta.task, "method": meta.recipe["name"]}
    return setting | {"rank": np.nan if rank is None else rank, "lr": meta.settings["lr"], "seed": meta.seed}


def _final_losses(runs: Sequence[Result]) -> pd.DataFrame:
    rows = []
    for run in runs:
        loss = np.inf if run.meta.status == "broken" else _final_loss(run)
        rows.append(_setting(run) | {"loss": loss, "diverged": np.isinf(loss)})
    return pd.DataFrame(rows)


def _final_loss(run: Result) -> float:
    """Return the last validation loss, infinity if it is above the first one."""
    losses = run.table[run.table["quantity"] == "eval_loss"]
    if losses.empty:
        raise ValueError(f"runs must have a validation loss, got none in {run.label} (run {run.id})")
    first, last = losses.sort_values("step")["value"].iloc[0], last_recorded(losses)["value"].iloc[0]
    if last <= first:
        return float(last)
    return np.inf  # also for NaN


def _card_row(rows: pd.DataFrame) -> dict[str, Any]:
    """Return the values of one rank of the card; rates with a diverged run are not candidates."""
    losses = rows.pivot(index="seed", columns="lr", values="loss")
    diverged = rows.groupby("lr")["diverged"].any()
    # A larger rate that happens to recover is not stable.
    stable = diverged.index[~diverged.cummax()]
    row: dict[str, Any] = {"seeds": len(losses), "best_lr": np.nan, "loss": np.nan, "low_lr": np.nan, "high_lr": np.nan}
    row |= {"stable_lr": stable.max(), "at_end": False}
    # A mean over fewer seeds than the others have could not be compared with theirs.
    candidates = losses.loc[:, ~diverged].dropna(axis=1)
    if candidates.empty:
        return row
    best = candidates.mean().idxmin()
    row |= {"best_lr": best, "loss": candidates[best].mean()}
    row["at_end"] = best in (losses.columns.min(), losses.columns.max())
    if len(losses) < MINIMUM_SEEDS:
        return row
    similar: list[Any] = []
    for rate in candidates:
        if rate == best or t_interval((candidates[rate] - candidates[best]).to_numpy()).low <= 0:
            similar.append(rate)
    return row | {"low_lr": min(similar), "high_lr": max(similar)}
