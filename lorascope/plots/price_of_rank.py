"""Figure of the price of rank: loss against parameters, and the gradient signal that the rank cannot follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.rank_prices import Price
from lorascope.charts.chart import Chart, Drawable, stack_vertically
from lorascope.charts.marks import Axis, Band, Heat, Line, Point, Rule
from lorascope.plots.figure_registry import document_result
from lorascope.schema.module_roles import ROLES

_CUT = "cut, without retraining"


@document_result
def price(price: Price) -> Drawable:
    """Plot the price of smaller ranks over their parameters, and below it the signal beyond the rank by module.

    The band is the 95% interval of the exact cut over rows, dots are retrained runs, one per seed, and the gray band is
    the spread of the seeds at the present rank. Hatched cells of the heat map are roles without an update, or modules
    where the control with drawn labels found directions.

    Parameters
    ----------
    price : Price
        Result of ``ls.price``.

    Examples
    --------
    ``priced`` is ``ls.price(run, model, task)``.

    >>> ls.plots.price(priced)
    """
    meta = {"figure": "price", "receipt": price.receipt.to_json()}
    return stack_vertically(_draw_prices(price, meta), _draw_signal(price, meta), title="Price of rank")


def _draw_prices(price: Price, meta: Mapping[str, Any]) -> Chart:
    """Draw the loss increase of cuts and of retrained runs over the number of parameters."""
    # Rank 0 has no place on a logarithmic axis, and budgets have no rank.
    ranks = price.table[price.table["rank"].fillna(0) > 0].drop_duplicates("rank")
    cuts = ranks.dropna(subset="cut").assign(kind=_CUT)
    runs = price.runs.merge(ranks[["rank", "parameters"]].astype({"rank": "int64"}), on="rank")
    names = runs["placed"].map({0: "retrained", 1: "placed by size"})
    runs = runs.assign(kind=names + runs["lr"].map(", lr {:g}".format))
    marks = [Rule(y=0), Band("parameters", "cut_low", "cut_high", "kind")]
    marks += [Line("parameters", "cut", "kind"), Point("parameters", "cut", "kind")]
    sentences = (
        f"Task loss of {price.label} against its rank {price.rank} (0), paired by row; band: 95% interval over rows."
    )
    # Only the runs of the present rank at the same rate have no change.
    reference = price.runs[price.runs["change"] == 0].drop_duplicates("seed")["loss"]
    if len(reference) > 1:
        spread = float(reference.std())
        seeds = pd.DataFrame({"parameters": ranks["parameters"], "low": -spread, "high": spread})
        marks.insert(0, Band("parameters", "low", "high", "kind", data=seeds.assign(kind="sd over seeds")))
        sentences += f" Retrained runs are paired by seed (n = {len(reference)})."
    if len(runs):
        marks.append(Point("parameters", "change", "kind", data=runs, hollow=True))
    ticks = dict(zip(ranks["parameters"], ranks["rank"].map("{:.0f}".format), strict=True))
    return Chart(
        cuts,
        marks,
        title="Loss increase at a smaller rank",
        x=Axis(label="rank (position: parameters, log scale)", log=True, ticks=ticks),
        y=Axis(label="loss increase (nats)"),
        caption=sentences,
        meta=meta,
    )


def _draw_signal(price: Price, meta: Mapping[str, Any]) -> Chart:
    """Draw the signal beyond the rank by layer and role."""
    modules = price.modules
    cells = modules.assign(layer=modules["layer"].astype("object").where(modules["layer"].notna(), "no layer"))
    # Where the control finds directions, those with real labels are no evidence.
    groups = cells.groupby(["layer", "role"], sort=False)
    cells = groups[["signal", "control"]].sum().reset_index()
    is_hatched = cells["control"] > 0
    cells["signal"] = cells["signal"].where(~is_hatched)
    directions, control = modules["directions"].sum(), modules["control"].sum()
    caption = f"{directions} directions beyond the rank, {control} with drawn labels (control)."
    limits = None
    if not directions:
        caption += (
            f" Nothing was found: a squared gradient above {price.smallest_signal:.2g} along one direction would have "
            "been. Colors reach at least as far, so that noise is pale."
        )
        bound = max(price.smallest_signal, float(np.nan_to_num(cells["signal"].abs().max())))
        limits = (-bound, bound)
    if is_hatched.any():
        caption += f" Hatched: the control found directions in {is_hatched.sum()} of {len(cells)} cells,"
        caption += " where a signal is no evidence."
    caption += " A signal does not locate the missing rank."
    # Roles in the order of a block, not of their first appearance.
    used = set(cells["role"])
    return Chart(
        cells.assign(layer=cells["layer"].astype(str)),
        [Heat("layer", "role", "signal", "signal (squared gradient)", scale="diverging", limits=limits)],
        title="Gradient signal that the factors cannot follow",
        x=Axis(label="layer", order=list(dict.fromkeys(cells["layer"].astype(str)))),
        y=Axis(order=[role for role in ROLES if role in used]),
        caption=caption,
        meta=meta,
    )
