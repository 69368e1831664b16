"""The figure of what parameters buy: test metric against their number."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis import fourier
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Chart, Line, Point, Text
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import INTERVAL, Group, Runs, ends, gather

_SIZES = ("rank", "init_rank", "target_rank", "coefficients")
_ASIDE = 0.03  # of the range that the points span


@figure(
    needs=("test_metric",),
    reads="A point is a recipe, further left the fewer parameters it trains; a line joins the sizes of one method, "
    "written beside the points. A method is worth its parameters where its line lies above another's at equal x and "
    "the intervals do not overlap.",
    misleads="One learning rate for all sizes of a method is a choice that suits some better: a line that falls to the "
    "right may want a lower rate, not fewer parameters. The head that every method trains is counted, which at few "
    "coefficients is most of the number.",
)
def accuracy_by_parameters(runs: Runs, control: Runs | None = None) -> Chart:
    """Test metric against trained parameters (FourierFT, Figs. 1 and 4): rank against coefficients.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs on one task, of any methods and sizes.

    Raises
    ------
    ValueError
        The runs are of different tasks.
    """
    cohort = gather("accuracy_by_parameters", runs, control)
    cohort.require("test_metric")
    cohort.require_same("task")
    rows = cohort.scores()
    sizes = pd.DataFrame([_recipe_size(group) for group in cohort.groups])
    cells = band(rows, ["recipe", "kind"]).merge(sizes, on="recipe", sort=False)
    cells = cells.assign(**_label_offsets(cells))
    low, high = ends(cells)
    return Chart(
        cells,
        [
            Line("parameters", "value", "family"),
            Point("parameters", "value", "family", low=low, high=high),
            Text("right", "above", "size"),
        ],
        title="What parameters buy",
        x=Axis(label="trained parameters", log=True),
        y=Axis(label=cohort.metric),
        caption=cohort.caption(
            "Trained parameters of the last phase, the head's among them; beside a point its rank or coefficients.",
            interval=f"bars: {INTERVAL}",
        ),
        colors=dict.fromkeys(sizes["family"]),
        meta=cohort.meta,
    )


def _label_offsets(cells: pd.DataFrame) -> dict[str, pd.Series]:
    """Where the size of a point is written: a little above it and to its right, the further the longer it is.

    Of points with about as many parameters only the highest has it above, the others below.
    """
    high, low = (cells[end].fillna(cells["value"]) for end in ("high", "low"))
    wide = cells["parameters"].max() / cells["parameters"].min()
    shift = _ASIDE * (1 + 0.6 * cells["size"].str.len())
    place = np.log(cells["parameters"].to_numpy())
    near = np.abs(place[:, None] - place) <= 3 * _ASIDE * np.log(wide)
    value = cells["value"].to_numpy()
    higher = value > value[:, None]
    level = (value == value[:, None]) & (np.arange(len(value)) < np.arange(len(value))[:, None])
    side = np.where((near & (higher | level)).any(1), -1, 1)
    return {
        "right": cells["parameters"] * wide**shift,
        "above": cells["value"] + side * _ASIDE * (high.max() - low.min()),
    }


def _recipe_size(group: Group) -> dict[str, object]:
    """Trained parameters of a recipe, its size in words, and what it has in common with its other sizes."""
    first = group.runs[0]
    recipe = first.meta["recipe"]
    # An alpha that follows the rank, so that the scale is always 1, makes no other method.
    names = (*_SIZES, "alpha") if recipe.get("alpha") == recipe.get("rank") else _SIZES
    family = [part for part in first.label.split(", ") if part.partition(" ")[0] not in names]
    sizes = [recipe.get(name) for name in _SIZES]
    if not any(isinstance(size, int) for size in sizes):  # a default that goes by the weight
        sizes = sorted({len(update.coefficients) for update in fourier.updates(first).values()})
    counted = np.mean([run.meta["parameters"]["trained"] for run in group.runs])
    return {
        "recipe": group.label,
        "family": ", ".join(family),
        "size": "/".join(str(size) for size in sizes if isinstance(size, int)),
        "parameters": float(counted),
    }
