"""Figures of second moments: their singular values, ways to factor them, and the ranks and errors of their factors."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis import norms, optimizer_moments
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Axis, Band, Chart, Drawable, Heat, Line, Panels, Point, set_side_by_side, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Runs, axis_label, gather
from lorascope.schema.module_roles import ROLES

_DEALT = "dealt by lot"
_LEAST, _SKETCH, _ROW_COLUMN = "least of the rank", "S-RSI", "rows times columns (Adafactor)"
_ERRORS = {
    "moment_error": _LEAST,
    "moment_error_s_rsi": _SKETCH,
    "moment_error_rank_one": _ROW_COLUMN,
    "moment_error_dealt": f"least, {_DEALT}",
}
_WAYS = {
    "l1_p5": "S-RSI, l = 1, p = 5",
    "l2_p5": "S-RSI, l = 2, p = 5",
    "l5_p0": "S-RSI, l = 5, p = 0",
    "l5_p5": "S-RSI, l = 5, p = 5",
    "svd_lowrank": "svd_lowrank, 5 rounds, 5 to spare",
    "svd": "exact decomposition",
}
_COURSES = {
    "factor_error": "of one step's V, as the rank is chosen",
    "factor_drift": "of the exact average",
    "factor_drift_least": "of the exact average, least of the rank",
    "factor_drift_rank_one": "of the exact average, rows times columns",
}
_MOST_STEPS = 12


@figure(
    needs=("moment_sigma",),
    reads="A line falls fast where few directions carry a layer's second moment. Set it against the panel beside it, a "
    "random matrix whose rows and columns have the same sums: only what falls faster than there is more than the "
    "product of rows and columns, which Adafactor keeps too.",
    misleads="A matrix of positive entries has one large singular value whatever it holds, so a cliff after the first "
    "proves nothing. Spectra flatten while training goes on, and the average forgets slowly: an early look shows a few "
    "batches, not the loss.",
)
def second_moments(runs: Runs, control: Runs | None = None, role: str | None = None) -> Panels:
    """Singular values of Adam's second moments by layer, beside those of random matrices (Adapprox, Fig. 1).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        With ``observe.second_moments()``; one pair of panels a label.
    role : str, optional
        Of these weights alone; by default the mean over all matrices of a layer.
    """
    cohort = gather("second_moments", runs, control)
    cohort.require("moment_sigma")
    table = cohort.label(cohort.table)
    what = "all matrices of a layer" if role is None else f"role {role}"
    caption = cohort.caption(
        f"{axis_label('moment_sigma')} of V, mean of {what}, at the last look. {_DEALT[0].upper()}{_DEALT[1:]}: V over "
        "the product of its row and column sums, dealt out among all entries, scaled to the same sums.",
        interval="intervals in the data",
    )
    panels = []
    for label in cohort.labels:
        for quantity, title in (("moment_sigma", "as it is"), ("moment_sigma_dealt", _DEALT)):
            rows = optimizer_moments.by_layer(table[table["recipe"] == label], quantity, role=role)
            if rows.empty:
                raise ValueError(f"second_moments finds no second moment of role {role!r} in {label}")
            named_layers = [f"layer {place}" if place.isdigit() else place for place in rows["place"]]
            cells = band(rows.assign(layer=named_layers), ["recipe", "kind", "layer", "index"])
            named = f"{label}, {title}" if len(cohort.labels) > 1 else title
            panels.append(
                Chart(
                    cells,
                    [Line("index", "value", "layer")],
                    title=named,
                    x=Axis(label="component i", log=True),
                    y=Axis(label=axis_label("moment_sigma"), log=True),
                    caption=caption,
                    colors=list(dict.fromkeys(cells["layer"])),
                    meta=cohort.meta,
                )
            )
    return set_side_by_side(*panels)


@figure(
    needs=("moment_error",),
    reads="Lower is better. Where the line of S-RSI lies on that of the least error, rounds of multiplication find all "
    "that the decomposition would; where it passes below the flat line, factors of this rank say more of the second "
    "moment than sums by row and column.",
    misleads="An error in Frobenius norm is one of the largest entries; the step divides by the root of every one, and "
    "small entries count there as much. Against random matrices the gap is what is beyond rows and columns.",
)
def moment_error(runs: Runs, control: Runs | None = None) -> Drawable:
    """Relative error of a second moment by rank, beside Adafactor's rank one (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        With ``observe.second_moments()``; one panel a label.
    """
    cohort = gather("moment_error", runs, control)
    cohort.require("moment_error")
    table = cohort.label(cohort.table)
    caption = cohort.caption(
        "Relative error in Frobenius norm, mean over all matrices in the blocks, at the last look; l = p = 5."
    )
    panels = [
        _singular_value_curves(cohort, table[table["recipe"] == label], label, caption) for label in cohort.labels
    ]
    return wrap(panels, len(panels))


def _singular_value_curves(cohort: Cohort, table: pd.DataFrame, label: str, caption: str) -> Chart:
    parts = []
    for quantity, measure in _ERRORS.items():
        rows = norms.last(table[table["quantity"] == quantity])
        means = rows.groupby(["run", "index"], observed=True, dropna=False)["value"].mean().reset_index()
        parts.append(means.assign(measure=measure))
    found = pd.concat(parts)
    ranks = found["index"].dropna().unique()
    flat = found["index"].isna()
    everywhere = (
        found[flat].drop(columns="index").merge(pd.DataFrame({"index": [ranks.min(), ranks.max()]}), how="cross")
    )
    cells = band(pd.concat([found[~flat], everywhere]).astype({"index": int}), ["measure", "index"])
    return Chart(
        cells,
        [*_seed_band(cells, "index", "measure"), Line("index", "value", "measure"), Point("index", "value", "measure")],
        title=label if len(cohort.labels) > 1 else "",
        x=_rank_axis(cells),
        y=Axis(label=axis_label("moment_error"), limits=(0, None)),
        caption=caption,
        colors=list(_ERRORS.values()),
        meta=cohort.meta,
    )


@figure(
    needs=("factoring_error_svd",),
    reads="On the left 1 is the least error that a rank can have; how far a line stays above it is what its rounds l "
    "and its columns to spare p have missed. On the right what it takes: where the exact decomposition is no slower, "
    "there is no reason for any other.",
    misleads="Times are of one machine and the sizes of one block, each the shorter of two; beside other work they "
    "tell of that too. They do not grow evenly: some libraries multiply by a few columns more slowly than by sixteen.",
)
def factorization_methods(runs: Runs, control: Runs | None = None) -> Panels:
    """Error and time of S-RSI by rank, rounds and columns to spare, beside torch's decompositions (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        With ``observe.factorings()``; a pair of panels a label.
    """
    cohort = gather("factorization_methods", runs, control)
    cohort.require("factoring_error_svd")
    table = cohort.label(cohort.table)
    caption = cohort.caption(
        "Second moments of one block at the last look. Errors in Frobenius norm, mean over the matrices, over the mean "
        "of the exact decomposition's; times summed over the matrices."
    )
    panels = []
    for label in cohort.labels:
        found = optimizer_moments.factorings(table[table["recipe"] == label], _WAYS)
        for what, name, log in (("excess", "error / least error", False), ("seconds", "time (s)", True)):
            cells = band(found.assign(value=found[what]), ["measure", "index"])
            panels.append(
                Chart(
                    cells,
                    [
                        *_seed_band(cells, "index", "measure"),
                        Line("index", "value", "measure"),
                        Point("index", "value", "measure"),
                    ],
                    title=label if len(cohort.labels) > 1 else "",
                    x=_rank_axis(cells),
                    y=Axis(label=name, log=log),
                    caption=caption,
                    colors=list(_WAYS.values()),
                    meta=cohort.meta,
                )
            )
    return set_side_by_side(*panels)


@figure(
    needs=("factor_rank", "factor_share"),
    reads="One panel a role: a row is a layer, a column a step at which ranks were chosen, and the last. The colour is "
    "the rank over its cap, which the caption names: a row that brightens to the right needs more directions as it "
    "trains, and the brightest cells are cut off. Cells tell rank and cap where these have room, else their ratio.",
    misleads="A rank is chosen by the error of one step's factoring, which starts from factors: with a lax tolerance "
    "a rank that was once enough stays so, whatever has drifted. A cap of a quarter of the smaller side, and coarse "
    "growth, draw plateaus of their own.",
)
def factor_rank(runs: Runs, control: Runs | None = None, role: str | None = None) -> Drawable:
    """Rank of Adapprox's second moments over the steps, by layer and role.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Of Adapprox; one row of panels a label.
    role : str, optional
        Of these weights alone; by default all roles, as frames.
    """
    cohort = gather("factor_rank", runs, control)
    cohort.require("factor_rank", "factor_share")
    rows = optimizer_moments.ranks(cohort.label(cohort.table))
    rows = rows[rows["role"] == role] if role is not None else rows
    if rows.empty:
        raise ValueError(f"factor_rank finds no factors of role {role!r} in blocks")
    steps = sorted(rows["step"].unique())
    kept = [steps[round(place)] for place in np.linspace(0, len(steps) - 1, min(_MOST_STEPS, len(steps)))]
    rows = rows[rows["step"].isin(kept)].astype({"role": "str"})
    places = [place for place in rows["place"].cat.categories if (rows["place"] == place).any()]
    keys = ["recipe", "kind", "role", "place", "step"]
    rows = rows.astype({"place": "str"})
    caps = rows.groupby(keys, observed=True)[["share", "cap"]].mean().reset_index()
    cells = band(rows, keys).merge(caps, on=keys)
    cells["words"] = [f"{rank:.4g}/{cap:.4g}" for rank, cap in zip(cells["value"], cells["cap"], strict=True)]
    cells = cells.sort_values("role", key=lambda names: names.map(list(ROLES).index), kind="stable")
    caption = cohort.caption(
        "Rank k of the factors of V over the largest that a choice may take, by layer and step.",
        _caps(cells),
        *cohort.dense_moment_note(),
        interval="intervals of k in the data",
    )
    heat = Heat("step", "place", "share", "k / k_max", ".2f", limits=(0.0, 1.0), words="words")
    panels = [
        Chart(
            cells[cells["recipe"] == label],
            [heat],
            title=label if len(cohort.labels) > 1 else "",
            x=Axis(label="step", order=kept),
            y=Axis(label="layer", order=places),
            caption=caption,
            frame="role" if cells["role"].nunique() > 1 else None,
            meta=cohort.meta,
        )
        for label in cohort.labels
    ]
    return wrap(panels, len(panels))


@figure(
    needs=("factor_error",),
    reads="The error that chose the ranks, and where an exact average was kept beside the factors, how far they are "
    "from it: this is the error that the step sees. Below the line of rows times columns, the factors are worth more "
    "than Adafactor's, and above that of the least error, what they lost on the way.",
    misleads="The first error is no error of the second moment, since it compares factors with what was made of "
    "factors: it falls below the tolerance by itself as the steps go on.",
)
def factor_error(runs: Runs, control: Runs | None = None) -> Drawable:
    """Errors of Adapprox's second moments over the steps, mean over all matrices in the blocks.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Of Adapprox, best with ``observe.factor_drift()``; one panel a label.
    """
    cohort = gather("factor_error", runs, control)
    cohort.require("factor_error")
    table = cohort.label(cohort.table)
    rows = table[table["quantity"].isin(list(_COURSES)) & table["layer"].notna()].astype({"quantity": "str"})
    means = rows.groupby(["run", "recipe", "quantity", "step"], observed=True)["value"].mean().reset_index()
    cells = band(means.assign(measure=means["quantity"].map(_COURSES)), ["recipe", "measure", "step"])
    panels = [
        Chart(
            own := cells[cells["recipe"] == label],
            [*_seed_band(own, "step", "measure"), Line("step", "value", "measure"), Point("step", "value", "measure")],
            title=label if len(cohort.labels) > 1 else "",
            x=Axis(label="step"),
            y=Axis(label="relative error", log=True),
            caption=cohort.caption(
                "Relative errors in Frobenius norm, mean over factored matrices in the blocks.",
                *cohort.dense_moment_note(),
            ),
            colors=[measure for measure in _COURSES.values() if measure in set(cells["measure"])],
            meta=cohort.meta,
        )
        for label in cohort.labels
    ]
    return wrap(panels, len(panels))


def _caps(cells: pd.DataFrame) -> str:
    """The largest rank by role, and how often it was reached."""
    roles = cells.groupby("cap")["role"].unique()
    told = ", ".join(f"{cap:.4g} ({', '.join(found)})" for cap, found in roles.items())
    return f"k_max: {told}. At k_max: {100 * (cells['share'] == 1).mean():.0f} % of the cells."


def _rank_axis(cells: pd.DataFrame) -> Axis:
    return Axis(label="rank k", log=True, ticks={int(rank): str(int(rank)) for rank in sorted(cells["index"].unique())})


def _seed_band(cells: pd.DataFrame, x: str, color: str) -> list[Band]:
    return [Band(x, "low", "high", color)] if cells["low"].notna().any() else []
