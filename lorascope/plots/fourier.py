"""Figures of updates made of few frequencies: where these lie, what the update looks like, and where they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from lorascope.analysis import fourier as analysis
from lorascope.analysis import initial_update
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import (
    Axis,
    Chart,
    Drawable,
    Heat,
    Line,
    Panels,
    Point,
    set_side_by_side,
    stack_vertically,
    wrap,
)
from lorascope.plots.registry import FREQUENCIES, UPDATES, figure
from lorascope.plots.run_groups import INTERVAL, Cohort, Group, Runs, gather, lines
from lorascope.plots.subspaces import common_module
from lorascope.runs.run import Run
from lorascope.updates.fourier import Fourier

_FAINT = 0.01  # of the largest coefficient
_REACH = 4.0  # in units of an image's own root mean square


@figure(
    needs=(FREQUENCIES,),
    reads="A dot is a frequency that trains, the larger and brighter the more its coefficient holds; the middle is "
    "frequency zero. The profile below sums up by distance from there: a flat line says that all frequencies, coarse "
    "and fine, were put to use alike.",
    misleads="The entries are drawn by lot and nothing else trains: where there is no dot, nothing could have grown. "
    "Rows and columns of a weight have no order, so that a low frequency is nothing smooth in the model. Without the "
    "start, which is random, the coefficients show mostly that.",
)
def fourier_spectrum(runs: Runs, control: Runs | None = None, module: str | None = None) -> Panels:
    """Trained frequencies and how large their coefficients became, one panel a recipe, above their profile by radius.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of FourierFT. Where all of them kept the factors at step 0, what was learned since is drawn.
    module : str, optional
        An adapted module; by default the one with the largest update.
    """
    cohort = gather("fourier_spectrum", runs, control)
    cohort.require(FREQUENCIES)
    held = [analysis.updates(run) for run in cohort.runs]
    module = common_module(cohort, held, module)
    added = [analysis.since_start(run) for run in cohort.runs]
    since = " since the start" if all(module in updates for updates in added) else ""
    chosen = added if since else held
    found = {run.id: updates[module] for run, updates in zip(cohort.runs, chosen, strict=True)}
    caption = cohort.caption(
        f"Coefficients of {module}{since}, root mean square over seeds; colours begin at 1 % of the largest. An entry "
        "and its mirror (−j, −k) are one cosine: both are drawn. Below, their root mean square in rings around zero.",
        interval=f"bands: {INTERVAL}",
    )
    planes = [_frequency_plane(cohort, group, found, caption) for group in cohort.groups]
    return stack_vertically(set_side_by_side(*planes), _radius_profile(cohort, found, caption))


@figure(
    needs=(UPDATES,),
    reads="The entries of one module's update as a picture. Stripes along rows or columns are single outputs or inputs "
    "that one component of a low-rank update serves; FourierFT's waves run through all of it and touch every weight.",
    misleads="Each image is in units of its own root mean square, so that no colour says which update is larger, and "
    "it is a corner of the matrix. Rows and columns have no order of their own. FourierFT's update holds its random "
    "start as well, unless what training added is asked for.",
)
def update_image(
    runs: Runs, control: Runs | None = None, module: str | None = None, cells: int = 64, added: bool = False
) -> Drawable:
    """The update of one module as an image, one panel a recipe, of its first run.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        What to draw; recipes with the same number of parameters compare best.
    module : str, optional
        An adapted module; by default the one with the largest update.
    cells : int
        The first so many rows and columns are drawn.
    added : bool
        Draw what training added to an update that does not start at zero, such as FourierFT's.
    """
    cohort = gather("update_image", runs, control)
    cohort.require(UPDATES)
    updates_of = initial_update.learned_updates if added else Run.updates
    held = {group.label: updates_of(group.runs[0]) for group in cohort.groups}
    module = common_module(cohort, list(held.values()), module)
    told = [
        f"What training added to {module}" if added else f"ΔW of {module}",
        *(cohort.missing_initial_updates() if added else []),
    ]
    panels = [_image(cohort, label, updates[module].dense(), told, cells) for label, updates in held.items()]
    return wrap(panels, len(panels))


def frequency_bias(
    shape: tuple[int, int] = (768, 768),
    centers: Sequence[float] = (0, 100, 200, 350, 480),
    width: float = 200.0,
) -> Panels:
    """How likely FourierFT draws a frequency, by distance from zero and as maps (FourierFT, Eq. 5 and Fig. 3).

    Parameters
    ----------
    shape : (int, int)
        Of the weight.
    centers : sequence of float
        Radii around which the bands lie.
    width : float
        Of all bands.
    """
    caption = (
        f"Probability of a draw against that of the likeliest place, for bands around each center, of width {width:g}, "
        f"in the spectrum of a {shape[0]} × {shape[1]} weight. Worked out, not measured."
    )
    curves = pd.concat(analysis.bias(shape, center, width).assign(center=f"{center:g}") for center in centers)
    top = Chart(
        curves,
        [Line("distance", "probability", "center")],
        title="by distance",
        x=Axis(label="distance from frequency zero"),
        y=Axis(label="probability"),
        caption=caption,
        color_label="center",
    )
    maps = [
        Chart(
            analysis.bias_map(shape, center, width),
            [Heat("column", "row", "probability", "probability", limits=(0, 1))],
            title=f"center {center:g}",
            x=Axis(label="input frequency"),
            y=Axis(label="output frequency"),
            caption=caption,
        )
        for center in centers
    ]
    return stack_vertically(top, set_side_by_side(*maps))


def _image(cohort: Cohort, label: str, matrix: Float[np.ndarray, "out in"], notes: list[str], cells: int) -> Chart:
    """The corner of one update, in units of the root mean square of the whole."""
    image = matrix[:cells, :cells] / (np.sqrt(np.mean(matrix**2)) or 1.0)
    row, column = (index.reshape(-1) for index in np.indices(image.shape))
    shown = "all" if image.shape == matrix.shape else f"the first {cells}"
    what, *notes = notes
    scaled = f"{what}, {shown} rows and columns, in units of the root mean square of all its entries"
    return Chart(
        pd.DataFrame({"row": row, "column": column, "value": image.reshape(-1)}),
        [Heat("column", "row", "value", "ΔW / root mean square", scale="diverging", limits=(-_REACH, _REACH))],
        title=label,
        x=Axis(label="input"),
        y=Axis(label="output"),
        caption=" ".join([f"{scaled}; one run of each recipe, its first.", *notes]),
        meta=cohort.meta,
    )


def _frequency_plane(cohort: Cohort, group: Group, found: Mapping[str, Fourier], caption: str) -> Chart:
    """The frequencies of one recipe."""
    own = [found[run.id] for run in group.runs]
    squares = pd.concat(analysis.places(update) for update in own).assign(size=lambda rows: rows["coefficient"] ** 2)
    table = np.sqrt(squares.groupby(["row", "column"])["size"].mean()).reset_index()
    table = table[table["size"] > 0].sort_values("size")  # the largest on top
    shown = table["size"].clip(lower=_FAINT * table["size"].max())
    height, width = own[0].shape
    return Chart(
        table.assign(log=np.log10(shown)),
        [Point("column", "row", "log", size="size")],
        title=group.label,
        x=Axis(label="input frequency", limits=(-(width // 2), width // 2)),
        y=Axis(label="output frequency", limits=(-(height // 2), height // 2)),
        caption=caption,
        color_label="log₁₀ |coefficient|",
        meta=cohort.meta,
    )


def _radius_profile(cohort: Cohort, found: Mapping[str, Fourier], caption: str) -> Chart:
    """Coefficients by radius, one line a recipe."""
    rows = pd.concat(analysis.profile(update).assign(run=run) for run, update in found.items())
    cells = band(cohort.label(rows), ["recipe", "kind", "radius"])
    return Chart(
        cells,
        lines(cells, "radius", points=False),
        title="by radius",
        x=Axis(label="radius of the frequency", limits=(0, None)),
        y=Axis(label="root mean square", limits=(0, None)),
        caption=caption,
        colors=cohort.labels,
        meta=cohort.meta,
    )
