"""``explore(run)``: pick quantity, layers, roles and step in Jupyter, and see chart and table together."""

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
    raise ModuleNotFoundError("explore needs Jupyter's widgets: pip install 'lorascope[notebook]'") from None

ALL = "all"
WHOLE = "whole run"  # stands for layer and role of what belongs to no module
WIDTH = 600.0  # pixels that the chart is laid out for; it spreads where there are more
_FLOW = {"flex_flow": "row wrap", "align_items": "flex-start"}
_CHART = {"flex": f"2 1 {WIDTH:.0f}px", "min_width": "0"}
_BESIDE = {"flex": "1 1 340px", "max_height": "420px", "overflow": "auto"}
_COLUMNS = ("run", "step", "layer", "role", "index", "module")  # listed where they say something
END = 2**62  # the step wished for at first: the nearest to it is the last
MOST_DRAWN, MOST_LISTED = 4000, 500  # values that a browser draws, and lists, at once without a pause

# The chart is drawn anew in its place by one message. Its theme is that of the page: light letters, dark ground.
# plotly.js comes once a page, when asked for: as part of the script it would make that load longer than the two seconds
# after which anywidget gives up and drops whatever the kernel says.
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
      for (const list of lists) list.setAttribute("data-lm-suppress-shortcuts", ""); // the arrow keys are theirs
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
    """A plotly figure, as JSON; ``dark`` is told by the page."""

    _esm = _SCRIPT
    figure = traitlets.Unicode().tag(sync=True)
    config = traitlets.Dict(plotly_backend.CONFIG).tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on_msg(lambda *_: self.send({}, [get_plotlyjs().encode()]))


class Explorer(ipywidgets.VBox):
    """The controls, chart and table of ``explore``.

    Parameters
    ----------
    cohort : Cohort
        The runs.

    Attributes
    ----------
    quantity, layers, roles, step : widget
        What is picked stands in their ``value`` and what there is to pick in their ``options``. Quantity, layers, roles
        and step narrow each other in this order, so that no choice is without rows.
    rows : DataFrame
        The rows of the runs' tables that are picked.
    chart : Chart
        What is drawn of them, such as for ``explorer.chart.save("x.pdf")``.
    """

    def __init__(self, cohort: Cohort) -> None:
        self._cohort, self._table = cohort, _add_places(cohort.label(cohort.table))
        self._names = {run.id: f"{one.label}, seed {run.meta['seed']}" for one in cohort.groups for run in one.runs}
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
        self.note, self.listing = ipywidgets.HTML(), ipywidgets.HTML(layout=_BESIDE)
        self.listing.add_class("jp-RenderedHTMLCommon")  # Jupyter's own look of a table, in either theme
        self._settling = False
        self._pick()
        self.canvas = Canvas(figure=self._chart_json(False), layout=_CHART)  # whole: a page loses what comes soon after
        self._show()
        single = ipywidgets.VBox([self.quantity, self.step])
        controls = ipywidgets.HBox([single, self.layers, self.roles], layout=_FLOW)
        super().__init__([controls, self.note, ipywidgets.HBox([self.canvas, self.listing], layout=_FLOW)])
        self.add_class("lorascope-explorer")
        for control in (self.quantity, self.layers, self.roles, self.step):
            control.observe(self._follow_choice, "value")
        self.canvas.observe(self._show, "dark")

    def __repr__(self) -> str:
        picked = f"layers {', '.join(self.layers.value)}; roles {', '.join(self.roles.value)}; step {self.step.label}"
        return f"Explorer({self.quantity.value}; {picked}: {len(self.rows)} rows)"

    def _follow_choice(self, change: Any) -> None:
        """Follow a choice; those that follow from it are none of their own."""
        if self._settling:
            return
        self._settling = True
        try:
            self._pick()
        finally:
            self._settling = False
        self._show()

    def _pick(self) -> None:
        """Offer what there is below each choice, keep what is still there, and find what is picked."""
        rows = self._table[self._table["quantity"] == self.quantity.value]
        rows = _narrow(self.roles, _narrow(self.layers, rows, "place"), "role")
        _offer_steps(self.step, rows)
        self.rows = self._cohort.table.loc[at_step(rows, self.step.value).index]
        self.chart = values(self._cohort, self.quantity.value, cells(rows), self.step.value)

    def _show(self, change: Any = None) -> None:
        """Send chart and table to the page, or say why there is no chart."""
        self.canvas.figure = self._chart_json(self.canvas.dark)
        self.canvas.layout.display = None if self.canvas.figure else "none"
        much = f"{len(self.chart.data):,} values are too many to draw: pick fewer layers or roles."
        self.note.value = "" if self.canvas.figure else much
        self.listing.value = _as_html(self.rows, self._names)

    def _chart_json(self, dark: bool) -> str:
        """The chart for the page, "" if it holds too much."""
        if len(self.chart.data) > MOST_DRAWN:
            return ""
        return str(plotly_backend.draw(plan(self.chart, theme("dark" if dark else "light")), WIDTH).to_json())


