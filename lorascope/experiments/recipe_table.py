"""Table of a recipe: scores of its finished runs with intervals over seeds, next to the printed numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import CONFIDENCE, Estimate, t_estimate
from lorascope.array_types import Float
from lorascope.experiments.grid import Job
from lorascope.experiments.recipe import MeanColumn, Perplexity, PrintedScore, Recipe
from lorascope.files.hub import model_name
from lorascope.files.safe_csv import csv_text
from lorascope.files.typed_json import to_json_rows
from lorascope.files.whole_files import write_bytes
from lorascope.inputs.metrics import Metric
from lorascope.inputs.tasks import Task
from lorascope.methods.method import config
from lorascope.runs.folders import identify_folder
from lorascope.runs.loading import is_run, load
from lorascope.runs.run import Run
from lorascope.training.settings import Settings

_LEVEL = (1 - CONFIDENCE) / 2
# Steps and epochs become numbers of steps, and a phase may set another rate.
_RESOLVED = ("steps", "epochs", "eval_every", "lr", "head_lr")
# Metrics without an upper bound, and those that their libraries compute in percent.
_UNBOUNDED = ("mse", "nist", "cider", "perplexity")
_PERCENT = ("bleu", "bleu_lower", "bleu_zh", "chrf")
_NUMBERS = (
    *("mean", "low", "high", "median", "minimum", "maximum"),
    *("printed", "printed_sd", "printed_n", "difference", "difference_low", "difference_high"),
)


def tabulate(recipe: Recipe, runs: Mapping[str, Run]) -> pd.DataFrame:
    """Tabulate the scores of a recipe.

    Parameters
    ----------
    recipe : Recipe
        The recipe.
    runs : mapping job name -> Run
        Finished runs.

    Returns
    -------
    DataFrame
        One row per column and row of the table, and evaluation: ``column, metric, row, evaluation, mean, low, high, n,
        seeds, median, minimum, maximum, printed, printed_sd, printed_n, difference, difference_low, difference_high``.
        ``evaluation`` is "best" and "last" of those on the validation split if this is also the test split; otherwise,
        and for further test sets, "test". ``low`` and ``high`` are the 95% t-interval over seeds, ``n`` the finished
        ones of ``seeds``.
        ``difference`` is the statistic that the paper prints, mean or median, minus the printed number. Its interval is
        Welch's if the paper prints a standard deviation and a number of seeds, otherwise that of the mean around the
        printed number. Accuracies, F1 scores, correlations, METEOR and ROUGE are in percent.
    """
    rows: list[dict[str, Any]] = []
    by_seed: dict[tuple[str, str, str], pd.Series] = {}  # by row, column and evaluation
    for recipe_part in recipe.recipe_parts:
        jobs = recipe_part.jobs()
        count = len(recipe_part.grid.seeds)
        for number, row in enumerate(recipe_part.rows):
            finished = [runs[job.name] for job in jobs[number * count : (number + 1) * count] if job.name in runs]
            for column, metric in recipe_part.columns.items():
                for evaluation, scores in _scores(finished, metric, recipe_part.grid.tasks[0]).items():
                    by_seed[row.name, column, evaluation] = scores
                    cell = {"column": column, "metric": metric.name, "row": row.name, "evaluation": evaluation}
                    summary = _summarize(scores.to_numpy(), row.printed.get(column), recipe)
                    rows.append(cell | {"n": len(scores), "seeds": count} | summary)
            for test_set, column in recipe_part.test_columns.items():
                # Each evaluation is on the first set only, so the others have the score of the tested state.
                metric = next(iter(recipe_part.columns.values()))
                points = {run.meta.seed: _scale(metric) * run.score.groups[test_set] for run in finished}
                scores = pd.Series(points, dtype="float64")
                cell = {"column": column, "metric": metric.name, "row": row.name, "evaluation": "test"}
                summary = _summarize(scores.to_numpy(), row.printed.get(column), recipe)
                rows.append(cell | {"n": len(scores), "seeds": count} | summary)
    for mean in recipe.means:
        rows += _mean_cells(recipe, mean, by_seed)
    return pd.DataFrame(rows)


def _mean_cells(
    recipe: Recipe, mean: MeanColumn, by_seed: Mapping[tuple[str, str, str], pd.Series]
) -> Iterator[dict[str, Any]]:
    """Yield the cells of the column with the mean over others, of the seeds that are finished in all of them."""
    for row, evaluation in dict.fromkeys((row, evaluation) for row, _, evaluation in by_seed):
        columns = [by_seed.get((row, column, evaluation)) for column in mean.columns]
        # A row of some columns only has no mean.
        if any(scores is None for scores in columns):
            continue
        scores = pd.concat(columns, axis=1).dropna().mean(axis=1)
        cell = {"column": mean.name, "metric": "mean of the columns", "row": row, "evaluation": evaluation}
        summary = _summarize(scores.to_numpy(), mean.printed.get(row), recipe)
        yield cell | {"n": len(scores), "seeds": len(recipe.recipe_parts[0].grid.seeds)} | summary


def _scores(runs: Iterable[Run], metric: Metric | Perplexity, task: Any) -> dict[str, pd.Series]:
    """Return the scores by evaluation, each by seed."""
    scale = _scale(metric)
    # Runs record the default metric without its name.
    is_default = isinstance(metric, Perplexity)
    quantity = "eval_metric" if is_default else f"eval_{metric.name}"
    selected_on_test = _is_selected_on_test(task)
    scores: dict[str, dict[int | None, float]] = {"best": {}, "last": {}} if selected_on_test else {"test": {}}
    for run in runs:
        if not selected_on_test:
            values = {metric.name: run.score.metric} if is_default else run.score.values or {}
            scores["test"][run.meta.seed] = scale * values[metric.name]
            continue
        table = run.table
        # Nothing was trained at step 0.
        course = table.loc[(table["quantity"] == quantity) & (table["step"] > 0), "value"]
        best = course.max()
        if not metric.higher_is_better:
            best = course.min()
        scores["best"][run.meta.seed] = scale * best
        scores["last"][run.meta.seed] = scale * course.iloc[-1]
    return {evaluation: pd.Series(of_seeds, dtype="float64") for evaluation, of_seeds in scores.items()}


def _scale(metric: Metric | Perplexity) -> float:
    """Return the factor of a metric: accuracies, F1 scores, correlations, METEOR and ROUGE are in percent."""
    if metric.name in (*_UNBOUNDED, *_PERCENT):
        return 1.0
    return 100.0


def _is_selected_on_test(task: Any) -> bool:
    return isinstance(task, Task) and task.selected_on_test


def _summarize(scores: Float[np.ndarray, "seed"], printed: PrintedScore | None, recipe: Recipe) -> dict[str, float]:
    """Summarize the scores of the seeds, and compare them with the printed number."""
    summary: dict[str, float] = dict.fromkeys(_NUMBERS, math.nan)
    if printed is not None:
        summary |= {"printed": printed.value, "printed_sd": printed.sd, "printed_n": printed.n}
    if not len(scores):
        return summary
    estimate = t_estimate(scores)
    interval = estimate.interval(_LEVEL)
    summary |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
    summary |= {"median": float(np.median(scores)), "minimum": float(scores.min()), "maximum": float(scores.max())}
    if printed is not None:
        statistic = "mean" if recipe.paper is None else recipe.paper.statistic
        difference = summary[statistic] - printed.value
        half = _difference_error(estimate, printed).half_width(_LEVEL)
        summary |= {"difference": difference, "difference_low": difference - half, "difference_high": difference + half}
    return summary


def _difference_error(estimate: Estimate, printed: PrintedScore) -> Estimate:
    """Return the estimate of a difference to a printed number, with Welch's degrees of freedom if it has a spread."""
    if not estimate.errors or math.isnan(printed.sd) or math.isnan(printed.n):
        return estimate
    ((error, degrees),) = estimate.errors
    # Squared standard errors add, because the seeds of the paper are independent of these.
    ours, theirs = error**2, printed.sd**2 / printed.n
    welch = (ours + theirs) ** 2 / (ours**2 / degrees + theirs**2 / (printed.n - 1))
    return Estimate(estimate.mean, estimate.n, ((math.sqrt(ours + theirs), welch),))


