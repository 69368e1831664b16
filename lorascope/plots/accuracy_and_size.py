"""Figure of the test metric by number of trained parameters."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis import fourier
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Line, Text
from lorascope.plots.builders import dots
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import INTERVAL, Group, Runs

_SIZES = ("rank", "init_rank", "target_rank", "coefficients")
_OFFSET = 0.03  # vertical distance between a point and its label, as a fraction of the range of the points


@figure(
    topic="updates",
    needs=("test_metric",),
    reads="Each point is one recipe, labeled with its rank or coefficients; lines join the sizes of one method. A "
    "method is more parameter-efficient where its line is better at the same x and the intervals do not overlap.",
    misleads="If all sizes share one learning rate, a line that gets worse to the right may need a lower rate: tune it "
    "per size. The count includes the classifier head, which dominates it at few coefficients.",
)
def accuracy_by_parameters(runs: Runs, control: Runs | None = None) -> Chart:
    """Plot accuracy, or another test metric, against size: the number of trained parameters (FourierFT, Figs. 1 and 4).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs on one task, of any methods and sizes.

    Raises
    ------
    ValueError
        The runs were trained on different tasks.

    Examples
    --------
    ``sizes`` are runs of ``ls.LoRA`` of several ranks, of ``ls.FourierFT`` and of ``ls.Full``, by label.

    >>> ls.plots.accuracy_by_parameters(sizes)
    """
    cohort = gather_runs("accuracy_by_parameters", runs, control)
    cohort.require_same("task")
    sizes = pd.DataFrame(map(_recipe_size, cohort.groups))
    cells = seed_cells(cohort.scores(), ["recipe", "kind"]).merge(sizes, on="recipe", sort=False)
    cells = cells.assign(**_label_offsets(cells))
    return cohort.complete(
        Chart(
            cells,
            [
                # A line through one size would only be in the legend.
                Line("parameters", "value", "family", data=cells[cells.duplicated("family", keep=False)]),
                *dots(cells, "parameters", color="family"),
                Text("right", "above", "size"),
            ],
            title=cohort.metric_title(" by trained parameters"),
            x=Axis(label="trained parameters", log=True),
            y=Axis(label=cohort.metric),
            caption=cohort.caption(
                "Trained parameters of the last phase, including the head; labels: rank or number of coefficients.",
                interval=f"bars: {INTERVAL}",
            ),
            colors=dict.fromkeys(sizes["family"]),
        )
    )


def _label_offsets(cells: pd.DataFrame) -> dict[str, pd.Series]:
    """Return positions of the size labels: right of and above each point, further right for longer labels.

    Among neighboring points, only the highest has its label above; the others have it below.
    """
    high, low = cells[["high", "larger", "value"]].max(axis=1), cells[["low", "smaller", "value"]].min(axis=1)
    # A logarithmic axis of one value shows about a factor of 2.
    wide = max(cells["parameters"].max() / cells["parameters"].min(), 2.0)
    # Texts are centered, so a longer one starts further to the right.
    shift = 0.02 + 0.01 * cells["size"].str.len()
    size = np.log(cells["parameters"].to_numpy())
    value = cells["value"].to_numpy()
    near = np.abs(size[:, None] - size) <= 3 * _OFFSET * np.log(wide)
    near &= np.abs(value[:, None] - value) <= 6 * _OFFSET * (high.max() - low.min())
    higher = value > value[:, None]
    # The first of equal values counts as higher, because one label has to give way.
    level = (value == value[:, None]) & (np.arange(len(value)) < np.arange(len(value))[:, None])
    side = np.where((near & (higher | level)).any(1), -1, 1)
    return {
        "right": cells["parameters"] * wide**shift,
        "above": cells["value"] + side * _OFFSET * (high.max() - low.min()),
    }


def _recipe_size(group: Group) -> dict[str, object]:
    """Return the trained parameters of a recipe, its size as text, and the label shared by all sizes of its method."""
    first = group.runs[0]
    recipe = first.meta.recipe
    # The seed of the entries does not distinguish methods either.
    names = {*_SIZES, "entry_seed"}
    # If alpha equals the rank, the scale is 1 at every size, so alpha does not distinguish methods.
    if recipe.get("alpha") == recipe.get("rank"):
        names.add("alpha")
    family, labeled_sizes = [], []
    for setting in first.label.split(", "):
        name, value = _name_and_value(setting)
        if name not in names:
            family.append(setting)
        if name in _SIZES and value.isdigit():
            labeled_sizes.append(int(value))
    sizes = [size for size in map(recipe.get, _SIZES) if isinstance(size, int)]
    if not sizes:  # the default depends on the shape of the weight
        sizes = sorted({len(update.coefficients) for update in fourier.fourier_updates(first).values()})
    return {
        "recipe": group.label,
        "family": ", ".join(family),
        "size": "/".join(map(str, sizes or labeled_sizes)),
        "parameters": float(np.mean([run.meta.parameters.trained for run in group.runs])),
    }


def _name_and_value(setting: str) -> tuple[str, str]:
    """Return the name and the value of a setting in a label, such as "rank 8" or "48 coefficients"."""
    first, _, second = setting.partition(" ")
    return (second, first) if first.isdigit() else (first, second)
