"""Rotation of the leading singular subspaces of updates over the steps of one training.

The column space of an update contains its outputs, the row space is spanned by the inputs it reads. Neither depends on
how the update is split into factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from lorascope.analysis.adapter_similarity import DIRECTIONS, SIDE
from lorascope.analysis.leading_directions import Directions, chance_angle, leading_singular_vectors
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.result import Result
from lorascope.schema.module_roles import parse
from lorascope.updates import Update, principal_angles
from lorascope.updates.linalg import one_thread

SPACES = {"columns": "outputs", "rows": "inputs"}
"""Spaces of an update, and the side of the module that they belong to."""
AGAINST = ("previous", "last")
_COLUMNS = ["run", "step", "module", "stack", "layer", "role", "against", "space", "k", "angle", "largest", "chance"]


def rotations(run: Result, k: int = DIRECTIONS, modules: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure the rotation of leading subspaces by principal angles of every update to its previous and last ones.

    Updates are read one module at a time. Dense updates whose smaller side exceeds 1024 are omitted, since each of them
    requires a full SVD.

    Parameters
    ----------
    run : Result
        Series of checkpoints, or a run with ``observe.factors``.
    k : int
        Number of leading singular vectors, 8 by default; all of them if an update has fewer.
    modules : sequence of str, optional
        Modules to measure, by default all.

    Returns
    -------
    DataFrame
        ``run, step, module, stack, layer, role``; ``against``, "previous" or "last"; ``space``, "columns" or "rows";
        ``k``, the number of angles; ``angle`` and ``largest``, their mean and maximum in degrees; ``chance``, the mean
        for random subspaces. There is no row where one of the two updates is zero, not finite or absent.
    """
    updates = {step: run.updates(step) for step in run.update_steps()}
    if modules is None:
        modules = list(dict.fromkeys(chain.from_iterable(updates.values())))
    rows = []
    with one_thread():
        for module in modules:
            position = (module, *parse(module))
            steps = [step for step, step_updates in updates.items() if module in step_updates]
            if not steps:
                continue
            previous, last = None, _directions(updates[steps[-1]][module], k)
            for step in steps:
                directions = _directions(updates[step][module], k)
                if step == steps[-1]:
                    last = None  # the last update is not compared with itself
                for against, other in zip(AGAINST, (previous, last), strict=True):
                    for angles in _angles(directions, other):
                        rows.append((run.id, step, *position, against, *angles))
                previous = directions
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"layer": "Int16"})


def _directions(update: Update, k: int) -> Directions | None:
    if update.low_rank is None and min(update.shape) > SIDE:
        return None
    try:
        return leading_singular_vectors(update, k)
    except ValueError:  # NaN or infinity
        return None


def _angles(left: Directions | None, right: Directions | None) -> Iterator[tuple[str, int, float, float, float]]:
    """Yield space, number of angles, mean and largest angle in degrees, and the mean at chance level."""
    if left is None or right is None or not (k := min(left.size, right.size)):
        return
    for space, first, second in zip(SPACES, left, right, strict=True):
        angles = np.degrees(principal_angles(first[:, :k], second[:, :k]))
        yield space, k, float(angles.mean()), float(angles.max()), chance_angle(len(first), k)
