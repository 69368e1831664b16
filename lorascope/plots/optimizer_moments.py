"""Figures of second moments: singular values, factorization methods, and ranks and errors of the factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from lorascope.analysis import norms, optimizer_moments
from lorascope.analysis.even_spacing import evenly_spaced
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, wrap
from lorascope.charts.marks import Axis, Heat, Line, Mark, Rule
from lorascope.plots.builders import course, curves, mean_over_modules, ticks_at, used_places
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import PAIR_IN_DATA, Runs, axis_label
from lorascope.schema.module_roles import ROLES

_SHUFFLED = "shuffled"
_BEST, _S_RSI = "best rank-k (SVD)", "S-RSI"
_SHUFFLED_BEST = f"{_BEST}, {_SHUFFLED}"
# Stored quantities; the last one is the error of the shuffled matrix.
_ERRORS = {
    "moment_error": _BEST,
    "moment_error_s_rsi": _S_RSI,
    "moment_error_rank_one": "row-column product (Adafactor)",
    "moment_error_dealt": _SHUFFLED_BEST,
}
_WAYS = {
    "l1_p5": "S-RSI, l = 1, p = 5",
    "l2_p5": "S-RSI, l = 2, p = 5",
    "l5_p0": "S-RSI, l = 5, p = 0",
    "l5_p5": "S-RSI, l = 5, p = 5",
    "svd_lowrank": "torch.svd_lowrank, l = 5, p = 5",
    "svd": "full SVD",
}
_COURSES = {
    "factor_error": "selection error (one step's V)",
    "factor_drift": "drift from the exact average",
    "factor_drift_least": "best rank-k of the exact average",
    "factor_drift_rank_one": "row-column product of the exact average",
}
_ROUNDING = 1e-4  # percent of the error of the SVD
_MOST_STEPS = 12  # largest number of columns whose cells have room for numbers


@figure(
    topic="optimizers",
    needs=("moment_sigma",),
    reads="Left: a steep line means that few directions carry a layer's second moment. Right: the same relative to a "
    "shuffled matrix; only what differs from 1 is not in the row and column sums, which Adafactor also stores.",
    misleads="A matrix of positive entries always has one large singular value, so a drop after the first proves "
    "nothing. Early recordings show only a few batches, and spectra flatten during training: compare late steps.",
)
def second_moments(runs: Runs, control: Runs | None = None, role: str | None = None) -> Panels:
    """Plot singular values of Adam's second moments by layer, next to a shuffled baseline (Adapprox, Fig. 1).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.second_moments()``; a pair of panels per label.
    role : str, optional
        Role of the matrices to plot; by default the mean over all matrices of a layer.

    Examples
    --------
    ``moments`` are runs of ``ls.Full`` with ``observe=[ls.observe.second_moments()]``.

    >>> ls.plots.second_moments(moments)
    """
    cohort = gather_runs("second_moments", runs, control)
    table = cohort.label(cohort.table)
    matrices = "all matrices of a layer" if role is None else f"role {role}"
    caption = cohort.caption(
        f"{axis_label('moment_sigma')} of V, mean over {matrices}, at the last recorded step. Shuffled: the ratio of V "
        "to the product of its row and column sums, permuted over all entries and rescaled to the same sums.",
        interval="intervals are in the data",
        pair=PAIR_IN_DATA,
    )
    panels = []
    for label in cohort.labels:
        of_label = table[table["recipe"] == label]
        original = optimizer_moments.average_by_layer(of_label, "moment_sigma", role=role)
        shuffled = optimizer_moments.average_by_layer(of_label, "moment_sigma_dealt", role=role)
        if original.empty:
            raise ValueError(f"second_moments needs a role with second moments, got {role!r} (label {label!r})")
        keys = ["run", "recipe", "kind", "place", "index"]
        ratios = (original.set_index(keys)["value"] / shuffled.set_index(keys)["value"]).reset_index()
        sigma = Axis(label=axis_label("moment_sigma"), log=True)
        relative = Axis(label=f"{sigma.label}, relative to shuffled")
        marks: list[Mark] = []
        for rows, title, y in ((original, "Spectrum of V", sigma), (ratios, "Relative to shuffled", relative)):
            # A place outside the blocks, such as "embed", is not a number and stays.
            layers = rows["place"].str.replace(r"^(\d+)$", r"layer \1", regex=True)
            cells = seed_cells(rows.assign(layer=layers), ["recipe", "kind", "layer", "index"])
            panels.append(
                Chart(
                    cells,
                    [*marks, Line("index", "value", "layer")],
                    title=_join_title(cohort.title(label), title),
                    x=Axis(label="component i", log=True),
                    y=y,
                    caption=caption,
                    colors=dict.fromkeys(cells["layer"]),
                )
            )
            marks = [Rule(y=1.0, label=_SHUFFLED)]
    return cohort.complete(set_side_by_side(*panels, title="Singular values of second moments"))


@figure(
    topic="optimizers",
    needs=("moment_error",),
    reads="Left: below the flat line, factors of this rank describe the second moment better than Adafactor's "
    "row-column product. Right: where S-RSI meets the SVD, power iterations lose nothing; below 1, factors use "
    "structure that row and column sums do not have.",
    misleads="The largest entries dominate the Frobenius norm, but the optimizer divides by the root of every entry, "
    "so small ones matter as much. A ratio near 1 at every rank means that factors only follow the row and column "
    "sums.",
)
def moment_error(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot the relative error of factored second moments by rank, and of Adafactor's rank one (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.second_moments()``; a pair of panels per label.

    Examples
    --------
    ``moments`` are runs of ``ls.Full`` with ``observe=[ls.observe.second_moments()]``.

    >>> ls.plots.moment_error(moments)
    """
    cohort = gather_runs("moment_error", runs, control)
    caption = cohort.caption(
        "Relative error in Frobenius norm, mean over all matrices in blocks, at the last recorded step; S-RSI with "
        "l = p = 5."
    )
    panels = []
    error = Axis(label=axis_label("moment_error"), limits=(0, None))
    ratio = Axis(label="error / error of shuffled")
    for label, table in cohort.split(cohort.select(*_ERRORS)):
        errors = _errors_by_rank(table)
        by_measure = errors.set_index(["run", "index", "measure"])["value"].unstack("measure")
        ratios = by_measure[[_BEST, _S_RSI]].div(by_measure[_SHUFFLED_BEST], axis=0)
        ratios = ratios.reset_index().melt(["run", "index"], var_name="measure")
        panels += [
            _by_rank(errors, error, _join_title(cohort.title(label), "Error"), caption, _ERRORS.values()),
            _by_rank(
                ratios,
                ratio,
                _join_title(cohort.title(label), "Relative to shuffled"),
                caption,
                _ERRORS.values(),
                Rule(y=1.0, label=_SHUFFLED),
            ),
        ]
    return cohort.complete(set_side_by_side(*panels, title="Error of factored second moments by rank"))


