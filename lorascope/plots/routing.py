"""Figures of routers: which heads the domains of a text are sent to, and how sure the routers are of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from lorascope.analysis import norms
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Chart, Drawable, Heat, Rule, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Group, Runs, axis_label, define, gather, lines
from lorascope.runs.run import Run
from lorascope.schema.module_roles import ROLES

_LOT = ", by lot"
_TEXT = "Looked at on held-out text, padding left out."
_MOST_NUMBERED = 6  # columns whose cells still have room for a number


@figure(
    needs=("gate_information",),
    reads="A cell is how much more, or less, than its even share a domain gives a head, in one layer. Rows that differ "
    "within a head are routing by domain; rows that agree are a head preferred by all, whatever the text.",
    misleads="A head has no name: head 0 of one layer, or of one seed, is none of another's, so one run is drawn and "
    "nothing is averaged. A random router sends domains apart a little, too: look at step 0, and at the line by lot "
    "in gate_course. Mean gates hide tokens that are routed sharply, but to different heads.",
)
def gates(runs: Runs, control: Runs | None = None, step: int | None = None) -> Drawable:
    """Mean gate of every domain and head less an even share, one layer a frame, one panel a recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw below it; of several seeds the first.
    step : int, optional
        The first or the last step; by default the last.
    """
    cohort = gather("gates", runs, control)
    cohort.require("gate_information")
    found = [(group, gates_by_domain(group.runs[0], step)) for group in cohort.groups]
    limit = max(float(cells["value"].abs().max()) for _, cells in found)
    panels = [_gate_heat(cohort, group, cells, limit) for group, cells in found]
    return wrap(panels, 1)


@figure(
    needs=("gate_entropy",),
    history=True,
    reads="At the dashed line every token uses all heads alike; at 0 it uses one. A fall says that routers make up "
    "their minds, not that they go by the domain: that is the second panel, as far as it lies above the line by lot.",
    misleads="A sharp router need not be a useful one, and all tokens may choose the same head: gates shows which. The "
    "text looked at is short, so even a router that knows nothing of domains stands above 0 in the second panel.",
)
def gate_course(runs: Runs, control: Runs | None = None) -> Drawable:
    """Entropy of a token's gates over the steps, and what they tell of the domain, mean over modules.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw, and what to draw beside it.
    """
    cohort = gather("gate_course", runs, control)
    cohort.require("gate_entropy", history=True)
    heads = cohort.table[cohort.table["quantity"] == "gate"].groupby("run", observed=True)["index"].max() + 1
    even = [Rule(y=math.log(number), label=f"{number} heads alike") for number in sorted(heads.unique())]
    panels = [_course_chart(cohort, "gate_entropy", _module_means(cohort, "gate_entropy"), even)]
    told = _module_means(cohort, "gate_information")
    if len(told):
        lot = _module_means(cohort, "gate_chance")
        panels.append(
            _course_chart(cohort, "gate_information", pd.concat([told, lot.assign(recipe=lot["recipe"] + _LOT)]))
        )
    return wrap(panels, len(panels))


def gates_by_domain(run: Run, step: int | None = None) -> pd.DataFrame:
    """Gates of one run by domain, at a step or at its end.

    Returns
    -------
    DataFrame
        ``step, layer, role, domain, head, gate`` and ``value``, the gate less an even share; modules of one layer and
        role count alike. A layer is a place on the axis of layers, such as "3" or "embed".
    """
    rows = run.table[run.table["quantity"] == "gate_information"].drop_duplicates("module")
    names = [f"{module}/gate_by_domain" for module in rows["module"]]
    kept = run.snapshot_steps(names[0])
    if step is not None and step not in kept:
        raise ValueError(f"gates: run {run.id} kept no gates by domain after step {step}; it did after {kept}")
    parts = [
        run.snapshot(name, kept[-1] if step is None else step).assign(layer=str(place), role=role)
        for name, place, role in zip(names, norms.place(rows), rows["role"], strict=True)
    ]
    keys = ["step", "layer", "role", "domain", "head"]
    cells = pd.concat(parts).groupby(keys, sort=False)["value"].mean().rename("gate").reset_index()
    return cells.assign(value=cells["gate"] - 1 / cells["head"].nunique())


def _gate_heat(cohort: Cohort, group: Group, cells: pd.DataFrame, limit: float) -> Chart:
    """One recipe's first run; all panels have the colours of the largest preference in any."""
    heads = sorted(cells["head"].unique())
    columns = [f"{role} {head}" for role in ROLES if role in set(cells["role"]) for head in heads]
    numbers = ".2f" if len(columns) <= _MOST_NUMBERED else None
    label = f"gate − 1/{len(heads)}"
    run = group.runs[0]
    told = f"{define('gate')} By domain, less an even share, after step {cells['step'].iloc[0]}."
    seed = run.meta.get("seed")
    which = "" if seed is None else f" (seed {seed})"
    return Chart(
        cells.assign(column=cells["role"].astype("str") + " " + cells["head"].astype("str")),
        [Heat("column", "domain", "value", label, numbers, scale="diverging", limits=(-limit, limit))],
        title=group.label,
        x=Axis(label="role and head", order=columns),
        y=Axis(order=sorted(cells["domain"].unique())),
        caption=f"{told} One run{which}, so no interval.",
        frame="layer",
        meta=cohort.meta,
    )


def _module_means(cohort: Cohort, quantity: str) -> pd.DataFrame:
    """Mean over modules, then mean and band over seeds, by recipe and step."""
    rows = cohort.table[cohort.table["quantity"] == quantity]
    means = rows.groupby(["run", "step"], observed=True)["value"].mean().reset_index()
    return band(cohort.label(means), ["recipe", "kind", "step"])


def _course_chart(cohort: Cohort, quantity: str, cells: pd.DataFrame, rules: Sequence[Rule] = ()) -> Chart:
    return Chart(
        cells.assign(quantity=quantity),
        [*rules, *lines(cells, "step")],
        x=Axis(label="step"),
        y=Axis(label=axis_label(quantity), limits=(0, None)),
        caption=cohort.caption(f"{define(quantity)} {_TEXT}"),
        colors=[*cohort.labels, *(f"{label}{_LOT}" for label in cohort.labels)],
        meta=cohort.meta,
    )