def explore(runs: Runs) -> Explorer:
    """Controls for Jupyter: pick quantity, layers, roles and step, and see chart and table of the rows together.

    Parameters
    ----------
    runs : Run, sequence of Run, or mapping label -> run or runs
        As for the figures of ``plots``; several seeds of one recipe are drawn as mean and interval.

    Returns
    -------
    Explorer
        Shows itself at the end of a cell.

    Raises
    ------
    ValueError
        Nothing was recorded.
    """
    cohort = gather("explore", runs)
    if not cohort.table["value"].notna().any():
        raise ValueError(f"explore got no recorded value (run {cohort.runs[0].id}): train with observe=[...]")
    return Explorer(cohort)


def _add_places(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of quantities of which anything is known, with ``place``; the whole run has a place and a role, too."""
    table = table[table["value"].notna().groupby(table["quantity"], observed=True).transform("any")]
    inside = table["module"] != ""
    spots = place(table[inside])
    places = [*spots.cat.categories, WHOLE]
    return table.assign(
        place=pd.Categorical(spots.astype("str").reindex(table.index, fill_value=WHOLE), places, ordered=True),
        role=pd.Categorical(table["role"].astype("str").where(inside, WHOLE), [*ROLES, WHOLE], ordered=True),
    )


def _narrow(control: Any, rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Offer the categories that the rows have, keep those that were picked, and give the rows of these."""
    used = rows[column].cat.remove_unused_categories().cat.categories
    kept = [name for name in control.value if name in used] if ALL not in control.value else []
    with control.hold_sync():
        control.options = [ALL, *used]
        control.value = kept or [ALL]
        control.disabled = len(used) < 2
    return rows[rows[column].isin(kept)] if kept else rows


def _offer_steps(control: Any, rows: pd.DataFrame) -> None:
    """Offer the steps that the rows have, and keep the one that was picked, or the nearest to it."""
    steps = sorted(map(int, rows["step"].fillna(UNSTEPPED).unique()))
    near = min(steps, key=lambda step: abs(step - control.value))
    # One after the other: in one message, the page cuts the new position off at the end of the old steps.
    control.options = [("as stored" if step == UNSTEPPED else str(step), step) for step in steps]
    control.value = near
    control.disabled = len(steps) < 2


def _as_html(rows: pd.DataFrame, names: Mapping[str, str]) -> str:
    """The rows as a table of HTML, what is long last, without columns that tell nothing; each run by its name."""
    words = dict.fromkeys(_COLUMNS, "str")
    shown = rows.head(MOST_LISTED).astype(words).fillna(dict.fromkeys(words, ""))
    shown = shown.assign(run=shown["run"].map(names) if len(names) > 1 else "")
    told = [name for name in _COLUMNS if (shown[name] != "").any()]
    told.insert(len(told) - ("module" in told), "value")
    shown = shown[told].assign(**{name: shown[name].map(printable) for name in told if name != "value"})
    count = f"{len(rows):,} row{'s' * (len(rows) != 1)}"
    count = count if len(rows) <= MOST_LISTED else f"The first {MOST_LISTED} of {count}"
    return f"<p>{count}</p>{shown.to_html(index=False, na_rep='unknown', float_format='{:.6g}'.format, border=0)}"
