"""Recipes beside each other by their test metric: mean, interval, paired tests, and no rank for what overlaps.

Runs of one seed see the same data in the same order, so recipes are compared seed by seed: a t-test of the paired
differences, whose p-values are adjusted by Holm's rule for all pairs of one model and task.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import stdtr

from lorascope.analysis.seed_intervals import band, t_interval
from lorascope.runs.run import Run
from lorascope.schema.labels import to_words

LEVEL = 0.05
MINIMUM_SEEDS = 3
PLACE = ["model", "task", "metric"]
_LOWER_IS_BETTER = ("perplexity",)
# Pairs that cannot be told apart and are named.
_NAMED = 4
# Characters of a table or list in the name of a recipe, beyond which its size and hash are given.
_LONG = 60
# Settings that say nothing about how a recipe differs from another of the same name.
_ASIDE = ("observers", "search_share")


def recipes(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names for runs: the label of the method, and the settings that differ between runs of this label.

    Parameters
    ----------
    labels : sequence of str
        Such as ``LoRA, rank 8``, one a run.
    settings : sequence of mapping
        Of each run.
    """
    keys: dict[str, dict[str, set[str]]] = {}
    for label, chosen in zip(labels, settings, strict=True):
        for key, value in chosen.items():
            keys.setdefault(label, {}).setdefault(key, set()).add(_setting_text(value))
    return [
        ", ".join([label, *(f"{key} {_setting_text(chosen[key])}" for key in chosen if len(keys[label][key]) > 1)])
        for label, chosen in zip(labels, settings, strict=True)
    ]


def _setting_text(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, default=to_words)
    if isinstance(value, str) or len(text) <= _LONG:
        return text
    return f"{len(value)} values ({hashlib.sha256(text.encode()).hexdigest()[:6]})"


def scores(runs: Sequence[Run]) -> pd.DataFrame:
    """What finished runs reached on the test split.

    Returns
    -------
    DataFrame
        Columns model, task, metric (its name), recipe, seed, value and run (the id), in the order of the runs.
        Models or tasks of one name that are not the same have the beginning of their hash behind it.
    """
    metas = [run.meta for run in runs]
    # The label of a method shows neither a table nor the items of a long list.
    fields = [
        {key: value for key, value in meta["recipe"].items() if isinstance(value, Mapping | list)} for meta in metas
    ]
    settings = [{key: value for key, value in meta["settings"].items() if key not in _ASIDE} for meta in metas]
    table = {
        "model": unique_names([meta["model"] for meta in metas], [meta["w0_hash"] for meta in metas]),
        "task": unique_names([meta["task"] for meta in metas], [meta["data_hash"] for meta in metas]),
        "metric": [meta["test"]["name"] for meta in metas],
        "recipe": recipes([meta["label"] for meta in metas], [a | b for a, b in zip(fields, settings, strict=True)]),
        "seed": [meta["seed"] for meta in metas],
        "value": [meta["test"]["metric"] for meta in metas],
        "run": [meta["id"] for meta in metas],
    }
    return pd.DataFrame(table)


def unique_names(names: Sequence[str], hashes: Sequence[str | None]) -> list[str]:
    held: dict[str, set[str | None]] = {}
    for name, digest in zip(names, hashes, strict=True):
        held.setdefault(name, set()).add(digest)
    told = zip(names, hashes, strict=True)
    return [f"{name} ({str(digest)[:6]})" if len(held[name]) > 1 else name for name, digest in told]


