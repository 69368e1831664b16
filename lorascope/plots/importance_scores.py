"""Figure of importance scores, by which an allocator selects components, over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.charts.chart import Axis, Band, Chart, Drawable, Line, Mark, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Runs, axis_label, gather
from lorascope.runs.result import Result
from lorascope.schema.records import QUANTITIES

_FATES = ("retained", "dropped")
_LOG_FROM = 100.0  # ratio of largest to smallest value above which the axis is logarithmic


@figure(
    topic="ranks",
    needs=("importance",),
    history=True,
    reads="Bands that separate early and stay separate mean a clear selection that could have been made then. Bands "
    "that overlap to the end mean that the allocator separated components with nearly equal scores.",
    misleads="The score itself decides what is dropped, so lower scores of dropped components prove nothing: compare "
    "with an independent score. Gradient-based scores fall as training converges, so compare them within a step, not "
    "over the steps.",
)
def importance(
    runs: Runs, control: Runs | None = None, module: str | None = None, quantity: str = "importance"
) -> Drawable:
    """Plot importance scores of retained and dropped components over the steps.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    module : str, optional
        Plot each component of this module, one panel per run. By default pool all modules, one panel per recipe.
    quantity : str
        Quantity of components, such as "importance" (default), "importance_lambda" or "alpha".

    Examples
    --------
    >>> ls.plots.importance(adalora[0])
    """
    cohort = gather("importance", runs, control)
    cohort.require(quantity, history=True)
    found = cohort.label(rank_allocations.components(cohort.table, quantity))
    found = found.assign(fate=found["kept"].map(dict(zip((True, False), _FATES, strict=True))))
    if module is None:
        panels = [_pooled_chart(cohort, found[found["recipe"] == label], label, quantity) for label in cohort.labels]
    else:
        panels = [_single_module_chart(cohort, found, run, module, quantity) for run in cohort.runs]
    return wrap(panels, 2)


def _pooled_chart(cohort: Cohort, own: pd.DataFrame, label: str, quantity: str) -> Chart:
    """Plot median and middle 80% of the components of one recipe, separately for retained and dropped ones."""
    over = own.groupby(["recipe", "kind", "fate", "step"], observed=True, sort=False)["value"]
    cells = over.quantile(np.array([0.1, 0.5, 0.9])).unstack().set_axis(["low", "value", "high"], axis=1)
    cells = cells.assign(n=over.count()).reset_index()
    marks = [Band("step", "low", "high", "fate"), Line("step", "value", "fate")]
    spread = f"Lines: median over the components of {cohort.sample}; bands: 10th to 90th percentile."
    return _importance_chart(
        cohort, cells, own, marks, label, quantity, f"{importance_caption(own, quantity)} {spread}"
    )


def _single_module_chart(cohort: Cohort, found: pd.DataFrame, run: Result, module: str, quantity: str) -> Chart:
    """Plot every component of one module in one run."""
    own = found[(found["run"] == run.id) & (found["module"] == module)]
    if own.empty:
        some = ", ".join(dict.fromkeys(found.loc[found["run"] == run.id, "module"].astype("str").iloc[::-1]))
        raise ValueError(
            f"importance needs a module with {quantity} in run {run.id}, got {module!r}; expected one of {some}"
        )
    cells = own[["run", "recipe", "kind", "step", "module", "index", "fate", "value"]]
    cells = cells.rename(columns={"index": "component"}).astype({"component": "int64"})
    title = f"{own['recipe'].iloc[0]}, seed {run.meta.seed}" if len(cohort.runs) > 1 else f"Components of {module}"
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
        y=Axis(label=axis_label(quantity), log=bool((values > 0).all() and values.max() > _LOG_FROM * values.min())),
        caption=caption,
        colors=_FATES if "fate" in {mark.columns().get("color") for mark in marks} else None,
        meta=cohort.meta,
    )


def importance_caption(own: pd.DataFrame, quantity: str) -> str:
    """Return the definition of the quantity and the number of retained components."""
    fates = own.drop_duplicates(["run", "module", "index"])["kept"]
    definition = f"{QUANTITIES[quantity].label}: {QUANTITIES[quantity].definition}."
    return f"{definition} Retained at the end: {fates.sum():,} of {len(fates):,} components."
