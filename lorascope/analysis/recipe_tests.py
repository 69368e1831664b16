"""Comparison of recipes by test metric: means, intervals and paired t-tests.

Recipes that do not differ significantly are not ordered. Runs with the same seed see the same data in the same order.
So recipes are compared seed by seed, with a t-test of the paired differences. The p-values are adjusted by Holm's
method over all pairs of one model and task.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr

from lorascope.analysis.seed_intervals import band, t_interval
from lorascope.array_types import Float
from lorascope.runs.result import Result
from lorascope.schema.labels import to_words

LEVEL = 0.05
MINIMUM_SEEDS = 3  # with two, a 95% t-interval reaches 12.7 standard errors to each side
SETTING = ["model", "task", "metric"]
# Runs with the same values learn the same, such as two that differ only in observers: they are not two seeds.
_RUN_KEY = [*SETTING, "recipe", "seed"]
_MAX_LISTED = 4  # pairs without a significant difference that are listed by name
_MAX_CHARACTERS = 60  # longer tables and lists appear in the name of a recipe as their size and hash
# Settings left out of a recipe's name: observers do not affect training, and search_share follows from the method.
_IGNORED_SETTINGS = ("observers", "search_share")


def name_recipes(labels: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the recipe of each run to test: the label of the method, and settings that differ between its runs.

    There is one label, such as ``LoRA, rank 8``, and one mapping of settings per run.
    """
    texts_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for label, run_settings in zip(labels, settings, strict=True):
        for key, value in run_settings.items():
            texts_of[label, key].add(_setting_text(value))
    names = []
    for label, run_settings in zip(labels, settings, strict=True):
        differing = {key: value for key, value in run_settings.items() if len(texts_of[label, key]) > 1}
        names.append(", ".join([label, *(f"{key} {_setting_text(value)}" for key, value in differing.items())]))
    return names


def _setting_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:g}"
    text = json.dumps(value, default=to_words)
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{len(value)} values ({hashlib.sha256(text.encode()).hexdigest()[:6]})"


def collect_scores(runs: Sequence[Result]) -> pd.DataFrame:
    """Collect the test metrics of finished runs, by which recipes are tested.

    Returns
    -------
    DataFrame
        Columns model, task, metric (its name), recipe, seed, value, run (the id) and lower_is_better, in the order of
        the runs.
        Different models or tasks with the same name are distinguished by the first six characters of their hash.
    """
    columns: dict[str, list[Any]] = defaultdict(list)
    labels, settings = [], []
    for run in runs:
        meta = run.meta
        labels.append(meta.label)
        # The label of a method omits tables and the items of long lists, so their differences come from the fields.
        fields = {key: value for key, value in meta.recipe.items() if isinstance(value, Mapping | list)}
        settings.append(fields | {key: value for key, value in meta.settings.items() if key not in _IGNORED_SETTINGS})
        columns["model"].append(meta.model)
        columns["task"].append(str(meta.task))
        columns["w0"].append(meta.w0_hash)
        columns["data"].append(meta.data_hash)
        columns["metric"].append(run.score.name)
        columns["seed"].append(meta.seed)
        columns["value"].append(run.score.metric)
        columns["run"].append(meta.id)
        columns["lower_is_better"].append(run.score.lower_is_better)
    names = {
        "model": unique_names(columns["model"], columns["w0"]),
        "task": unique_names(columns["task"], columns["data"]),
        "recipe": name_recipes(labels, settings),
    }
    return pd.DataFrame(columns | names, columns=[*_RUN_KEY, "value", "run", "lower_is_better"])


def unique_names(names: Sequence[str], hashes: Sequence[str | None]) -> list[str]:
    """Append the first six characters of the hash to names of recipes that have more than one hash."""
    hashes_of: dict[str, set[str | None]] = defaultdict(set)
    for name, digest in zip(names, hashes, strict=True):
        hashes_of[name].add(digest)
    unique = []
    for name, digest in zip(names, hashes, strict=True):
        unique.append(name if len(hashes_of[name]) == 1 else f"{name} ({str(digest)[:6]})")
    return unique


