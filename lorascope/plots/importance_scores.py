"""Figure of importance scores, by which an allocator selects components, over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorascope.analysis import rank_allocations
from lorascope.charts.chart import Chart, Drawable, wrap
from lorascope.charts.marks import Axis, Band, Line, Mark
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs, axis_label
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
    >>> ls.plots.importance({"AdaLoRA": ls.example("adalora")})
    """
    cohort = gather_runs("importance", runs, control, check=False)
    scores = [name for name, entry in QUANTITIES.items() if entry.index in ("component", "rank_id")]
    if quantity in QUANTITIES and quantity not in scores:
        raise ValueError(f"quantity must have a value per component, such as {', '.join(scores)}, got {quantity!r}")
    cohort.require(quantity, history=True)
    components = cohort.label(rank_allocations.component_course(cohort.table, quantity))
    components["fate"] = np.where(components["kept"], *_FATES)
    panels, title = [], f"{QUANTITIES[quantity].label.capitalize()} of components"
    if module is None:
        for label, rows in cohort.split(components):
            values = rows.groupby(["recipe", "kind", "fate", "step"], observed=True, sort=False)["value"]
            cells = values.quantile(np.array([0.1, 0.5, 0.9])).unstack().set_axis(["low", "value", "high"], axis=1)
            cells = cells.assign(n=values.count()).reset_index()
            marks = [Band("step", "low", "high", "fate"), Line("step", "value", "fate")]
            spread = f"Lines: median over the components of {cohort.sample}; bands: 10th to 90th percentile."
            panels.append(_importance_chart(cells, rows, marks, label, quantity, spread))
        return cohort.complete(wrap(panels, 2, title))
    names: dict[str, str] = {}
    for group in cohort.groups:
        names |= group.run_names
    for run in cohort.runs:
        of_run = components[components["run"] == run.id]
        rows = of_run[of_run["module"] == module]
        if rows.empty:
            modules = ", ".join(dict.fromkeys(of_run["module"].astype("str").iloc[::-1]))
            raise ValueError(
                f"importance needs a module with {quantity} in run {run.id}, got {module!r}; expected one of {modules}"
            )
        cells = rows[["run", "recipe", "kind", "step", "module", "index", "fate", "value"]]
        cells = cells.rename(columns={"index": "component"}).astype({"component": "int64"})
        line = Line("step", "value", "component", "fate")
        sentence = f"Components of {module}, one line each."
        panels.append(_importance_chart(cells, rows, [line], names[run.id], quantity, sentence))
    return cohort.complete(wrap(panels, 2, title))


def _importance_chart(
    cells: pd.DataFrame, rows: pd.DataFrame, marks: Sequence[Mark], title: str, quantity: str, sentence: str
) -> Chart:
    colors = None
    if marks[0].columns()["color"] == "fate":
        colors = _FATES
    values = rows["value"][rows["value"] != 0]  # a logarithmic axis omits zeros
    # One row per component: its fate is the same at all steps.
    fates = rows.drop_duplicates(["run", "module", "index"])["kept"]
    caption = f"{QUANTITIES[quantity].label}: {QUANTITIES[quantity].definition}."
    return Chart(
        cells,
        marks,
        title=title,
        x=Axis(label="step"),
        y=Axis(label=axis_label(quantity), log=bool((values > 0).all() and values.max() > _LOG_FROM * values.min())),
        caption=f"{caption} Retained at the end: {fates.sum():,} of {len(fates):,} components. {sentence}",
        colors=colors,
    )
