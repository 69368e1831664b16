"""Made-up evidence of the second edition: runs and tables in which the effects of a claim have given values by seed.

Effects are linear in the values of the arms that they read, so the values are found by least squares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.papers.judging import kept_study, registered_study, study_results, study_statistics
from lorascope.papers.judging.kept_study import FIRST_SEED, STUDY_COLUMNS
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.statistics import Statistic

ROWS = 3000
"""Test rows of a claim on text."""
LEVEL = 60.0
"""Value around which arms are planted: points of the gap or of accuracy, percent of log loss."""


class Code(NamedTuple):
    """Modules that judge, which tests of mutants exchange."""

    kept_study: Any = kept_study
    study_statistics: Any = study_statistics
    study_results: Any = study_results


def comparisons(statistics: Any = study_statistics) -> dict[str, Any]:
    """Return a claim of each form: a gain pair, a cost pair in percent, one on a table and one on text."""
    pair, table, of_text = statistics.pair, statistics.OfTable, statistics.Accuracy
    found, turned, moved = (table(function, "neurons", "full, few") for function in (_random, _rotation, _displacement))
    return {
        "gain": pair("AdaLoRA", "LoRA", "oracle", truths=("uneven", "even")),
        "cost": pair(
            "Adapprox", "AdamW", "Adafactor", truths=("low", "flat"), positive_truth="flat", of=statistics.LogLoss
        ),
        "table": statistics.Comparison(moved - turned, positive=moved - found),
        "text": statistics.Comparison(of_text("LoRA") - of_text("full"), positive=of_text("short") - of_text("full")),
    }


def _random(table: pd.DataFrame) -> float:
    raise NotImplementedError("the planted value is read instead")


def _rotation(table: pd.DataFrame) -> float:
    raise NotImplementedError("the planted value is read instead")


def _displacement(table: pd.DataFrame) -> float:
    raise NotImplementedError("the planted value is read instead")


RULES = {
    "pair.lora": ("cost", 2.0, 16),
    "pair.adapprox": ("cost", 10.0, 40),
    "pair.factored": ("gain", 10.0, 40),
    "text.lora": ("cost", 1.0, 16),
    "gain": ("gain", 2.0, 16),
    "cost": ("cost", 10.0, 40),
    "table": ("gain", 5.0, 16),
    "text": ("cost", 1.0, 16),
}
PRINTED = {"text": (0.89, "points"), "gain": (0.81, "points of accuracy")}


def registration(all_comparisons: Mapping[str, Any] | None = None) -> StudyRegistration:
    """Return the registration of the claims of ``comparisons``."""
    claims, arms = {}, {}
    for id, comparison in (all_comparisons or comparisons()).items():
        kind, bound, seeds = RULES.get(id, ("gain", 2.0, 16))
        labels = {name: tuple(sorted(statistic.arms())) for name, statistic in comparison.statistics().items()}
        printed, unit = PRINTED.get(id, (None, ""))
        claims[id] = registered_study.StudyClaim(
            id=id,
            sentence=f"The {id} is as claimed.",
            paper=registered_study.PaperPlace("2303.10512", "table 1", printed, unit),
            rule=registered_study.StudyRule(kind, bound, "points", seeds),  # type: ignore[arg-type]
            for_arms=labels["for"],
            against_arms=labels.get("against", ()),
            control_arms=labels.get("positive", ()),
        )
        for label in sorted(comparison.arms()):
            count = 5 if label == "short" else seeds
            if label in arms:  # an arm of several claims has runs for the longest one
                count = max(count, arms[label].seeds)
            arms[label] = registered_study.StudyArm(label, "sha256:1", rates=(1e-3,), seeds=count)
    return StudyRegistration(arms, claims)


def leaves(statistic: Statistic) -> list[Statistic]:
    """Return the statistics of single arms that a statistic combines."""
    if type(statistic).__name__ == "Combined":
        return [leaf for term in statistic.terms for leaf in leaves(term)]  # type: ignore[attr-defined]
    return [] if isinstance(statistic, study_statistics.Constant) else [statistic]


def key_of(leaf: Any) -> str:
    """Return the name of a leaf: its kind, the function and arguments of a table, and the arm."""
    function = getattr(leaf, "value", None)
    arguments = getattr(function, "args", ()), sorted(getattr(function, "keywords", {}).items())
    name = getattr(getattr(function, "func", function), "__name__", "")
    return f"{type(leaf).__name__} {name} {arguments} {getattr(leaf, 'table', '')} {leaf.arm}"


def _read_planted(key: str, table: pd.DataFrame) -> float:
    return float(table.loc[table["key"] == key, "planted"].iloc[0])


def with_planted_tables(statistic: Any) -> Any:
    """Return a statistic that reads planted values instead of computing them from tables."""
    kind = type(statistic).__name__
    if kind == "Combined":
        return replace(statistic, terms=tuple(map(with_planted_tables, statistic.terms)))
    return replace(statistic, value=partial(_read_planted, key_of(statistic))) if kind == "OfRun" else statistic


def planted(comparison: Any) -> Any:
    """Return a comparison that reads planted values instead of computing them from tables."""
    parts = ("effect", "against", "positive")
    statistics = {name: getattr(comparison, name) for name in parts}
    return replace(comparison, **{name: with_planted_tables(s) for name, s in statistics.items() if s is not None})


class _Values:
    """Stands for evidence with one value per leaf, to see how effects depend on them."""

    def __init__(self, keys: list[str], values: np.ndarray) -> None:
        self._values = dict(zip(keys, values, strict=True))

    def of(self, statistic: Any) -> float:
        kind = type(statistic).__name__
        if kind == "Combined":
            return float(statistic.function(*map(self.of, statistic.terms)))
        return float(statistic.value if "Constant" in kind else self._values[key_of(statistic)])


def arm_values(comparison: Any, effects: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the value of each leaf by seed with which a comparison has the given effects."""
    statistics = comparison.statistics()
    by_key = {key_of(leaf): leaf for statistic in statistics.values() for leaf in leaves(statistic)}
    keys = list(by_key)
    zero = np.zeros(len(keys))
    constant = np.array([_Values(keys, zero).of(statistic) for statistic in statistics.values()])
    slopes = np.array([
        [_Values(keys, unit).of(statistic) for unit in np.eye(len(keys))] for statistic in statistics.values()
    ])  # fmt: skip
    slopes -= constant[:, None]
    count = max(map(len, effects.values()))
    # Seeds differ much more than effects do, so a comparison of different seeds is noticed.
    values = LEVEL + 5 * rng.uniform(-1, 1, count) + np.zeros((len(keys), 1))
    for seed in range(count):
        present = [number for number, name in enumerate(statistics) if seed < len(effects[name])]
        targets = np.array([effects[name][seed] for name in statistics if seed < len(effects[name])])
        error = targets - constant[present] - slopes[present] @ values[:, seed]
        values[:, seed] += np.linalg.lstsq(slopes[present], error, rcond=None)[0]
    return dict(zip(keys, values, strict=True))


