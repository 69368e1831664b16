"""Figures of updates with a sparse spectrum: trained frequencies, images of updates, and the frequency bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis import fourier as analysis
from lorascope.analysis import initial_update
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically, wrap
from lorascope.charts.geometry import MINUS
from lorascope.charts.marks import Axis, Band, Heat, Line, Point
from lorascope.plots.builders import curves
from lorascope.plots.figure_registry import document_result, figure, gather_runs
from lorascope.plots.requirements import FREQUENCIES, UPDATES
from lorascope.plots.run_groups import INTERVAL, Group, Runs, require_counts
from lorascope.updates import Fourier, Update

_FAINT = 0.01  # lower end of the color scale, as a fraction of the largest coefficient
_HALF = 0.52  # of the frequencies, so that no dot is cut
_SHUFFLED, _DRAWS = "shuffled", 100
_REACH = 4.0  # ends of the color scale of an image, in units of its root mean square


@figure(
    topic="updates",
    needs=(FREQUENCIES,),
    reads="Each dot is a trained frequency, brighter with its coefficient; frequency zero is in the center. "
    "The profile is the root mean square by distance from zero: only where it leaves the band of shuffled "
    "coefficients are some distances used more than others.",
    misleads="Only randomly drawn entries train, and low frequencies are not smooth structure, because rows and "
    "columns of a weight have no order. Without saved factors at step 0, the figure mostly shows the random initial "
    "coefficients.",
)
def fourier_spectrum(runs: Runs, control: Runs | None = None, module: str | None = None) -> Panels:
    """Plot the trained Fourier frequencies and the size of their coefficients, one panel per recipe, and by radius.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of FourierFT. If all of them saved their factors at step 0, the change since then is plotted.
    module : str, optional
        Adapted module; by default the one with the largest update.

    Examples
    --------
    >>> ls.plots.fourier_spectrum({"FourierFT": ls.example("fourierft")})
    """
    cohort = gather_runs("fourier_spectrum", runs, control)
    updates = list(map(analysis.fourier_updates, cohort.runs))
    module = cohort.common_module(updates, module)
    learned: list[Mapping[str, Any]] = list(map(analysis.learned_fourier_updates, cohort.runs))
    difference = ""
    # Without the factors at step 0 of one run, its change would not be comparable with the others.
    if all(module in by_module for by_module in learned):
        updates, difference = learned, " minus step 0"
    update = {run.id: by_module[module] for run, by_module in zip(cohort.runs, updates, strict=True)}
    caption = cohort.caption(
        f"Coefficients of {module}{difference}, root mean square over seeds; the color scale starts at 1% of the "
        "largest. An entry and its mirror (−j, −k) are one cosine, so both are drawn. Profile: root mean square in "
        f"rings around frequency zero; {_SHUFFLED}: 95% of {_DRAWS} permutations of the coefficients.",
        interval=f"bands: {INTERVAL}",
    )
    planes = [_frequency_plane(group, update, caption) for group in cohort.groups]
    rows = pd.concat(analysis.radial_profile(coefficients).assign(run=run) for run, coefficients in update.items())
    shuffled = cohort.label(pd.concat(_shuffled_profiles(coefficients, run) for run, coefficients in update.items()))
    means = shuffled.groupby(["recipe", "radius", "draw"], sort=False)["value"].mean()
    draws = means.groupby(["recipe", "radius"], sort=False)
    random = pd.DataFrame({"low": draws.quantile(0.025), "high": draws.quantile(0.975)}).reset_index()
    random["recipe"] += f", {_SHUFFLED}"
    by_radius = curves(
        seed_cells(cohort.label(rows), ["recipe", "kind", "radius"]),
        "radius",
        (Axis(label="radius of the frequency", limits=(0, None)), Axis(label="root mean square", limits=(0, None))),
        Band("radius", "low", "high", "recipe", data=random),
        points=False,
        title="Profile by radius",
        caption=caption,
        colors=[*cohort.labels, *(f"{label}, {_SHUFFLED}" for label in cohort.labels)],
    )
    title = "Trained frequencies of one update"
    if len(planes) == 1:
        return cohort.complete(set_side_by_side(*planes, by_radius, title=title))
    return cohort.complete(stack_vertically(set_side_by_side(*planes), by_radius, title=title))


def _shuffled_profiles(update: Fourier, run: str) -> pd.DataFrame:
    """Return the radial profiles of an update whose coefficients are permuted among its entries."""
    generator, tables = np.random.default_rng(0), []
    for draw in range(_DRAWS):
        permuted = Fourier(generator.permutation(update.coefficients), update.entries, update.shape, update.scale)
        tables.append(analysis.radial_profile(permuted).assign(draw=draw, run=run))
    return pd.concat(tables)


@figure(
    topic="updates",
    needs=(UPDATES,),
    reads="The image shows the entries of one module's update. Stripes along rows or columns are single outputs or "
    "inputs, typical of low-rank updates; waves over the whole image, typical of FourierFT, change every weight.",
    misleads="Rows and columns have no order, and each image is scaled by its own root mean square, so "
    "colors do not compare sizes. FourierFT updates include their random initial value: set added=True to subtract it.",
)
def update_image(
    runs: Runs, control: Runs | None = None, module: str | None = None, cells: int = 64, added: bool = False
) -> Drawable:
    """Plot the update of one module, such as a Fourier update, as an image; one panel per recipe (its first run).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot; recipes with equal numbers of parameters are easiest to compare.
    module : str, optional
        Adapted module; by default the one with the largest update.
    cells : int
        Number of rows and columns shown, from the first.
    added : bool
        Subtract the initial update where it is nonzero, as in FourierFT.

    Examples
    --------
    >>> ls.plots.update_image({"FourierFT": ls.example("fourierft"), "LoRA": ls.example("lora")})
    """
    cohort = gather_runs("update_image", runs, control)
    require_counts(cells=cells)
    shown_updates: dict[str, Mapping[str, Update]] = {}
    for group in cohort.groups:
        run = group.runs[0]
        shown_updates[group.label] = initial_update.learned_updates(run) if added else run.updates()
    module = cohort.common_module(list(shown_updates.values()), module)
    symbol, notes = "W − W₀", list[str]()
    if added:
        symbol, notes = "ΔW − ΔW₀", cohort.missing_initial_updates()
    panels = []
    for label, updates in shown_updates.items():
        matrix = updates[module].dense()
        image = matrix[:cells, :cells] / (np.sqrt(np.mean(matrix**2)) or 1.0)  # an update may be all zeros
        row, column = np.indices(image.shape).reshape(2, -1)
        section = "all"
        if image.shape != matrix.shape:
            section = f"the first {cells}"
        caption = (
            f"{symbol} of {module}: {section} rows and columns, in units of the root mean square of all entries; first "
            "run of each recipe."
        )
        panels.append(
            Chart(
                pd.DataFrame({"row": row, "column": column, "value": image.reshape(-1)}),
                [
                    Heat(
                        "column",
                        "row",
                        "value",
                        "entry / RMS",
                        scale="diverging",
                        limits=(-_REACH, _REACH),
                    )
                ],
                title=label,
                x=Axis(label="input"),
                y=Axis(label="output"),
                caption=" ".join([caption, *notes]),
            )
        )
    return cohort.complete(wrap(panels, len(panels), f"Update of {module}"))


@document_result
def frequency_bias(
    shape: tuple[int, int] = (768, 768),
    centers: Sequence[float] = (0, 100, 200, 350, 480),
    width: float = 200.0,
) -> Panels:
    """Plot the probability that FourierFT draws a frequency, by distance from zero and as maps (Eq. 5 and Fig. 3).

    A curve peaks at the center of its band; center 0 prefers slow waves. Caveat: this is the draw, and not what a
    training makes of it.

    Parameters
    ----------
    shape : (int, int)
        Numbers of outputs and inputs of the weight.
    centers : sequence of float
        Centers of the bands, as distances from frequency zero.
    width : float
        Width of all bands.

    Raises
    ------
    ValueError
        ``shape`` is not two positive integers.

    Examples
    --------
    >>> ls.plots.frequency_bias((48, 48), centers=(0, 12), width=12)
    """
    if not (isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        value = shape if isinstance(shape, tuple) else type(shape).__name__
        raise ValueError(f"shape must be two integers >= 1 (outputs, inputs), got {value}: no run is read")
    caption = (
        "Relative probability: that FourierFT draws a frequency, over that of the most likely one, for bands of width "
        f"{width:g} in the spectrum of a {shape[0]} × {shape[1]} weight (FourierFT, equation 5). Maps: the same at "
        "every pair of frequencies. Computed, not measured."
    )
    profiles, maps = [], []
    for center in centers:
        profiles.append(analysis.bias_by_distance(shape, center, width).assign(center=f"{center:g}"))
        cells = analysis.bias_map(shape, center, width)
        maps.append(
            Chart(
                cells,
                [Heat("column", "row", "probability", "relative probability", limits=(0, 1))],
                title=f"center {center:g}",
                x=Axis(label="input frequency", ticks=_ends_and_zero(cells["column"])),
                y=Axis(label="output frequency", ticks=_ends_and_zero(cells["row"])),
                caption=caption,
                color_label="center",
            )
        )
    top = Chart(
        pd.concat(profiles),
        [Line("distance", "probability", "center")],
        title="Profile by distance",
        x=Axis(label="distance from frequency zero"),
        y=Axis(label="relative probability"),
        caption=caption,
        color_label="center",
    )
    middle = profiles[len(profiles) // 2]
    likely = middle.loc[middle["probability"] >= 0.5, "distance"]
    title = (
        f"FourierFT's frequency bias with center {middle['center'].iloc[0]}: distances {likely.min():.0f} to "
        f"{likely.max():.0f} have at least half of the highest probability"
    )
    return stack_vertically(top, set_side_by_side(*maps), title=title)


def _ends_and_zero(frequencies: pd.Series) -> dict[int, str]:
    """Return ticks at the lowest and the highest frequency and at zero."""
    ends = sorted({int(frequencies.min()), 0, int(frequencies.max())})
    return {frequency: f"{frequency}".replace("-", MINUS) for frequency in ends}


def _frequency_plane(group: Group, updates: Mapping[str, Fourier], caption: str) -> Chart:
    """Plot the frequencies of one recipe."""
    # Seeds draw the same entries, or each its own; an entry is averaged over the runs that drew it.
    entries = pd.concat(analysis.list_frequencies(updates[run.id]) for run in group.runs)
    squares = entries.assign(size=entries["coefficient"] ** 2).groupby(["row", "column"])["size"]
    table = np.sqrt(squares.mean()).reset_index()
    table = table[table["size"] > 0].sort_values("size")  # the largest on top
    visible = table["size"].clip(lower=_FAINT * table["size"].max())
    # Frequencies are counted from the middle of the spectrum.
    height, width = updates[group.runs[0].id].shape
    return Chart(
        table.assign(log=np.log10(visible)),
        [Point("column", "row", "log")],
        title=group.label,
        x=Axis(label="input frequency", limits=(-_HALF * width, _HALF * width)),
        y=Axis(label="output frequency", limits=(-_HALF * height, _HALF * height)),
        caption=caption,
        color_label="log₁₀ |coefficient|",
        square=height == width,
    )
