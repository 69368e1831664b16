"""Course of the task loss and of the distance from the base over a training, and the checkpoint to keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.result import Result

DISTANCES = ("kl_keep", "drift_keep")


def forgetting_course(run: Result) -> pd.DataFrame:
    """Return loss and distance from the base by step, and the step to keep.

    The step to keep has the least distance of those whose loss is within one standard error of the best, the
    standard error of the mean difference of the rows. It does not cover the seed of the training.

    Parameters
    ----------
    run : Result
        Run with ``observe.kl``.

    Returns
    -------
    DataFrame
        ``step``; ``loss`` of the validation rows (nats); ``distance`` from the base on the rows to keep (nats, or
        drift); ``above``, the loss minus the lowest one; ``error``, the standard error of this difference; ``keep``,
        True at one step.

    Raises
    ------
    ValueError
        The run has no such records.
    """
    table = run.table
    losses = table[table["quantity"] == "row_loss"].pivot(index="step", columns="index", values="value")
    distances = table[table["quantity"].isin(DISTANCES)].set_index("step")["value"]
    steps = losses.index.intersection(distances.index)
    if steps.empty:
        raise ValueError(f"{run.kind} {run.label} must have records of row_loss: train with observe=[ls.observe.kl()]")
    losses = losses.loc[steps]
    best: Any = losses.mean(axis=1).idxmin()
    differences = losses - losses.loc[best]
    course = pd.DataFrame({
        "step": steps.to_numpy(),
        "loss": losses.mean(axis=1).to_numpy(),
        "distance": distances.loc[steps].to_numpy(),
        "above": differences.mean(axis=1).to_numpy(),
        "error": (differences.std(axis=1) / np.sqrt(differences.shape[1])).to_numpy(),
    })  # fmt: skip
    allowed = course[course["above"] <= course["error"]]
    return course.assign(keep=course.index == allowed["distance"].idxmin())
