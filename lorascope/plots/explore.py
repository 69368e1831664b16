"""Jupyter widgets to explore a run: select quantity, layers, roles and step, and see the chart and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import traitlets
from anywidget import AnyWidget
from plotly.offline import get_plotlyjs

from lorascope.analysis.norms import place
from lorascope.analysis.seed_intervals import band
from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart
from lorascope.charts.figure_plan import plan
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Rule
from lorascope.charts.theme import theme
from lorascope.files.printable import printable
from lorascope.plots.builders import ends, used_places
from lorascope.plots.run_groups import MIXTURES, Cohort, Runs, axis_label, gather, mixture_sentences
from lorascope.schema.module_roles import ROLES
from lorascope.schema.records import QUANTITIES

ALL = "all"
WHOLE = "whole run"  # layer and role of quantities that belong to no module
WIDTH = 600.0  # layout width of the chart in pixels; the chart grows with its container
_FLOW = {"flex_flow": "row wrap", "align_items": "flex-start"}
_CHART = {"flex": f"2 1 {WIDTH:.0f}px", "min_width": "0"}
_LISTING = {"flex": "1 1 340px", "max_height": "420px", "overflow": "auto"}
_COLUMNS = ("run", "step", "layer", "role", "index", "module")  # shown only if not empty
END = 2**62  # initial step: the nearest recorded step is the last one
UNSTEPPED = -1  # step of values stored without one, as in an adapter folder
_VALUE = ["recipe", "kind", "step", "module", "place", "role", "index"]
_MOST_DOTTED = 60  # largest number of values over the steps at which each has its own dot
MOST_DRAWN, MOST_LISTED = 4000, 500  # numbers of values that a browser draws and lists without a noticeable delay


class Canvas(AnyWidget):
    """Widget that shows a plotly figure given as JSON; the page sets ``dark``."""

    _esm = Path(__file__).with_name("explore.js").read_text(encoding="utf-8")
    figure = traitlets.Unicode().tag(sync=True)
    config = traitlets.Dict(plotly_backend.CONFIG).tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on_msg(lambda *_: self.send({}, [get_plotlyjs().encode()]))


class Explorer(ipywidgets.VBox):
    """Widgets, chart and table of ``explore``.

    Parameters
    ----------
    cohort : Cohort
        Runs to explore.

    Attributes
    ----------
    quantity, layers, roles, step : widget
        Input widgets: ``value`` is the selection, ``options`` the available values. Each of them limits the options of
        the next, so that every selection has rows.
    rows : DataFrame
        Selected rows of the tables of the runs.
    chart : Chart
        Chart of these rows; save it with ``explorer.chart.save("x.pdf")``.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort, self._table = cohort, _add_places(cohort.label(cohort.table))
        self._names = {id: name for group in cohort.groups for id, name in group.run_names.items()}
        known = set(self._table["quantity"])
        names = [name for name in QUANTITIES if name in known]
        self.quantity = ipywidgets.Dropdown(
            options=[(f"{name}: {axis_label(name)}", name) for name in names],
            value="update_norm" if "update_norm" in names else names[0],
            description="Quantity",
            layout={"width": "360px"},
        )
        several = {"options": [ALL], "value": [ALL], "rows": 8}
        self.layers = ipywidgets.SelectMultiple(description="Layers", **several)
        self.roles = ipywidgets.SelectMultiple(description="Roles", **several)
        self.step = ipywidgets.SelectionSlider(options=[("", END)], description="Step")
        self.note, self.listing = ipywidgets.HTML(), ipywidgets.HTML(layout=_LISTING)
        self.listing.add_class("jp-RenderedHTMLCommon")  # Jupyter's table style, in both themes
        self._settling = False
        self._pick()
        self.canvas = Canvas(
            figure=self._chart_json(False), layout=_CHART
        )  # complete from the start, because a page can miss a message sent right after
        self._show()
        single = ipywidgets.VBox([self.quantity, self.step])
        controls = ipywidgets.HBox([single, self.layers, self.roles], layout=_FLOW)
        super().__init__([controls, self.note, ipywidgets.HBox([self.canvas, self.listing], layout=_FLOW)])
        self.add_class("lorascope-explorer")
        for widget in (self.quantity, self.layers, self.roles, self.step):
            widget.observe(self._on_change, "value")
        self.canvas.observe(self._show, "dark")

    def __repr__(self) -> str:
        picked = f"layers {', '.join(self.layers.value)}; roles {', '.join(self.roles.value)}; step {self.step.label}"
        return f"Explorer({self.quantity.value}; {picked}: {len(self.rows)} rows)"

    def _on_change(self, change: Any) -> None:
        """Update after the user changes a widget; ignore the changes that this update makes itself."""
        if self._settling:
            return
        self._settling = True
        try:
            self._pick()
        finally:
            self._settling = False
        self._show()

    def _pick(self) -> None:
        """Update the options of every widget, keep selections that are still valid, and select the rows."""
        rows = self._table[self._table["quantity"] == self.quantity.value]
        rows = _narrow(self.roles, _narrow(self.layers, rows, "place"), "role")
        _offer_steps(self.step, rows)
        self.rows = self._cohort.table.loc[_at_step(rows, self.step.value).index]
        self.chart = _chart(self._cohort, self.quantity.value, band(rows, _VALUE), self.step.value)

    def _show(self, change: Any = None) -> None:
        """Send chart and table to the page, or the reason why there is no chart."""
        self.canvas.figure = self._chart_json(self.canvas.dark)
        self.canvas.layout.display = None if self.canvas.figure else "none"
        too_many = f"cannot draw {len(self.chart.data):,} values at once: select fewer layers or roles"
        self.note.value = "" if self.canvas.figure else too_many
        self.listing.value = _as_html(self.rows, self._names)

    def _chart_json(self, dark: bool) -> str:
        """Return the chart as JSON for the page, "" if it has too many values."""
        if len(self.chart.data) > MOST_DRAWN:
            return ""
        return str(plotly_backend.draw(plan(self.chart, theme("dark" if dark else "light")), WIDTH).to_json())


