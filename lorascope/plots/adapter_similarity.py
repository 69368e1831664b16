"""The figure of several adapters compared, each two of them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis import adapter_similarity as pairs
from lorascope.charts.chart import Axis, Chart, Heat, Panels, set_side_by_side, stack_vertically
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Runs, gather
from lorascope.runs.run import Run


@figure(
    needs=("update_norm",),
    runs=2,
    reads="Four questions to every two adapters: how large one is beside the other, whether they change the weights in "
    "one direction, whether they use the same leading directions, and whether their ranks lie in the same modules. An "
    "angle tells something only where it lies well below the one by chance, in brackets.",
    misleads="A cosine near zero is the rule even for two seeds of one recipe, which find other weights for the same "
    "outputs. Angles between runs of one seed are small for the random A they start from. Ratios of norms follow "
    "learning rates and steps.",
)
def adapter_pairs(runs: Runs, control: Runs | None = None, spectra: bool = False) -> Panels:
    """Ratio of norms, cosine, angles and difference in allocation between every two adapters or runs.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        On one model, of any methods and ranks.
    spectra : bool
        Decompose dense updates wider than 1024, too, for their directions.

    Raises
    ------
    ValueError
        There are not two runs, or they are not on one model.
    """
    cohort = gather("adapter_pairs", runs, control)
    if len(cohort.runs) < 2:
        raise ValueError(f"adapter_pairs takes two runs or more, got {len(cohort.runs)}")
    cohort.require("update_norm")
    labelled = _label_runs(cohort)
    table = pairs.matrix(labelled, pairs.modules(labelled, spectra))
    caption = cohort.caption(
        "Norms and cosines of all modules together, zero where a module is not adapted. Angles: mean over outputs and "
        f"inputs and over the modules that both hold of the principal angles between the first {pairs.DIRECTIONS} "
        "directions, fewer where an update has fewer; in brackets that of as many random directions. Ranks elsewhere: "
        "the share that would have to move to other modules.",
    )
    charts = [
        Chart(
            cells,
            [mark],
            title=title,
            x=Axis(order=list(labelled)),
            y=Axis(order=list(labelled)),
            caption=caption,
            meta=cohort.meta,
        )
        for title, cells, mark in _panels(table)
    ]
    return stack_vertically(set_side_by_side(*charts[:2]), set_side_by_side(*charts[2:]))


def _panels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, Heat]]:
    """Title, cells and mark of each question."""
    place = ("other", "one")
    with np.errstate(divide="ignore"):
        ratios = table.assign(log_ratio=np.log2(table["norm_ratio"]), words=table["norm_ratio"].map("{:.2g}×".format))
    chance = table["chance"].map(" ({:.0f}°)".format).where(table["chance"].notna(), "")
    angles = table.assign(words=table["angle"].map("{:.0f}°".format) + chance)
    ratio = Heat(*place, "log_ratio", "log₂ ratio", ".1f", scale="diverging", words="words")
    cosine = Heat(*place, "cosine", "cosine", ".2f", scale="diverging", limits=(-1, 1))
    return [
        ("‖ΔW‖, row over column", ratios.replace({"log_ratio": {-np.inf: np.nan}}), ratio),
        ("Cosine of ΔW", table, cosine),
        ("Angle of directions", angles, Heat(*place, "angle", "degrees", ".0f", limits=(0, 90), words="words")),
        ("Ranks elsewhere", table, Heat(*place, "rank_moved", "share", ".2f", limits=(0, 1))),
    ]


def _label_runs(cohort: Cohort) -> dict[str, Run]:
    """Every run under a label of its own: seeds of one recipe by their seed."""
    return {
        group.label if len(group.runs) == 1 else f"{group.label}, seed {run.meta['seed']}": run
        for group in cohort.groups
        for run in group.runs
    }