def _drop_duplicate_runs(table: pd.DataFrame) -> pd.DataFrame:
    """One of the runs that learn the same, such as two that differ in their observers alone: they are no two seeds."""
    return table.drop_duplicates([*PLACE, "recipe", "seed"])


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every two recipes of one model and task, seed by seed; a recipe's runs of one seed count once.

    Parameters
    ----------
    table : DataFrame
        As :func:`scores` gives it.

    Returns
    -------
    DataFrame
        Columns model, task, metric, recipe, other, difference (recipe minus other, mean over the seeds that both
        have), low, high (its 95 % t-interval), n, p (two-sided paired t-test, by Holm's rule) and better: the recipe
        that is the better one, or "" where the two cannot be told apart: p of 0.05 or more, or under three seeds.
    """
    found = [
        row
        for place, part in _drop_duplicate_runs(table).groupby(PLACE, sort=False)
        for row in _pair_rows(dict(zip(PLACE, map(str, place), strict=True)), part)
    ]
    return pd.DataFrame(found, columns=[*PLACE, "recipe", "other", "difference", "low", "high", "n", "p", "better"])


def _pair_rows(place: dict[str, str], part: pd.DataFrame) -> list[dict[str, Any]]:
    by_seed = part.pivot(index="seed", columns="recipe", values="value")
    rows: list[dict[str, Any]] = []
    p_values: list[float] = []
    for recipe, other in itertools.combinations(part["recipe"].unique(), 2):
        values = (by_seed[recipe] - by_seed[other]).dropna().to_numpy(np.float64)
        if len(values):
            mean, low, high, n = t_interval(values)
            rows.append(
                place | {"recipe": recipe, "other": other, "difference": mean, "low": low, "high": high, "n": n}
            )
            p_values.append(paired_p(values))
    sign = -1 if place["metric"] in _LOWER_IS_BETTER else 1
    for row, p in zip(rows, holm(np.array(p_values, np.float64)), strict=True):
        apart = row["n"] >= MINIMUM_SEEDS and p < LEVEL
        winner = row["recipe"] if sign * row["difference"] > 0 else row["other"]
        row |= {"p": float(p), "better": winner if apart else ""}
    return rows


def paired_p(differences: Float[np.ndarray, "n"]) -> float:
    """Two-sided p-value of the t-test that paired differences have mean zero; NaN for a single one."""
    n = len(differences)
    if n < 2:
        return np.nan
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(n)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(n - 1, -abs(mean) / error))


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """p-values of several tests, so that one of them errs at all no more often than a single test would (Holm 1979)."""
    order = np.argsort(p)  # NaN last
    factors = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return adjusted


def standings(table: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """Every recipe with its mean, interval, and the places that it may hold; a recipe's runs of one seed count once.

    Parameters
    ----------
    table, compared : DataFrame
        As :func:`scores` and :func:`pairs` give them.

    Returns
    -------
    DataFrame
        Columns model, task, metric, recipe, value (mean over seeds), low, high (95 % t-interval), n, first and last.
        ``first`` is one more than the number of recipes that are told to be better, ``last`` leaves out those told to
        be worse: only where both are the same number has a recipe a place.
    """
    rows = band(_drop_duplicate_runs(table), [*PLACE, "recipe"])
    better = compared[compared["better"] != ""]
    worse = better["recipe"].where(better["better"] != better["recipe"], better["other"])
    ahead = better.assign(loser=worse)
    first, last = [], []
    for row in rows.itertuples():
        here = ahead[(ahead["model"] == row.model) & (ahead["task"] == row.task) & (ahead["metric"] == row.metric)]
        peers = rows[(rows["model"] == row.model) & (rows["task"] == row.task) & (rows["metric"] == row.metric)]
        first.append(1 + int((here["loser"] == row.recipe).sum()))
        last.append(len(peers) - int((here["better"] == row.recipe).sum()))
    return rows.assign(first=first, last=last)


def describe_comparison(compared: pd.DataFrame) -> list[str]:
    """What may be said of the order of recipes, and of which of them nothing: a few lines for each model and task."""
    lines = []
    for (model, task, _), part in compared.groupby(PLACE, sort=False):
        told = part[part["better"] != ""]
        many = compared[["model", "task"]].drop_duplicates()
        where = f"{model}, {task}: " if len(many) > 1 else ""
        for row in told.to_dict("records"):
            worse = row["other"] if row["better"] == row["recipe"] else row["recipe"]
            low, high = sorted((abs(row["low"]), abs(row["high"])))
            lines.append(
                f"{where}{row['better']} is better than {worse} by {abs(row['difference']):.4g} "
                f"[{low:.4g}, {high:.4g}] (p {row['p']:.2g}, {row['n']} seeds)"
            )
        overlapping = part[part["better"] == ""]
        if overlapping.empty:
            continue
        named = "; ".join(f"{row.recipe} and {row.other}" for row in overlapping.head(_NAMED).itertuples())
        more = f"; and {len(overlapping) - _NAMED} more pairs" if len(overlapping) > _NAMED else ""
        few = " (fewer than 3 seeds decide nothing)" if overlapping["n"].max() < MINIMUM_SEEDS else ""
        lines.append(f"{where}overlapping, so not ranked{few}: {named}{more}")
    return lines


def __getattr__(name: str) -> Any:
    """Return ``describe_comparison`` by its deprecated name ``words``."""
    if name == "words":
        warnings.warn("words is deprecated: use describe_comparison instead", FutureWarning, stacklevel=2)
        return describe_comparison
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