@figure(
    topic="optimizers",
    needs=("factoring_error_svd",),
    reads="Left: how far the error exceeds that of the full SVD; a high line has too few power iterations l or too "
    "little oversampling p. Right: time; where the full SVD is no slower, no other method is needed.",
    misleads="Times are from one machine and the shapes of one block, the shorter of two runs, and other processes "
    "distort them: measure on your machine. They do not grow evenly, because some libraries multiply by few columns "
    "more slowly than by sixteen.",
)
def factorization_methods(runs: Runs, control: Runs | None = None) -> Panels:
    """Plot error and time of factorizing second moments by S-RSI, with its settings, and by torch's SVDs (Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs with ``observe.factorings()``; one pair of panels per label.

    Examples
    --------
    ``moments`` are runs of ``ls.Full`` with ``observe=[ls.observe.factorings()]``.

    >>> ls.plots.factorization_methods(moments)
    """
    cohort = gather_runs("factorization_methods", runs, control)
    caption = cohort.caption(
        "Second moments of one block at the last recorded step. Errors: mean Frobenius error over the matrices; no dot "
        "where it equals that of the full SVD. Times: sum over the matrices."
    )
    panels = []
    y_axes = {
        "Error above that of the full SVD": Axis(label="excess error (%)", log=True),
        "Time": Axis(label="time (ms)", log=True),
    }
    for label, table in cohort.split(cohort.label(cohort.table)):
        factorings = optimizer_moments.compare_factorings(table, _WAYS)
        # Rounding errors are not drawn.
        excess = (100 * (factorings["excess"] - 1)).where(lambda percent: percent > _ROUNDING)
        for values, (title, y) in zip((excess, 1000 * factorings["seconds"]), y_axes.items(), strict=True):
            rows = factorings.assign(value=values)
            panel_title = ": ".join(filter(None, (cohort.title(label), title)))
            panels.append(_by_rank(rows, y, panel_title, caption, _WAYS.values()))
    return cohort.complete(set_side_by_side(*panels, title="Factorizations of second moments"))


