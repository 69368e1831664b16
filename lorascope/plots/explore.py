"""Jupyter widgets to explore a run: select quantity, layers, roles and step, and see the chart and its table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from lorascope.analysis.norms import place
from lorascope.charts import plotly_backend
from lorascope.charts.figure_plan import plan
from lorascope.charts.theme import theme
from lorascope.files.printable import printable
from lorascope.plots.explore_chart import UNSTEPPED, at_step, cells, values
from lorascope.plots.run_groups import Cohort, Runs, axis_label, gather
from lorascope.schema.module_roles import ROLES
from lorascope.schema.records import QUANTITIES

try:
    import ipywidgets
    import traitlets
    from anywidget import AnyWidget
except ModuleNotFoundError:
    raise ModuleNotFoundError("explore needs Jupyter widgets: pip install 'lorascope[notebook]'") from None

ALL = "all"
WHOLE = "whole run"  # layer and role of quantities that belong to no module
WIDTH = 600.0  # layout width of the chart in pixels; the chart grows with its container
_FLOW = {"flex_flow": "row wrap", "align_items": "flex-start"}
_CHART = {"flex": f"2 1 {WIDTH:.0f}px", "min_width": "0"}
_LISTING = {"flex": "1 1 340px", "max_height": "420px", "overflow": "auto"}
_COLUMNS = ("run", "step", "layer", "role", "index", "module")  # shown only if not empty
END = 2**62  # initial step: the nearest recorded step is the last one
MOST_DRAWN, MOST_LISTED = 4000, 500  # numbers of values that a browser draws and lists without a noticeable delay

# One message redraws the chart in place. The theme follows the page: light text means a dark background.
# The page requests plotly.js once. As part of this script it would take longer to load than the two seconds after
# which anywidget gives up and drops all messages of the kernel.
_SCRIPT = """
const isDark = (el) => {
  const [red, green, blue] = (getComputedStyle(el).color.match(/[\\d.]+/g) ?? [0, 0, 0]).map(Number);
  return 0.3 * red + 0.6 * green + 0.1 * blue > 128;
};
const load = (model) =>
  new Promise((resolve) => {
    model.on("msg:custom", (_, [source]) =>
      resolve(import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))),
    );
    model.send("plotly.js");
  });
export default {
  async render({ model, el }) {
    const plot = el.appendChild(document.createElement("div"));
    plot.setAttribute("role", "img");
    const follow = () => {
      if (!el.isConnected || isDark(el) === model.get("dark")) return;
      model.set("dark", isDark(el));
      model.save_changes();
    };
    const draw = () => {
      if (!model.get("figure")) return;
      const { data, layout } = JSON.parse(model.get("figure"));
      plot.setAttribute("aria-label", layout.title.text);
      Plotly.react(plot, data, layout, model.get("config"));
    };
    const theme = new MutationObserver(follow);
    theme.observe(document.body, { attributes: true });
    const size = new ResizeObserver(() => {
      const lists = el.closest(".lorascope-explorer")?.querySelectorAll("select") ?? [];
      for (const list of lists) list.setAttribute("data-lm-suppress-shortcuts", ""); // arrow keys select options
      follow();
      if (plot.layout && plot.offsetWidth) Plotly.Plots.resize(plot);
    });
    size.observe(el);
    await (window.lorascopePlotly ??= load(model));
    model.on("change:figure", draw);
    draw();
    return () => {
      size.disconnect();
      theme.disconnect();
      Plotly.purge(plot);
    };
  },
};
"""


class Canvas(AnyWidget):
    """Widget that shows a plotly figure given as JSON; the page sets ``dark``."""

    _esm = _SCRIPT
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
        self._names = {run.id: f"{one.label}, seed {run.meta.seed}" for one in cohort.groups for run in one.runs}
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
        self.rows = self._cohort.table.loc[at_step(rows, self.step.value).index]
        self.chart = values(self._cohort, self.quantity.value, cells(rows), self.step.value)

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
