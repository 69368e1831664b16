"""Widget to explore a run: choose quantity, layers, roles and step, see chart and table, and select rows in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import traitlets
from anywidget import AnyWidget
from plotly.offline import get_plotlyjs

from lorascope.analysis.dial import Dial
from lorascope.analysis.norms import layer_places
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.analysis.sensitive_neurons import name_neurons
from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart, Drawable, Panels, wrap
from lorascope.charts.figure_plan import plan_figure
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Rule
from lorascope.charts.theme import Theme, theme
from lorascope.plots.builders import block_stretches, dots, ends, used_places
from lorascope.plots.dial_slider import DialSlider
from lorascope.plots.row_listing import list_rows
from lorascope.plots.run_groups import MIXTURES, Cohort, Runs, axis_label, gather, mixture_sentences
from lorascope.schema.module_roles import ROLES
from lorascope.schema.records import QUANTITIES

ALL = "all"
WHOLE_RUN = "whole run"  # layer and role of quantities that belong to no module
VIEWS, DIAL = ("chart", "multiples"), "dial"
_SUMS = (WHOLE_RUN, "block")  # layer and roles whose values contain those of other modules
_CHOICES = ("quantity", "layers", "roles", "step", "view", "selection")
WIDTH = 600.0  # layout width of the chart in pixels, until the page reports its own
END = 2**62  # initial step: the nearest recorded step is the last one
UNSTEPPED = -1  # step of values stored without one, as in an adapter folder
_VALUE = ["recipe", "kind", "step", "module", "place", "role", "index"]
_MOST_DOTTED = 60  # largest number of values over the steps at which each has its own dot
MULTIPLE, MOST_PANELS = 200.0, 24  # width of a panel of the multiples in pixels, and the largest number of them
MOST_NAMED = 30  # number of neurons that the chart has room for by name
MOST_DRAWN = 4000  # number of values that a browser draws without a noticeable delay


class Explorer(AnyWidget):
    """Controls, chart and table of ``explore``, as one widget.

    Parameters
    ----------
    cohort : Cohort
        Runs to explore.
    dial : Dial, optional
        Dial of one of the runs.

    Attributes
    ----------
    quantity : str
        Quantity of the rows. It can be assigned, like ``layers``, ``roles``, ``step`` and ``selection``.
    layers, roles : list of str
        Layers and roles of the rows, or ``["all"]``: all modules without whole blocks and the whole run, whose values
        are sums or norms over modules, unless the quantity has only these.
    step : int
        Recorded step, -1 for values stored without one.
    view : {"chart", "multiples", "dial"}
        One chart, small multiples (a panel per role, or per module if its values have an index), or the dial.
    part, scale : str, float
        Part of the update whose curve the dial shows, and the scale at which it shows the numbers.
    options : dict of str to list
        Values that each of these accepts. Each limits the options of the next, so that every choice has rows.
    rows : DataFrame
        Rows of the tables of the runs with this quantity, layers, roles and step.
    chart : Chart or Panels
        Figure that is shown; save it with ``explorer.chart.save("x.pdf")``. Quantities of the whole run are drawn at
        all steps.
    selection : list of int
        Index labels of the rows selected in the chart or the table. Rows leave it when they are no longer drawn.

    Raises
    ------
    traitlets.TraitError
        An assigned value is not among the options.
    """

    _esm = Path(__file__).with_name("explore.js").read_text(encoding="utf-8")
    _css = Path(__file__).with_name("explore.css").read_text(encoding="utf-8")
    quantity = traitlets.Unicode().tag(sync=True)
    layers = traitlets.List(traitlets.Unicode()).tag(sync=True)
    roles = traitlets.List(traitlets.Unicode()).tag(sync=True)
    step = traitlets.CInt().tag(sync=True)
    view = traitlets.Unicode(VIEWS[0]).tag(sync=True)
    part = traitlets.Unicode().tag(sync=True)  # names: ok
    scale = traitlets.Float(1.0).tag(sync=True)
    selection = traitlets.List(traitlets.CInt()).tag(sync=True)
    options = traitlets.Dict().tag(sync=True)
    # Number of the last choice that the page sent, and of the last one that the rest of the state contains.
    asked = traitlets.CInt(0).tag(sync=True)
    answered = traitlets.CInt(0).tag(sync=True)
    # What the page shows, and what it reports about itself.
    symbols = traitlets.Dict().tag(sync=True)
    figure = traitlets.Unicode().tag(sync=True)
    listing = traitlets.Dict().tag(sync=True)
    curves = traitlets.Dict().tag(sync=True)
    config = traitlets.Dict(plotly_backend.CONFIG).tag(sync=True)
    dark = traitlets.Bool(False).tag(sync=True)
    width = traitlets.Float(WIDTH).tag(sync=True)

    def __init__(self, cohort: Cohort, dial: Dial | None = None) -> None:
        self._cohort, self._table = cohort, _add_places(cohort.label(cohort.table))
        self._run_names: dict[str, str] = {}
        for group in cohort.groups:
            self._run_names |= group.run_names
        recorded = set(self._table["quantity"])
        self._names = [name for name in QUANTITIES if name in recorded]
        first = self._names[0]
        if "update_norm" in recorded:
            first = "update_norm"
        self._settling = True
        self._slider: DialSlider | None = None
        dial_state: dict[str, Any] = {}
        self._fixed_options: dict[str, list[Any]] = {"view": [*VIEWS]}
        if dial is not None:
            self._slider = DialSlider(dial)
            self._fixed_options = {"view": [*VIEWS, DIAL], "part": self._slider.part_names, "scale": self._slider.stops}
            dial_state = {"part": self._slider.part_names[0], "curves": self._draw_curves()}
        # The state is complete from the start, because a page can miss a message sent right after.
        symbols = {name: axis_label(name) for name in self._names}
        state = dial_state | self._settle(first, [ALL], [ALL], END, VIEWS[0], [])
        super().__init__(symbols=symbols, **state)
        self._settling = False
        # The page asks for plotly.js, because a script that contains it loads longer than anywidget waits.
        self.on_msg(lambda *_: self.send({}, [get_plotlyjs().encode()]))

    def __repr__(self) -> str:
        picked = f"layers {', '.join(self.layers)}; roles {', '.join(self.roles)}; step {_step_label(self.step)}"
        return f"Explorer({self.quantity}; {picked}: {len(self.rows)} rows)"

    @property
    def chart(self) -> Drawable:
        """Figure that is shown."""
        if self._slider is not None and self.view == DIAL:
            return self._slider.draw(self.part)
        return self._chart

    @property
    def selected(self) -> pd.DataFrame:
        """Rows selected in the chart or the table, in the order of the tables of the runs."""
        return self._cohort.table.loc[sorted(self.selection)]

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take over choices of the page as far as they have rows: it may not have shown the present options yet."""
        choices = {name: value for name, value in sync_data.items() if name in _CHOICES}
        with self.hold_sync():
            if choices:
                self._choose(**choices)
            settled = {name: getattr(self, name) for name in choices}
            super().set_state({**sync_data, **settled})
            self.answered = self.asked
        if changed := [name for name, value in choices.items() if settled[name] != value]:
            self.send_state(changed)

    @traitlets.validate("quantity", "layers", "roles", "step", "view", "part", "scale")
    def _require_options(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name not in self.options:
            raise traitlets.TraitError(f"{name} requires a dial: explore(run, dial=ls.dial(run, ...))")
        allowed = self.options[name]
        for choice in value if isinstance(value, list) else [value]:
            if choice not in allowed:
                options = list(map(repr, allowed))
                if len(options) > 20:
                    options[10:-1] = ["..."]
                raise traitlets.TraitError(f"{name} must be one of {', '.join(options)}, got {choice!r}")
        return value

    @traitlets.validate("selection")
    def _require_drawn(self, proposal: Any) -> Any:
        for label in proposal["value"]:
            if label not in self._cells:
                raise traitlets.TraitError(f"selection must contain index labels of drawn rows, got {label}")
        return proposal["value"]

    @traitlets.observe("quantity", "layers", "roles", "step", "view")
    def _on_choice(self, change: Any) -> None:
        """Update everything after a choice; ignore the changes that this update makes itself."""
        if not self._settling:
            self._choose()

    def _choose(self, **choices: Any) -> None:
        """Update everything for some new choices."""
        present = {name: getattr(self, name) for name in _CHOICES}
        self._settling = True
        try:
            with self.hold_sync():
                for name, value in self._settle(**{**present, **choices}).items():
                    self.set_trait(name, value)
        finally:
            self._settling = False

    @traitlets.observe("dark", "width")
    def _on_page(self, change: Any) -> None:
        """Redraw for the theme and the width of the page, which determines the rows of the multiples."""
        if self.view == "multiples":
            self._choose()
        else:
            self.figure = self._draw()
        self.curves = self._draw_curves()

    def _settle(
        self, quantity: str, layers: list[str], roles: list[str], step: int, view: str, selection: list[int]
    ) -> dict[str, Any]:
        """Select the rows, and return the state: the options, every choice that is still valid, figure and table."""
        of_quantity = self._table[self._table["quantity"] == quantity]
        layer_options, layers, rows = _narrow(of_quantity, "place", layers)
        role_options, roles, rows = _narrow(rows, "role", roles)
        steps = sorted(map(int, rows["step"].fillna(UNSTEPPED).unique()))
        step = min(steps, key=lambda recorded: abs(recorded - step))
        self.rows = self._cohort.table.loc[_at_step(rows, step).index]
        sketch = _Sketch(self._cohort, quantity, step, frozenset(of_quantity["role"]), seed_cells(rows, _VALUE))
        self._title = sketch.title
        self._chart = sketch.draw_multiples(self.width) if view == "multiples" else sketch.draw()
        # Number of the drawn value of each row: `seed_cells` numbers them in order of first appearance, too.
        cells = rows.groupby(_VALUE, observed=True, dropna=False, sort=False).ngroup()
        self._cells = cells[cells.isin(self._drawn_values().index)]
        return {
            "options": {"quantity": self._names, "layers": layer_options, "roles": role_options, "step": steps}
            | self._fixed_options,
            "quantity": quantity,
            "layers": layers,
            "roles": roles,
            "step": step,
            "view": view,
            "selection": [label for label in selection if label in self._cells],
            "figure": self._draw(),
            "listing": list_rows(self._listed_rows(), self._run_names) | {"title": self._title, "note": self._note()},
        }

    def _drawn_values(self) -> pd.DataFrame:
        return pd.concat([chart.data for chart in self._chart.panels])

    def _listed_rows(self) -> pd.DataFrame:
        """Return the rows in the order of the table: those of named neurons by value, all others as recorded."""
        if "neuron" not in self._drawn_values():
            return self.rows
        return self.rows.sort_values("value", ascending=False, kind="stable")

    def _note(self) -> str:
        """Return the reason why there is no chart, "" if there is one."""
        number, panels = len(self._drawn_values()), len(self._chart.panels)
        if number > MOST_DRAWN:
            return f"cannot draw {number:,} values at once: select fewer layers or roles"
        if panels > MOST_PANELS:
            return f"cannot draw {panels:,} panels at once: select fewer layers or roles"
        return ""

    def _theme(self) -> Theme:
        return theme("dark" if self.dark else "light")

    def _draw_curves(self) -> dict[str, Any]:
        """Return what the page shows of each part of the dial, {} without one."""
        if self._slider is None:
            return {}
        return self._slider.to_page(self._theme(), self.width)

    def _draw(self) -> str:
        """Return the chart as JSON for the page, "" if it has too many values; ``meta`` has the rows of each dot."""
        if self._note():
            return ""
        charts = list(map(_with_dots, self._chart.panels))
        drawable = _arrange(charts, len(self._chart.rows()[0]))
        settled = plan_figure(drawable, self._theme(), self._title)
        figure = plotly_backend.draw(settled, self.width)
        traces = iter([trace for trace in figure.data if trace.mode == "markers" and trace.hovertemplate])
        for chart, panel in zip(self._chart.panels, settled.panels, strict=True):
            for mark in panel.chart.marks_of(Point):
                labels = self._labels_by_cell(mark, panel.chart.table(mark))
                for cells, _ in panel.split(mark, None, "color", "shape"):
                    trace = next(traces)
                    trace.meta = [labels[cell] for cell in cells.index]
                    if mark in chart.marks:
                        continue
                    visible = {"marker": {"opacity": 1}}
                    trace.update(marker={"opacity": 0}, selected=visible, unselected={"marker": {"opacity": 0}})
        figure.update_layout(dragmode="select", clickmode="event+select")
        return str(figure.to_json())

    def _labels_by_cell(self, mark: Point, drawn: pd.DataFrame) -> dict[int, list[int]]:
        """Return the index labels of the rows that each dot shows, by the number of its value."""
        labels: dict[Any, list[Any]] = {}
        for cell, rows in self._cells.groupby(self._cells).groups.items():
            labels[cell] = rows.tolist()
        for column in {"smaller", "larger"} & {mark.x, mark.y}:  # dots of one seed each
            for cell, value in drawn[column].items():
                labels[cell] = [row for row in labels[cell] if self._table["value"][row] == value]
        return labels


def explore(runs: Runs, dial: Dial | None = None) -> Explorer:
    """Explore runs in Jupyter, VS Code or marimo: choose what to see, and select rows in the chart or its table.

    Parameters
    ----------
    runs : Run, sequence of Run, or mapping label -> run or runs
        Runs to explore, as for the figures of ``plots``. The chart shows mean and interval over the seeds of a recipe.
    dial : Dial, optional
        Result of ``ls.dial`` of one of the runs. A slider shows its numbers over the scale of a part of the update,
        with linear interpolation between the measured scales. Nothing is measured.

    Returns
    -------
    Explorer
        Widget, displayed as the last line of a cell; ``selected`` returns the rows selected in it.

    Raises
    ------
    ValueError
        The runs have no recorded values, or the dial is of another run or has no curve.
    """
    cohort = gather("explore", runs)
    if not cohort.table["value"].notna().any():
        raise ValueError(f"explore needs recorded values (run {cohort.runs[0].id} has none): train with observe=[...]")
    ids = [run.id for run in cohort.runs]
    if dial is not None and dial.receipt.run not in ids:
        raise ValueError(f"dial must be of run {' or '.join(ids)}, got one of run {dial.receipt.run}")
    return Explorer(cohort, dial)


def _add_places(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of quantities with a known value, with ``place``; rows of the whole run get place and role."""
    table = table[table["value"].notna().groupby(table["quantity"], observed=True).transform("any")]
    inside = table["module"] != ""
    spots = layer_places(table[inside])
    positions = spots.astype("str").reindex(table.index, fill_value=WHOLE_RUN)
    roles = table["role"].astype("str").where(inside, WHOLE_RUN)
    return table.assign(
        place=pd.Categorical(positions, [*spots.cat.categories, WHOLE_RUN], ordered=True),
        role=pd.Categorical(roles, [*ROLES, WHOLE_RUN], ordered=True),
    )


def _narrow(rows: pd.DataFrame, column: str, choices: list[str]) -> tuple[list[str], list[str], pd.DataFrame]:
    """Return the options of a column, the choices that still occur, and their rows."""
    used = list(rows[column].cat.remove_unused_categories().cat.categories)
    present = [name for name in used if name in choices]
    if ALL in choices or not present:
        # The values of the whole run and of whole blocks are sums or norms over modules, so they are not drawn next to
        # them.
        summands = rows[~rows[column].isin(_SUMS)]
        return [ALL, *used], [ALL], rows if summands.empty else summands
    return [ALL, *used], present, rows[rows[column].isin(present)]


def _step_label(step: int) -> str:
    return "as stored" if step == UNSTEPPED else str(step)


def _at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    return table[table["step"].fillna(UNSTEPPED) == step]


@dataclass(frozen=True)
class _Sketch:
    """Runs, step, roles and values that the charts of one quantity have in common.

    The values of all steps determine the vertical axis, and the roles the colors, so that both are the same at every
    step.
    """

    cohort: Cohort
    quantity: str
    step: int
    roles: frozenset[str]
    values: pd.DataFrame

    @property
    def title(self) -> str:
        """Quantity and step, which a quantity of the whole run does not have."""
        name = self.quantity.replace("_", " ")
        if (self.values["module"] == "").all():
            return name
        return f"{name}, as stored" if self.step == UNSTEPPED else f"{name}, after step {self.step}"

    def draw(self) -> Chart:
        """Plot values by layer and role at one step, of a single module by component, or of the whole run by step."""
        return self._chart(self.values, self.title)

    def draw_multiples(self, width: float) -> Drawable:
        """Plot one panel per role or, of values with an index, per module, on a page of this width in pixels."""
        names = self.values["role"].astype(str)
        if self.values["index"].notna().any():
            names = self.values["place"].astype(str) + " " + names
            if self.values["module"].groupby(names).nunique().max() > 1:
                names = self.values["module"]
        charts = []
        for name, values in self.values.groupby(names, sort=False):
            charts.append(replace(self._chart(values, str(name)), square=True))
        return _arrange(charts, round(width / MULTIPLE))

    def _chart(self, table: pd.DataFrame, title: str) -> Chart:
        cohort, entry = replace(self.cohort, name=self.quantity, needs=(self.quantity,)), QUANTITIES[self.quantity]
        y = self._axis()
        rows = _at_step(table, self.step)
        rules: list[Mark] = []
        # Components of several modules do not correspond, so that only those of one module have an axis.
        if table["index"].notna().any() and table["module"].nunique() == 1:
            along, x = "index", Axis(label=entry.index.replace("_", " "))
        elif (table["module"] == "").all():
            # All steps are drawn, and a rule marks the selected one.
            along, x, y, rows = "step", Axis(label="step"), replace(y, limits=None), table
            if self.step != UNSTEPPED:
                rules.append(Rule(x=self.step))
        # Equal values, such as those of selected neurons, have no largest ones.
        elif entry.index == "neuron" and rows["value"].nunique() > 1:
            rows, names = _largest_neurons(rows)
            along, x, y = "value", y, Axis(label=f"{len(names)} largest", order=names)
        else:
            along, x = "place", Axis(label="layer", order=used_places(table))
        caption = cohort.caption(f"{entry.label}: {entry.definition}.")
        mixtures = mixture_sentences(cohort.meta.get(MIXTURES, {}))
        color, colors = "recipe", cohort.labels
        if table["role"].nunique() > 1:
            color, colors = "role", [role for role in ROLES if role in self.roles]
        return Chart(
            rows,
            [*_marks(rows, along, color), *rules],
            title=title,
            x=x,
            y=y,
            colors=colors,
            caption=" ".join([caption, *mixtures]),
            meta=cohort.meta,
        )

    def _axis(self) -> Axis:
        """Return the axis of the values, with ends between which they are at every step."""
        axis = Axis(label=axis_label(self.quantity))
        bounds = self.values[["value", "low", "high", "smaller", "larger"]].to_numpy()
        finite = bounds[np.isfinite(bounds)]
        if not finite.size or finite.min() == finite.max():
            return axis
        low, high = float(finite.min()), float(finite.max())
        margin = 0.05 * (high - low)  # so that the lowest and the highest dot are whole
        return replace(axis, limits=(low - margin, high + margin))


def _arrange(charts: Sequence[Chart], row: int) -> Drawable:
    """Arrange panels of equal width, ``row`` in a row."""
    if len(charts) == 1:
        return charts[0]
    return Panels(wrap(charts, row).rows(), columns=row)


def _largest_neurons(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of the neurons with the largest values, with the column ``neuron``, and their names in order."""
    neurons = rows.assign(neuron=name_neurons(rows.rename(columns={"index": "neuron"})))
    names = list(neurons.groupby("neuron")["value"].max().nlargest(MOST_NAMED).index)
    return neurons[neurons["neuron"].isin(names)], names


def _marks(rows: pd.DataFrame, x: str, color: str) -> list[Mark]:
    """Return dots colored by role or recipe, joined by lines where every place has one dot."""
    other = None
    if color == "role" and rows["recipe"].nunique() > 1:
        other = "recipe"
    if x == "value":
        return dots(rows, "value", "neuron", color, shape=other)
    points = dots(rows, x, color=color, shape=other)
    # A line through several modules of one layer would only go up and down.
    doubled = rows.loc[rows.duplicated([x, "role", "recipe"]), "role"]
    single = None  # the rows of the chart
    if len(doubled):
        single = rows[~rows["role"].isin(doubled)]
    if x == "index" or (single is not None and single.empty):
        return points
    stretch = None
    if x == "place":
        joined = rows if single is None else single
        single, stretch = joined.assign(stretch=block_stretches(joined["place"])), "stretch"
    marks: list[Mark] = [Line(x, "value", color, other, stretch, data=single)]
    if ends(rows) and other is None:
        marks.insert(0, Band(x, "low", "high", color, stretch, data=single))
    if x == "place" or len(rows) <= _MOST_DOTTED:
        marks += points
    return marks


def _with_dots(chart: Chart) -> Chart:
    """Return the chart with dots, added if it has only lines: the page selects dots."""
    if chart.marks_of(Point):
        return chart
    (line,) = chart.marks_of(Line)
    return replace(chart, marks=[*chart.marks, Point(line.x, line.y, line.color, line.dash)])