def explore(runs: Runs) -> Explorer:
    """Explore runs in Jupyter: select quantity, layers, roles and step, and see the chart and its table.

    Parameters
    ----------
    runs : Run, sequence of Run, or mapping label -> run or runs
        Runs to explore, as for the figures of ``plots``. The chart shows mean and interval over the seeds of a recipe.

    Returns
    -------
    Explorer
        Widget; Jupyter displays it as the last line of a cell.

    Raises
    ------
    ValueError
        The runs have no recorded values.
    """
    cohort = gather("explore", runs)
    if not cohort.table["value"].notna().any():
        raise ValueError(f"explore needs recorded values (run {cohort.runs[0].id} has none): train with observe=[...]")
    return Explorer(cohort)


def _add_places(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of quantities with a known value, with ``place``; rows of the whole run get place and role."""
    table = table[table["value"].notna().groupby(table["quantity"], observed=True).transform("any")]
    inside = table["module"] != ""
    spots = place(table[inside])
    places = [*spots.cat.categories, WHOLE]
    return table.assign(
        place=pd.Categorical(spots.astype("str").reindex(table.index, fill_value=WHOLE), places, ordered=True),
        role=pd.Categorical(table["role"].astype("str").where(inside, WHOLE), [*ROLES, WHOLE], ordered=True),
    )


def _narrow(widget: Any, rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Offer the categories of the rows, keep the selected ones that still occur, and return their rows."""
    used = rows[column].cat.remove_unused_categories().cat.categories
    kept = [name for name in widget.value if name in used] if ALL not in widget.value else []
    with widget.hold_sync():
        widget.options = [ALL, *used]
        widget.value = kept or [ALL]
        widget.disabled = len(used) < 2
    return rows[rows[column].isin(kept)] if kept else rows


def _offer_steps(widget: Any, rows: pd.DataFrame) -> None:
    """Offer the steps of the rows, and select the one nearest to the previous selection."""
    steps = sorted(map(int, rows["step"].fillna(UNSTEPPED).unique()))
    near = min(steps, key=lambda step: abs(step - widget.value))
    # Options and value go in two messages: in one, the page limits the new position to the old number of steps.
    widget.options = [("as stored" if step == UNSTEPPED else str(step), step) for step in steps]
    widget.value = near
    widget.disabled = len(steps) < 2


def _at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    return table[table["step"].fillna(UNSTEPPED) == step]


def _chart(cohort: Cohort, quantity: str, table: pd.DataFrame, step: int) -> Chart:
    """Plot values by layer and role at one step, of a single module by component, or of the whole run over the steps.

    ``table`` has the values of all steps. They determine the vertical axis, so that it is the same at every step.
    """
    cohort, entry = replace(cohort, name=quantity, needs=(quantity,)), QUANTITIES[quantity]
    y = Axis(label=axis_label(quantity))
    bounds = table[["value", "low", "high"]].to_numpy()
    known = bounds[np.isfinite(bounds)]
    if known.size and known.min() < known.max():
        low, high = float(known.min()), float(known.max())
        y = replace(y, limits=(low - 0.05 * (high - low), high + 0.05 * (high - low)))
    shown, title = _at_step(table, step), quantity.replace("_", " ")
    rules: list[Mark] = []
    if table["index"].notna().any() and table["module"].nunique() == 1:
        along, x = "index", Axis(label=entry.index.replace("_", " "))
    elif (table["module"] == "").all():
        along, x, y, shown = "step", Axis(label="step"), replace(y, limits=None), table
        rules = [Rule(x=step)] if step != UNSTEPPED else []
    else:
        along, x = "place", Axis(label="layer", order=used_places(table))
    if along != "step":
        title = f"{title}, {'as stored' if step == UNSTEPPED else f'after step {step}'}"
    caption = [cohort.caption(f"{entry.label}: {entry.definition}."), *mixture_sentences(cohort.meta.get(MIXTURES, {}))]
    marks = [*_marks(shown, along), *rules]
    return Chart(shown, marks, title=title, x=x, y=y, caption=" ".join(caption), meta=cohort.meta)


def _marks(shown: pd.DataFrame, x: str) -> list[Mark]:
    """Return dots colored by role (by recipe if there is one role), joined by lines where every place has one dot."""
    color = "role" if shown["role"].nunique() > 1 else "recipe"
    other = "recipe" if color == "role" and shown["recipe"].nunique() > 1 else None
    dots = [Point(x, "value", color, other, **ends(shown))]
    doubled = shown.loc[shown.duplicated([x, "role", "recipe"]), "role"]
    single = shown[~shown["role"].isin(doubled)] if len(doubled) else None
    if x == "index" or (single is not None and single.empty):
        return [*dots]
    bands = [Band(x, "low", "high", color, data=single)] if ends(shown) and other is None else []
    line = Line(x, "value", color, other, data=single)
    return [*bands, line, *(dots if x == "place" or len(shown) <= _MOST_DOTTED else [])]


def _as_html(rows: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Return the rows as an HTML table without empty columns, the long ones last; several runs appear by name."""
    words = dict.fromkeys(_COLUMNS, "str")
    shown = rows.head(MOST_LISTED).astype(words).fillna(dict.fromkeys(words, ""))
    shown = shown.assign(run=shown["run"].map(names) if len(names) > 1 else "")
    filled = [name for name in _COLUMNS if (shown[name] != "").any()]
    filled.insert(len(filled) - ("module" in filled), "value")
    shown = shown[filled].assign(**{name: shown[name].map(printable) for name in filled if name != "value"})
    count = f"{len(rows):,} row{'s' * (len(rows) != 1)}"
    count = count if len(rows) <= MOST_LISTED else f"First {MOST_LISTED} of {count}"
    return f"<p>{count}</p>{shown.to_html(index=False, na_rep='unknown', float_format='{:.6g}'.format, border=0)}"
