"""Retraining of kept runs: judged runs drawn at random, trained again and compared with the evidence."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.papers.figures.excerpt import changed_excerpts
from lorascope.papers.judging import kept_runs, registration
from lorascope.papers.judging.csv_tables import compare_tables, text_table, to_csv
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.registry import SECTIONS
from lorascope.papers.training.missing_runs import OpenRun
from lorascope.papers.training.train_arms import FinishedRun, block, finish, read_by_claims, run_line
from lorascope.training.processor import processor_name

EXACT = 1e-9
"""Largest difference on the same processor: numbers that were written and read."""
ROUNDED_MEAN, ROUNDED_VALUE = 1e-3, 5e-2
"""Largest differences on another processor with the same instructions: of losses, and of single values.

The second one is relative to the largest value of its kind. A processor may add in another order. Each float32
operation then differs by up to 6e-8, and training amplifies this: losses of the same seed differed by up to 6e-5,
margins by up to 2% of the largest one. Kept runs of an arm with different seeds differ by more in 2,427 of 2,438 pairs.
"""
_METRICS = ("validation_metric", "test_metric")
_LOSSES = ("validation_loss", "test_loss")


class Tolerance(NamedTuple):
    """Comparison rule of a retrained run: the largest differences, None for the spread of seeds, and the reason."""

    mean: float | None
    value: float
    reason: str

    def __str__(self) -> str:
        if self.mean is None:
            return f"test_metric within three standard deviations of the seeds: {self.reason}"
        if self.mean == EXACT:
            return f"all within {EXACT:g}: {self.reason}"
        return f"losses within {self.mean:g}, values within {self.value:g} of the largest: {self.reason}"


def tolerance_of(row: Mapping[str, Any]) -> Tolerance:
    """Return how a run of ``runs.csv`` is compared if it is retrained on this machine."""
    machine = block()
    if different := [name for name in machine if row[name] != machine[name]]:
        texts = (f"{name} {row[name]}, here {machine[name]}" for name in different)
        return Tolerance(None, 0.0, f"another machine ({'; '.join(texts)})")
    if row["processor"] and row["processor"] == processor_name():
        return Tolerance(EXACT, EXACT, f"the same processor ({processor_name()})")
    processors = f"{row['processor'] or 'unknown'}, here {processor_name() or 'unknown'}"
    reason = f"the same instructions, but another processor ({processors})"
    return Tolerance(ROUNDED_MEAN, ROUNDED_VALUE, reason)


def retrain(folder: Path, number: int, registered: Path = registration.FILE) -> list[str]:
    """Train arms again for judged runs that are drawn at random, and compare them with the evidence.

    Compared are the predictions and scores of a run, the tables that claims read, and the records and arrays that
    figures show, as far as they are kept. On the same processor they must be equal. On another one with the same
    instructions they must agree within ``ROUNDED_MEAN`` and ``ROUNDED_VALUE``, margins within one step more, and
    accuracies may differ by the rows whose margin is at most one step. On any other machine the test metric must be
    within three standard deviations of those of the arm's seeds.

    Parameters
    ----------
    folder : path
        Folder of evidence.
    number : int
        Number of runs; all if there are fewer.
    registered : path
        File of the registration.

    Returns
    -------
    list of str
        One line per difference.
    """
    claims, evidence = registration.read(registered), kept_runs.read(folder)
    reads, judged, differences = read_by_claims(claims), evidence.judged, []
    for _, row in judged.sample(min(number, len(judged))).iterrows():
        arm, seed, kept = str(row["arm"]), int(row["seed"]), _kept_of(row["run"], evidence)
        of_seed = [replace(read, seeds=range(seed, seed + 1)) for read in reads.get(arm, []) if read.name in kept]
        rule = tolerance_of({**row})
        with tempfile.TemporaryDirectory() as out:
            rate = None if pd.isna(row["rate"]) else float(row["rate"])
            finished = finish(OpenRun(arm, seed, "judged", rate), claims, of_seed, Path(out))
            print(f"{run_line(finished.row)}. Compared {rule}.", flush=True)
            if rule.mean is None:
                lines = _beyond_seeds({**row}, finished, evidence)
            else:
                rounding = None if rule.value == EXACT else rule.value
                lines = _first_differences(kept, finished, rounding)
                lines += changed_excerpts(folder, evidence, {**row}, finished.row, Path(out), SECTIONS, rounding)
                lines += _score_differences({**row}, finished, kept, rule.mean)
        differences += [f"{arm}, seed {seed}: {line}" for line in lines]
    return differences


def _kept_of(run: str, evidence: Evidence) -> dict[str, Any]:
    """Return the kept scores and tables of a run by name."""
    by_name = {"margin": evidence.margins, "nll": evidence.nll, **evidence.kept}
    return {name: by_run[run] for name, by_run in by_name.items() if run in by_run}


def _beyond_seeds(row: Mapping[str, Any], finished: FinishedRun, evidence: Evidence) -> list[str]:
    of_machine = evidence.in_block(row).judged
    metrics = of_machine.loc[of_machine["arm"] == row["arm"], "test_metric"]
    if len(metrics) < 2:
        print("Not compared, because a single kept seed has no deviation.", flush=True)
        return []
    return _number_differences(row, finished, {"test_metric": 3 * metrics.std(ddof=1)})


def _score_differences(
    row: Mapping[str, Any], finished: FinishedRun, kept: Mapping[str, Any], tolerance: float
) -> list[str]:
    if tolerance == EXACT:
        return _number_differences(row, finished, dict.fromkeys(("trained_parameters", *_LOSSES, *_METRICS), EXACT))
    allowed = {name: tolerance * abs(row[name]) for name in (*_LOSSES, *_METRICS)}
    near_zero = float((np.abs(kept["margin"]) <= 1).mean()) if "margin" in kept else 0.0
    for metric, loss in zip(_METRICS, _LOSSES, strict=True):
        if np.isnan(row["validation_chance"]):  # a perplexity, whose relative change is the change of the loss
            allowed[metric] *= max(1.0, abs(row[loss]))
        else:
            allowed[metric] += near_zero
    return _number_differences(row, finished, {"trained_parameters": 0.0, **allowed})


def _number_differences(row: Mapping[str, Any], finished: FinishedRun, allowed: Mapping[str, float]) -> list[str]:
    lines = []
    for name, difference in allowed.items():
        if not np.isclose(finished.row[name], row[name], rtol=0, atol=difference, equal_nan=True):
            lines.append(f"{name}: kept {row[name]!r}, trained again {finished.row[name]!r}")
    return lines


def _first_differences(kept: Mapping[str, Any], finished: FinishedRun, rounding: float | None) -> list[str]:
    """Compare kept scores and tables with those of a retrained run; return one line for each that differs."""
    new: dict[str, Any] = {**finished.scores, **finished.tables}
    differences: list[str] = []
    for name in sorted(kept.keys() & new.keys()):
        old_table, new_table = kept[name], new[name]
        if not isinstance(old_table, pd.DataFrame):
            old_table, new_table = pd.DataFrame({"score": old_table}), pd.DataFrame({"score": new_table})
        if rounding is not None:
            new_table = _with_close_values(old_table, new_table, rounding, float(name == "margin"))
        # As in a file, so that both have the same rounding and types.
        lines = list(compare_tables(name, text_table(to_csv(old_table)), text_table(to_csv(new_table))))
        if lines[1:]:
            lines = [f"{lines[0]}, and {len(lines) - 1} more"]
        differences += lines
    return differences


def _with_close_values(old: pd.DataFrame, new: pd.DataFrame, rounding: float, step: float) -> pd.DataFrame:
    """Return a retrained table whose values are replaced by those of the old table where they agree with them."""
    if list(old.columns) != list(new.columns) or len(old) != len(new):
        return new
    columns = {}
    for name in old:
        columns[name] = new[name].to_numpy()
        if pd.api.types.is_numeric_dtype(old[name]) and pd.api.types.is_numeric_dtype(new[name]):
            old_values, new_values = old[name].to_numpy(np.float64), new[name].to_numpy(np.float64)
            allowed = step + rounding * np.nanmax(np.abs(old_values), initial=0)
            is_close = np.isclose(new_values, old_values, rtol=0, atol=allowed, equal_nan=True)
            columns[name] = np.where(is_close, old[name].to_numpy(), new[name].to_numpy())
    return pd.DataFrame(columns)