def made_up(
    registered: StudyRegistration,
    id: str,
    comparison: Any,
    effects: Mapping[str, np.ndarray],
    code: Code | None = None,
    seed: int = 0,
) -> Any:
    """Return evidence of the arms of one claim, with these effects by seed."""
    values = arm_values(comparison, effects, np.random.default_rng(seed))
    by_leaf = {key_of(leaf): leaf for s in comparison.statistics().values() for leaf in leaves(s)}
    order = np.random.default_rng(1).permutation(ROWS)
    runs, tables, right = [], {}, {}
    for key, leaf in by_leaf.items():
        arm: Any = leaf.arm  # type: ignore[attr-defined]
        kind = type(leaf).__name__
        for number in range(min(registered.arms[arm].seeds, len(values[key]))):
            run_seed, value = FIRST_SEED + number, values[key][number]
            run = hashlib.sha256(f"{arm} {run_seed}".encode()).hexdigest()[:12]
            row = dict.fromkeys(STUDY_COLUMNS, np.nan) | {
                "run": run, "arm": arm, "arm_hash": "sha256:1", "role": "judged", "seed": run_seed, "rate": 1e-3,
                "phase": "", "task": "", "cpu_seconds": 60.0,
            }  # fmt: skip
            base_gap = 1 + 0.1 * number
            if kind == "GapClosed":
                row |= {"base_gap": base_gap, "gap": base_gap * (1 - value / 100)}
            elif kind == "LogLoss":
                row |= {"loss": np.exp(-value / 100), "first_loss": 9.0}
            elif kind == "Accuracy":
                is_right = np.zeros(ROWS, bool)
                is_right[order[: round(value / 100 * ROWS)]] = True
                right[run] = np.packbits(is_right)
                row |= {"accuracy": is_right.mean(), "majority": 0.3}
            else:
                row |= {"base_gap": 1.0, "gap": 0.4}
                entry = {"arm": arm, "seed": run_seed, "run": run, "key": key, "planted": value}
                tables.setdefault(leaf.table, []).append(entry)  # type: ignore[attr-defined]
            runs.append(row)
    # Runs from which a table was computed that belongs to another one.
    for arm in sorted(comparison.arms() - {row["arm"] for row in runs}):
        for number in range(registered.arms[arm].seeds):
            row = runs[0] | {"arm": arm, "seed": FIRST_SEED + number, "run": f"{arm} {number}"}
            runs.append(row | {"gap": 0.4, "base_gap": 1.0})
    columns = {"commit": "", "processor": "", "capability": "", "torch": "", "device": "", "threads": 1}
    table = pd.DataFrame(runs).assign(**columns).drop_duplicates("run", ignore_index=True)
    rows = pd.DataFrame({"tasks": "", "row": np.arange(ROWS), "task": "", "cluster": np.arange(ROWS)})
    # Tests add a second task to some runs.
    rows = pd.concat([rows, rows.assign(tasks=" + second")], ignore_index=True)
    return (code or Code()).kept_study.StudyEvidence(
        table, {name: pd.DataFrame(entries) for name, entries in tables.items()}, right, rows
    )


def around(mean: float, deviation: float, count: int, seed: int) -> np.ndarray:
    """Return numbers with exactly this mean and standard deviation."""
    noise = np.random.default_rng(seed).standard_normal(count)
    return mean + deviation * (noise - noise.mean()) / noise.std(ddof=1)
