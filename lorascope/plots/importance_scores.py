"""Figures of importance: the scores by which an allocator ranks components, over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.charts.chart import Axis, Band, Chart, Drawable, Line, Mark, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Runs, axis_label, gather
from lorascope.runs.run import Run
from lorascope.schema.records import QUANTITIES

_FATES = ("kept", "dropped")
_WIDE = 100.0  # ratio of the ends from which on a quantity is drawn on a logarithmic axis


@figure(
    needs=("importance",),
    history=True,
    reads="Bands that part early and stay apart mean that the choice was clear and could have been made then; bands "
    "that overlap to the end mean that the cut went through components that the score hardly tells apart.",
    misleads="The score itself dropped what it calls unimportant: that the dropped lie lower proves nothing. A score "
    "made of gradients falls as the training converges, so its order within one step counts, not its course.",
)
def importance(
    runs: Runs, control: Runs | None = None, module: str | None = None, quantity: str = "importance"
) -> Drawable:
    """Importance over the steps: of all components, kept ones against dropped ones, or of each component of a module.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    module : str, optional
        Lines for each component of this module, one panel a run. By default all modules together, one panel a recipe.
    quantity : str
        Another quantity of components, such as "importance_lambda" or "alpha".
    """
    cohort = gather("importance", runs, control)
    cohort.require(quantity, history=True)
    found = cohort.label(rank_allocations.components(cohort.table, quantity))
    found = found.assign(fate=found["kept"].map({True: "kept", False: "dropped"}))
    if module is None:
        panels = [_pooled_chart(cohort, found[found["recipe"] == label], label, quantity) for label in cohort.labels]
    else:
        panels = [_single_module_chart(cohort, found, run, module, quantity) for run in cohort.runs]
    return wrap(panels, 2)


def _pooled_chart(cohort: Cohort, own: pd.DataFrame, label: str, quantity: str) -> Chart:
    """The middle of all components of one recipe, by what became of them."""
    over = own.groupby(["recipe", "kind", "fate", "step"], observed=True, sort=False)["value"]
    cells = over.quantile(np.array([0.1, 0.5, 0.9])).unstack().set_axis(["low", "value", "high"], axis=1)
    cells = cells.assign(n=over.count()).reset_index()
    marks = [Band("step", "low", "high", "fate"), Line("step", "value", "fate")]
    spread = f"Lines: median over all modules of {cohort.sample}; bands: the middle 80 % of the components."
    return _importance_chart(
        cohort, cells, own, marks, label, quantity, f"{importance_caption(own, quantity)} {spread}"
    )


def _single_module_chart(cohort: Cohort, found: pd.DataFrame, run: Run, module: str, quantity: str) -> Chart:
    """Every component of one module in one run."""
    own = found[(found["run"] == run.id) & (found["module"] == module)]
    if own.empty:
        some = ", ".join(dict.fromkeys(found.loc[found["run"] == run.id, "module"].astype("str").iloc[::-1]))
        raise ValueError(f"importance: run {run.id} has no {quantity} of {module!r}; it has that of {some}")
    cells = own[["run", "recipe", "kind", "step", "module", "index", "fate", "value"]]
    cells = cells.rename(columns={"index": "component"}).astype({"component": "int64"})
    title = f"{own['recipe'].iloc[0]}, seed {run.meta['seed']}" if len(cohort.runs) > 1 else f"Components of {module}"
    caption = f"{importance_caption(own, quantity)} Components of {module}, one line each."
    return _importance_chart(cohort, cells, own, [Line("step", "value", "component", "fate")], title, quantity, caption)


def _importance_chart(
    cohort: Cohort,
    cells: pd.DataFrame,
    own: pd.DataFrame,
    marks: Sequence[Mark],
    title: str,
    quantity: str,
    caption: str,
) -> Chart:
    values = own["value"][own["value"] != 0]
    return Chart(
        cells,
        marks,
        title=title,
        x=Axis(label="step"),
        y=Axis(label=axis_label(quantity), log=bool((values > 0).all() and values.max() > _WIDE * values.min())),
        caption=caption,
        colors=_FATES if "fate" in {mark.columns().get("color") for mark in marks} else None,
        meta=cohort.meta,
    )


def importance_caption(own: pd.DataFrame, quantity: str) -> str:
    """What the quantity is, and how many components were kept."""
    fates = own.drop_duplicates(["run", "module", "index"])["kept"]
    definition = f"{QUANTITIES[quantity].label}: {QUANTITIES[quantity].definition}."
    return f"{definition} Of {len(fates):,} components {fates.sum():,} are in use in the end."