@figure(
    topic="optimizers",
    needs=("factor_rank", "factor_share"),
    reads="Color is the rank divided by its cap (see the caption), by layer and step, one panel per role. Rows that "
    "brighten to the right need more directions during training; the brightest cells are limited by the cap.",
    misleads="The selection error starts from factors, so with a loose tolerance a sufficient rank persists despite "
    "drift: check factor_error. Plateaus also come from the cap (a quarter of the smaller side by default) and from "
    "coarse growth.",
)
def factor_rank(runs: Runs, control: Runs | None = None, role: str | None = None) -> Drawable:
    """Plot the rank of Adapprox's second moments by layer, role and step.

    Columns are steps at which ranks were selected and the last step; at most 12 columns. Cells below the cap print the
    rank if there is room.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of Adapprox; one panel per label.
    role : str, optional
        Role to plot; by default all roles, as frames.

    Examples
    --------
    ``adapprox`` is a run of ``ls.Adapprox``.

    >>> ls.plots.factor_rank(adapprox)
    """
    cohort = gather_runs("factor_rank", runs, control)
    rows = optimizer_moments.factor_ranks(cohort.label(cohort.table))
    if role is not None:
        rows = rows[rows["role"] == role]
    if rows.empty:
        raise ValueError(f"factor_rank needs a role with factors in blocks, got {role!r}")
    steps = evenly_spaced(sorted(rows["step"].unique()), _MOST_STEPS)
    rows = rows[rows["step"].isin(steps)]
    layers = used_places(rows)  # in the order of the axis, which text does not have
    keys = ["recipe", "kind", "role", "place", "step"]
    rows = rows.astype({"role": "str", "place": "str"})
    caps = rows.groupby(keys, observed=True)[["share", "cap"]].mean().reset_index()
    cells = seed_cells(rows, keys).merge(caps, on=keys)
    # Numbers where the rank was selected, and not limited by its cap.
    cells["words"] = cells["value"].map("{:.4g}".format).where(cells["share"] < 1, "")
    # Frames follow the order of the roles in a block.
    cells = cells.sort_values("role", key=lambda names: names.map(list(ROLES).index), kind="stable")
    by_cap = ", ".join(
        f"{cap:.4g} ({', '.join(roles)})" for cap, roles in cells.groupby("cap")["role"].unique().items()
    )
    caption = cohort.caption(
        f"Rank k of the factors of V by layer and step; its cap k_max is {by_cap}. Cells without a number are at the "
        f"cap: {100 * (cells['share'] == 1).mean():.0f}%.",
        *cohort.method_notes(),
        interval="intervals of k are in the data",
        pair=PAIR_IN_DATA,
    )
    heat = Heat("step", "place", "share", "rank / cap", ".2f", limits=(0.0, 1.0), words="words")
    settings: dict[str, Any] = {
        "x": Axis(label="step", order=steps),
        "y": Axis(label="layer", order=layers),
        "caption": caption,
        "frame": "role" if cells["role"].nunique() > 1 else None,
    }
    panels = [Chart(rows, [heat], title=cohort.title(label), **settings) for label, rows in cohort.split(cells)]
    return cohort.complete(wrap(panels, len(panels), "Rank of second moments (no number: at its cap)"))


