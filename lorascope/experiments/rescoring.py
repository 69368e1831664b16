"""Scores of finished runs from their stored predictions, by any metric and with an interval over test rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lorascope.array_types import Int
from lorascope.files.predictions import choice_columns
from lorascope.inputs.answer_spans import prompts_of
from lorascope.inputs.metrics import DEFAULTS, Metric, require_fit, resolve, stack_choices
from lorascope.inputs.tasks import Task
from lorascope.inputs.tokenization import class_numbers
from lorascope.methods.field_checks import default_if_none, is_integer
from lorascope.runs.run import TRAIN_AGAIN, Run

# Bounds of the 95% interval.
_QUANTILES = (0.025, 0.975)


class RescoredMetric(NamedTuple):
    """Metric of a run on its test rows with a 95% bootstrap interval, NaN without one.

    ``units`` is the number of rows, of clusters of rows, or of prompts, that are resampled.
    """

    name: str
    value: float
    low: float
    high: float
    units: int


def score(
    run: Run, task: Task, metric: str | Metric | None = None, *, bootstrap: int = 1000, seed: int = 0
) -> RescoredMetric:
    """Compute a metric of a finished run from its stored predictions, without a model.

    Parameters
    ----------
    run : Run
        Finished run of ``train``.
    task : Task
        The data of the run.
    metric : str or Metric, optional
        Metric, by default accuracy, ``choice_accuracy`` of a task with choices, ``f1_words`` of spans, or the mean
        squared error of a task with numbers. A metric of texts compares those that the run generated.
    bootstrap : int
        Number of resamples, 1000 by default; 0 for no interval. They draw test rows with replacement, or clusters of
        rows for a task with the column cluster, or prompts with their texts. The interval is between the 2.5% and 97.5%
        quantiles of the metric. It covers the choice of the test rows and not the seed of the training. METEOR takes
        seconds per resample.
    seed : int
        Seed of the resamples.

    Returns
    -------
    RescoredMetric
        ``name, value, low, high, units``.

    Raises
    ------
    ValueError
        The task is not that of the run, the metric does not fit it, or an earlier version stored the predictions
        without the classes that the metric needs.
    FileNotFoundError
        A metric of texts requires a run with ``generation``.

    Examples
    --------
    >>> task = ls.tasks.load("sentiment/movies")  # doctest: +SKIP
    >>> ls.score(run, task, "f1_macro")  # doctest: +SKIP
    """
    if not is_integer(bootstrap) or bootstrap < 0:
        raise ValueError(f"bootstrap must be an integer >= 0, got {bootstrap!r}")
    default = DEFAULTS.get(task.kind, "accuracy")
    (resolved,) = resolve([default_if_none(metric, default)])
    if run.meta.data_hash != task.hash:
        raise ValueError(f"task must be the data of run {run.id}, {run.task}, got {task.name} with different rows")
    texts = resolved.needs == "texts"
    require_fit([resolved], task, generates=texts)
    if texts and task.kind != "span":  # spans have a text per row, and may have clusters
        predicted, answers = run.texts["text"].to_numpy(), run.texts["references"].to_numpy()
        units = np.arange(len(answers))
    else:
        predicted, answers, units = _stored_predictions(run, task)
    value = _compute(resolved, predicted, answers)
    count = int(units.max()) + 1
    if not bootstrap:
        return RescoredMetric(resolved.name, value, np.nan, np.nan, count)
    order = np.argsort(units, kind="stable")
    rows_of_unit = np.split(order, np.cumsum(np.bincount(units))[:-1])
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(bootstrap):
        sample = np.concatenate([rows_of_unit[unit] for unit in generator.integers(count, size=count)])
        values.append(_compute(resolved, predicted[sample], answers[sample]))
    low, high = np.quantile(values, _QUANTILES).tolist()
    return RescoredMetric(resolved.name, value, low, high, count)


def _compute(metric: Metric, predicted: np.ndarray, answers: np.ndarray) -> float:
    """Compute a metric of a sample of units."""
    if metric.needs == "texts":
        return float(metric.compute(predicted.tolist(), answers.tolist()))
    return float(metric.compute(predicted, answers))


def _stored_predictions(run: Run, task: Task) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, "rows"]]:
    """Return the predicted and right classes or numbers of the test rows, and the unit of each."""
    # A classifier with the same labels in another order keeps its order.
    labels = run.meta.labels or task.labels
    # A run with a test size evaluates the first rows of the split.
    rows = task.split("test").head(len(run.predictions))
    if task.kind == "regression":
        # As evaluate compares them.
        answers = rows["label"].to_numpy(np.float32).astype(np.float64)
        predicted = run.predictions["predicted"].to_numpy(np.float64)
    elif task.kind == "span":
        texts = run.texts.set_index("prompt")["text"]
        # Rows with the same prompt have the same text.
        predicted = texts[prompts_of(rows)].to_numpy(object)
        answers = rows["answers"].map(lambda answers: answers or [""]).to_numpy(object)
    elif task.kind == "choice":
        table = run.predictions
        answers = rows["answer"].to_numpy(np.int64)
        predicted = stack_choices(table[choice_columns(table)].to_numpy(np.float64), rows["choices"].to_list())
    else:
        answers = class_numbers(rows, labels)
        predicted = _predicted_classes(run, answers, len(labels))
    units = np.arange(len(rows))
    # Sentences of one article depend on each other, so that single rows would give too narrow an interval.
    if "cluster" in rows:
        units = np.unique(rows["cluster"], return_inverse=True)[1]
    return predicted, answers, units


def _predicted_classes(run: Run, answers: Int[np.ndarray, "rows"], count: int) -> Int[np.ndarray, "rows"]:
    """Return the predicted classes of a run; for two classes, they follow from margins of an earlier version."""
    table = run.predictions
    if "predicted" in table:
        return table["predicted"].to_numpy(np.int64)
    if count != 2:
        raise ValueError(f"cannot score run {run.id}: its predictions have no classes. {TRAIN_AGAIN}")
    return np.where(table["margin"] > 0, answers, 1 - answers)
