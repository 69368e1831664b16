"""Figure that compares every pair of adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis import adapter_similarity as pairs
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Heat
from lorascope.plots.builders import pair_heat
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs


@figure(
    topic="updates",
    needs=("update_norm",),
    runs=2,
    reads="The panels compare every pair of adapters: norm ratio, cosine of the updates, angle between leading "
    "singular vectors, and fraction of rank in different modules. Only angles well below the random baseline in "
    "brackets show shared directions.",
    misleads="Cosines near zero are normal even between seeds, and runs of one seed share the initial A, which lowers "
    "their angles: compare different seeds. Norm ratios mostly reflect learning rates and numbers of steps.",
)
def adapter_pairs(runs: Runs, control: Runs | None = None, spectra: bool = False) -> Panels:
    """Plot the similarity of all pairs of adapters or runs: norm ratio, cosine, angle, difference in rank allocation.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        At least two runs on one model, of any methods and ranks.
    spectra : bool
        Decompose dense updates of any size; by default only those whose smaller side is at most 1024.

    Raises
    ------
    ValueError
        There are fewer than two runs, or they have different models.

    Examples
    --------
    >>> ls.plots.adapter_pairs({"seed 0": ls.example("adapter"), "seed 1": ls.example("adapter_seed_1")})
    """
    cohort = gather_runs("adapter_pairs", runs, control, check=False)
    cohort.require_runs(2)
    cohort.require("update_norm")
    labeled = {}
    for group in cohort.groups:
        for run in group.runs:
            label = group.label if len(group.runs) == 1 else group.run_names[run.id]
            labeled[label] = run
    table = pairs.compare_adapters(labeled, pairs.compare_modules(labeled, spectra))
    caption = (
        "Norms and cosines cover all modules; a module without an adapter counts as zero. Angles: principal angles "
        f"between the first {pairs.DIRECTIONS} singular vectors (fewer if an update has fewer), averaged over outputs, "
        "inputs and shared modules; in brackets, the same for random directions. Rank in different modules: fraction "
        "of the rank that would have to move to make the allocations equal. "
        f"{cohort.sample_sentence}"
    )
    # On a logarithmic scale, twice and half the norm are equally far from equality. An adapter of zeros has a ratio of
    # 0, whose logarithm no color shows.
    with np.errstate(divide="ignore"):
        ratios = table.assign(log_ratio=np.log2(table["norm_ratio"]), words=table["norm_ratio"].map(_format_ratio))
    ratios = ratios.replace({"log_ratio": {-np.inf: np.nan}})
    # At least twice and half the norm, so that a difference of a few percent does not look like one.
    reach = max(1.0, float(ratios["log_ratio"].abs().max()))
    chance = table["chance"].map(" ({:.0f}°)".format).where(table["chance"].notna(), "")
    angles = table.assign(words=table["angle"].map("{:.0f}°".format) + chance)

    def heat(title: str, cells: pd.DataFrame, value: str, label: str, numbers: str, **settings: Any) -> Chart:
        mark = Heat("other", "one", value, label, numbers, **settings)
        return pair_heat(cells, mark, list(labeled), title=title, caption=caption)

    scale: dict[str, Any] = {"scale": "diverging", "limits": (-reach, reach)}
    norm = heat("‖W − W₀‖, row / column", ratios, "log_ratio", "log₂ ratio", ".1f", words="words", **scale)
    cosine = heat("Cosine of W − W₀", table, "cosine", "cosine", ".2f", scale="diverging", limits=(-1, 1))
    angle = heat("Mean principal angle", angles, "angle", "degrees", ".0f", limits=(0, 90), words="words")
    rank = heat("Rank in different modules", table, "rank_moved", "fraction", ".2f", limits=(0, 1))
    return cohort.complete(stack_vertically(set_side_by_side(norm, cosine), set_side_by_side(angle, rank)))


def _format_ratio(ratio: float) -> str:
    """Format a ratio of norms with two digits, and a large one as an integer."""
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.2g}×"