@figure(
    topic="optimizers",
    needs=("factor_error",),
    reads="The selection error decides the ranks; drift from the exact average, if recorded, is the error that the "
    "step sees. Drift below the row-column product beats Adafactor, and its gap to the best rank-k was lost over the "
    "steps.",
    misleads="The selection error compares factors with a matrix made from factors, so it falls below the tolerance by "
    "itself. It does not measure the error of the second moment: record observe.factor_drift() for that.",
)
def factor_error(runs: Runs, control: Runs | None = None) -> Drawable:
    """Plot the errors of Adapprox's second moments over the steps, averaged over all factored matrices in blocks.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of Adapprox, ideally with ``observe.factor_drift()``; one panel per label.

    Examples
    --------
    ``factored`` are runs of ``ls.Adapprox`` with ``observe=[ls.observe.factor_drift(...)]``.

    >>> ls.plots.factor_error(factored)
    """
    cohort = gather_runs("factor_error", runs, control)
    rows = cohort.select(*_COURSES).dropna(subset="layer").astype({"quantity": "str"})
    means = mean_over_modules(rows, "quantity")
    cells = seed_cells(means.assign(measure=means["quantity"].map(_COURSES)), ["recipe", "measure", "step"])
    caption = cohort.caption(
        "Relative errors in Frobenius norm, mean over the factored matrices in blocks.", *cohort.method_notes()
    )
    measured = set(cells["measure"])
    colors = [measure for measure in _COURSES.values() if measure in measured]
    settings: dict[str, Any] = {"color": "measure", "whiskers": False, "caption": caption, "colors": colors}
    y = Axis(label="relative error", log=True)
    panels = [course(rows, y, title=cohort.title(label), **settings) for label, rows in cohort.split(cells)]
    return cohort.complete(wrap(panels, len(panels), "Errors of Adapprox's second moments"))


def _join_title(label: str, title: str) -> str:
    """Return the title of one of the panels of a label, which has none if it is the only one."""
    return f"{label}, {title}".removeprefix(", ")


def _errors_by_rank(table: pd.DataFrame) -> pd.DataFrame:
    """Average the errors of second moments over the matrices of each run: ``run, index, measure, value``."""
    means = []
    for quantity, measure in _ERRORS.items():
        rows = norms.last_recorded(table[table["quantity"] == quantity])
        over_modules = rows.groupby(["run", "index"], observed=True, dropna=False)["value"]
        means.append(over_modules.mean().reset_index().assign(measure=measure))
    errors = pd.concat(means)
    is_flat = errors["index"].isna()  # an error without a rank is drawn at both ends
    ranks = pd.DataFrame({"index": [errors["index"].min(), errors["index"].max()]})
    at_ends = errors[is_flat].drop(columns="index").merge(ranks, how="cross")
    return pd.concat([errors[~is_flat], at_ends]).astype({"index": int})


def _by_rank(rows: pd.DataFrame, y: Axis, title: str, caption: str, colors: Iterable[str], *marks: Mark) -> Chart:
    """Plot one line per measure over the rank."""
    cells = seed_cells(rows, ["measure", "index"])
    axes = (Axis(label="rank k", log=True, ticks=ticks_at(cells["index"].astype(int))), y)
    settings: dict[str, Any] = {"title": title, "caption": caption, "colors": colors}
    return curves(cells, "index", axes, *marks, color="measure", whiskers=False, **settings)
