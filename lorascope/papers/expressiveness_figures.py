"""Figures of the expressiveness study in a notebook: accuracy by epoch, and the classes over the plane."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.array_types import Float
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Heat, Point
from lorascope.papers.fourierft_expressiveness import (
    ADAPTERS,
    CLASSES,
    COEFFICIENTS,
    POINTS,
    WIDTH,
    Course,
    Points,
    learn,
)
from lorascope.plots import builders
from lorascope.plots.run_groups import INTERVAL

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from torch import Tensor, nn

SEEDS = range(5)
_CELL, _REACH = 0.25, 28  # drawn region of the plane: side of a cell, and number of cells on each side of zero
_EVERY = 20  # epochs between two points of a curve
_RIGHT, _WRONG = "correct", "misclassified"
Courses = Mapping[tuple[str, int], Course]
"""Course of each adapter and seed."""


@cache
def courses() -> Courses:
    """Test the expressiveness of every adapter for every seed, which varies points, network and initialization."""
    return {(label, seed): learn(label, seed) for label in ADAPTERS for seed in SEEDS}


def accuracy_curves(by_run: Courses) -> Chart:
    """Plot expressiveness as accuracy by epoch, one line per adapter. Accuracy stays 1 once all points are right."""
    longest = max(len(course.accuracy) for course in by_run.values())
    tables = []
    for (label, seed), (accuracy, _) in by_run.items():
        # A run that ends early fits all points, so its last accuracy is 1.
        extended = accuracy + [accuracy[-1]] * (longest - len(accuracy))
        sampled = {"epoch": range(0, longest, _EVERY), "value": extended[::_EVERY]}
        tables.append(pd.DataFrame(sampled | {"run": seed, "recipe": label, "kind": "run"}))
    cells = seed_cells(pd.concat(tables), ["recipe", "kind", "epoch"])
    return builders.curves(
        cells,
        "epoch",
        ("epoch", Axis(label="training accuracy", limits=(0, 1))),
        points=False,
        title=f"Fitting eight classes with {COEFFICIENTS} parameters",
        caption=f"Training accuracy, every {_EVERY}th epoch, mean of {len({seed for _, seed in by_run})} seeds; bands: "
        f"{INTERVAL}. {CLASSES} × {POINTS} points; frozen network with one adapted {WIDTH} × {WIDTH} layer; full-batch "
        "Adam.",
        colors=list(ADAPTERS),
    )


def regions(networks: Mapping[str, nn.Module], points: Points) -> Drawable:
    """Plot expressiveness as the predicted class over the plane, with the points on top, one panel per network."""
    import torch

    panels = []
    ticks = torch.arange(-_REACH, _REACH + 1) * _CELL
    plane = torch.cartesian_prod(ticks, ticks)
    for label, model in networks.items():
        with torch.no_grad():
            right = (model(points.x).argmax(dim=1) == points.y).numpy()
            classes = model(plane).argmax(dim=1).numpy()
        across, up = _cell_centers(plane)
        cells = pd.DataFrame({"x": across, "y": up, "class": classes})
        dots = pd.DataFrame(dict(zip("xy", _cell_centers(points.x), strict=True)))
        dots["point"] = np.where(right, _RIGHT, _WRONG)
        heat = Heat("x", "y", "class", "class", limits=(0, CLASSES - 1))
        panels.append(
            Chart(
                cells,
                [heat, Point("x", "y", "point", data=dots)],
                title=f"{label}: {right.mean():.0%} correct",
                x=Axis(label="x", order=np.unique(across)),
                y=Axis(label="y", order=np.unique(up)[::-1]),
                caption="Predicted class at each position of the plane, and the training points; one seed.",
                colors=(_RIGHT, _WRONG),
            )
        )
    return set_side_by_side(*panels)


def _cell_centers(x: Float[Tensor, "points 2"]) -> Float[np.ndarray, "2 points"]:
    """Return the center of each point's cell; points outside the drawn region move to its edge."""
    return (x.numpy().T / _CELL).round().clip(-_REACH, _REACH) * _CELL