def title_line(recipe: Recipe) -> str:
    """Return the line above the table: paper, table, model and data, and where the best state was selected."""
    words = [recipe.name]
    if recipe.paper is not None:
        words = [f"{recipe.paper.name} (arXiv {recipe.paper.arxiv}), {recipe.paper.table}"]
        if recipe.paper.caption:
            words.append(recipe.paper.caption)
    if any(_is_selected_on_test(recipe_part.grid.tasks[0]) for recipe_part in recipe.recipe_parts):
        words.append("The best evaluation is selected on the reported split")
    return ". ".join(words)


def format_cells(recipe: Recipe, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return a text table for each column of the table, by its title."""
    state = "unknown" if recipe.paper is None else recipe.paper.state
    tables = {}
    for (column, metric), cells in table.groupby(["column", "metric"], sort=False):
        lines: dict[str, dict[str, str]] = {}
        heads = ["row"]
        for record in cells.to_dict("records"):
            cell: dict[str, Any] = {str(key): value for key, value in record.items()}
            line = lines.setdefault(cell["row"], {"row": cell["row"]})
            evaluation = cell["evaluation"]
            head = {"test": "test", "best": "best evaluation", "last": "last evaluation"}[evaluation]
            heads += [head] * (head not in heads)
            line[head] = _format_score(cell, recipe)
            # A paper that does not say which evaluation it prints is compared with the best one.
            if evaluation in ("test", state) or (state == "unknown" and evaluation == "best"):
                line |= {"n": f"{cell['n']}/{cell['seeds']}", "printed": _format_printed(cell)}
                bounds = cell["difference_low"], cell["difference_high"]
                line["difference"] = _format_interval(cell["difference"], *bounds, _digits(cell))
        frame = pd.DataFrame(lines.values())[[*heads, "n", "printed", "difference"]]
        tables[f"{column}, {str(metric).replace('_', ' ')}"] = frame
    return tables


def _format_score(cell: Mapping[str, Any], recipe: Recipe) -> str:
    digits = _digits(cell)
    text = _format_interval(cell["mean"], cell["low"], cell["high"], digits)
    if recipe.paper is None or recipe.paper.statistic == "mean" or not cell["n"]:
        return text
    extremes = f"{cell['minimum']:.{digits}f} to {cell['maximum']:.{digits}f}"
    return f"{text}, median {cell['median']:.{digits}f} ({extremes})"


def _digits(cell: Mapping[str, Any]) -> int:
    """Return the number of decimals of a cell, as papers print it."""
    if cell["metric"] in _UNBOUNDED:
        return 2
    return 1


def _format_interval(value: float, low: float, high: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    if math.isnan(low):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _format_printed(cell: Mapping[str, Any]) -> str:
    if math.isnan(cell["printed"]):
        return "-"
    text = f"{cell['printed']:g}"
    if not math.isnan(cell["printed_sd"]):
        text += f" ± {cell['printed_sd']:g}"
    if not math.isnan(cell["printed_n"]):
        text += f" ({cell['printed_n']:.0f})"
    return text


def find_runs(recipe: Recipe, candidates: Iterable[Run] | None = None) -> dict[str, Run]:
    """Return the finished runs of a recipe by the names of their jobs: among candidates, or those in its folder."""
    finished: list[Any] = []
    if candidates is not None:
        finished += [run for run in candidates if run.finished]
    else:
        for folder in sorted(filter(is_run, recipe.root.glob("*"))):
            # A broken run has no score.
            if identify_folder(folder).status == "done":
                finished.append(load(folder))
    runs: dict[str, Run] = {}
    for job in recipe.jobs():
        for run in finished:
            # The run that it starts from is of a part above, so it is in the mapping already.
            if isinstance(run, Run) and _is_of(run, job) and _starts_from(run, job, runs.get(job.start)):
                runs[job.name] = run
    return runs


def _is_of(run: Run, job: Job) -> bool:
    """Return whether a run is of a job: method, data, model, seed and settings are the same."""
    assert isinstance(job.data, Task)
    source = str(job.model)
    # A run stores the full path of a folder.
    if (folder := Path(source).expanduser()).is_dir():
        source = str(folder.resolve())
    ours = (config(job.method), job.settings["seed"], job.data.hash, model_name(source))
    if ours != (run.meta.recipe, run.meta.seed, run.meta.data_hash, run.meta.model):
        return False
    overrides = {name: value for name, value in job.settings.items() if name in Settings.__dataclass_fields__}
    rates = {"lr": job.method.lr, "head_lr": job.method.head_lr}
    expected = Settings(**{**rates, "steps": 0, "epochs": 1, **overrides}).to_dict()
    return all(run.meta.settings.get(name) == expected[name] for name in expected.keys() - set(_RESOLVED))


def _starts_from(run: Run, job: Job, source: Run | None) -> bool:
    """Return whether a run has the start of a job, whose run is ``source``."""
    if job.start:
        return source is not None and run.meta.start is not None and run.meta.start.run == source.id
    # A setting may name another start, which was not opened.
    return run.meta.start is None or "start" in job.settings


def write_files(recipe: Recipe, table: pd.DataFrame, runs: Mapping[str, Run]) -> list[Path]:
    """Write ``table.csv``, ``table.md`` and, with ids and versions of the runs, ``table.json``; return their paths."""
    details = {}
    for name, run in runs.items():
        meta = run.meta
        details[name] = {"id": run.id, "model": meta.model, "device": meta.device, "versions": meta.versions}
    content = {"recipe": recipe.name, "cells": to_json_rows(table), "runs": details}
    blocks = [f"{title_line(recipe)}.\n"]
    for title, frame in format_cells(recipe, table).items():
        lines = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy()]
        blocks.append("\n".join([f"{title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""]))
    texts = {
        "table.csv": csv_text(table),
        "table.md": "\n".join(blocks),
        "table.json": json.dumps(content, indent=1),
    }
    for name, text in texts.items():
        write_bytes(recipe.root / name, text.encode())
    return [recipe.root / name for name in texts]