def compare_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Test every pair of recipes of one model and task, paired by seed; duplicate runs of a seed count once.

    ``table`` is the result of :func:`collect_scores`.

    Returns
    -------
    DataFrame
        Columns model, task, metric, recipe, other, difference, low, high, n, p and better. ``difference`` is recipe
        minus other, averaged over their ``n`` common seeds; ``low`` and ``high`` are its 95% t-interval. ``p`` is from
        a two-sided paired t-test, adjusted by Holm's method. ``better`` is the better recipe, or "" if p is 0.05 or
        more or there are fewer than three common seeds.
    """
    comparisons = []
    for setting, runs in table.drop_duplicates(_RUN_KEY).groupby(SETTING, sort=False):
        by_seed = runs.pivot(index="seed", columns="recipe", values="value")
        rows, p_values = [], []
        for recipe, other in itertools.combinations(runs["recipe"].unique(), 2):
            values = (by_seed[recipe] - by_seed[other]).dropna().to_numpy(np.float64)
            if len(values):
                rows.append((recipe, other, t_interval(values)))
                p_values.append(paired_p(values))
        # Holm's method adjusts over all pairs of this model and task, so p-values are only final here.
        adjusted = holm(np.array(p_values, np.float64))
        sign = -1 if runs["lower_is_better"].iloc[0] else 1
        for (recipe, other, interval), p in zip(rows, adjusted.tolist(), strict=True):
            better = ""
            if interval.n >= MINIMUM_SEEDS and p < LEVEL:
                better = recipe if sign * interval.mean > 0 else other
            comparisons.append((*setting, recipe, other, *interval, p, better))
    return pd.DataFrame(
        comparisons, columns=[*SETTING, "recipe", "other", "difference", "low", "high", "n", "p", "better"]
    )


def paired_p(differences: Float[np.ndarray, "n"]) -> float:
    """Test whether two recipes differ: two-sided p-value of the paired t-test; NaN below two differences."""
    n = len(differences)
    if n < 2:
        return np.nan
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(n)
    if error == 0:  # equal differences have no t statistic: the p-value is its limit
        return float(mean == 0)
    return float(2 * stdtr(n - 1, -abs(mean) / error))


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """Adjust p-values of tests of recipes by Holm's method, which controls the family-wise error rate (Holm 1979)."""
    order = np.argsort(p)  # NaN last
    factors = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1)
    return adjusted


def standings(table: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """Rank recipes by tests: mean, interval and possible places of each; duplicate runs of a seed count once.

    Parameters
    ----------
    table, compared : DataFrame
        The results of :func:`collect_scores` and :func:`compare_pairs`.

    Returns
    -------
    DataFrame
        Columns model, task, metric, recipe, value (mean over seeds), low, high (95% t-interval), n, first and last.
        ``first`` is one more than the number of significantly better recipes. ``last`` is the number of recipes minus
        the number of significantly worse ones. A recipe has a definite place only if both are equal.
    """
    key = [*SETTING, "recipe"]
    rows = band(table.drop_duplicates(_RUN_KEY), key)
    better = compared[compared["better"] != ""]
    recipes = pd.MultiIndex.from_frame(rows[key])
    wins, losses = (
        better.assign(recipe=sides).groupby(key).size().reindex(recipes, fill_value=0)
        for sides in (better["better"], _worse_recipes(better))
    )
    peers = rows.groupby(SETTING)["recipe"].transform("size")
    return rows.assign(first=1 + losses.to_numpy(), last=peers - wins.to_numpy())


def _worse_recipes(better: pd.DataFrame) -> pd.Series:
    """Return the worse recipe of each pair with a better one."""
    return better["recipe"].where(better["better"] != better["recipe"], better["other"])


def describe_comparison(compared: pd.DataFrame) -> list[str]:
    """Describe which recipes test as significantly better than others, in a few lines per model and task."""
    lines = []
    has_settings = len(compared[["model", "task"]].drop_duplicates()) > 1
    for (model, task, _), comparisons in compared.groupby(SETTING, sort=False):
        where = ""
        if has_settings:
            where = f"{model}, {task}: "
        better = comparisons[comparisons["better"] != ""]
        for row, worse in zip(better.to_dict("records"), _worse_recipes(better), strict=True):
            # The interval of a significant difference excludes zero, so both ends have the same sign.
            low, high = sorted((abs(row["low"]), abs(row["high"])))
            lines.append(
                f"{where}{row['better']} is better than {worse} by {abs(row['difference']):.4g} "
                f"[{low:.4g}, {high:.4g}] (p {row['p']:.2g}, {row['n']} seeds)"
            )
        open_pairs = comparisons[comparisons["better"] == ""]
        if open_pairs.empty:
            continue
        listed_pairs = "; ".join(f"{row.recipe} and {row.other}" for row in open_pairs.head(_MAX_LISTED).itertuples())
        remainder, few = "", ""
        if len(open_pairs) > _MAX_LISTED:
            remainder = f"; and {len(open_pairs) - _MAX_LISTED} more pairs"
        if open_pairs["n"].max() < MINIMUM_SEEDS:
            few = f" (fewer than {MINIMUM_SEEDS} seeds)"
        lines.append(f"{where}no significant difference{few}: {listed_pairs}{remainder}")
    return lines
