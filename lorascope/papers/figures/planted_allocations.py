"""Figure of the allocators: final rank by planted rank."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Line, Mark
from lorascope.papers.figures.study_marks import write_word
from lorascope.plots.builders import curves, ticks_at
from lorascope.plots.run_groups import INTERVAL

_TRUTH, _UNIFORM = "planted rank", "uniform rank"


def allocation_table(ranks: pd.DataFrame, arms: Mapping[str, str]) -> pd.DataFrame:
    """Tabulate ``recipe, planted, value, low, high, n`` from the kept table ``ranks``, for arms by their names.

    The value is the final rank, averaged over the modules with the same planted rank, then over seeds, with a 95%
    interval.
    """
    if ranks.empty:  # it may lack its columns
        return pd.DataFrame(columns=["recipe", "planted", "value", "low", "high", "n"])
    names = {arm: name for name, arm in arms.items()}
    of_arms = ranks[ranks["arm"].isin(names)]
    means = of_arms.groupby(["arm", "seed", "planted"], sort=True)["rank"].mean().rename("value").reset_index()
    return band(means.assign(recipe=means["arm"].map(names)), ["recipe", "planted"])


def planted_allocations(ranks: pd.DataFrame, arms: Mapping[str, str], uniform: float) -> Chart:
    """Draw the final rank of allocators by planted rank.

    Parameters
    ----------
    ranks : DataFrame
        Kept table ``ranks``.
    arms : mapping name -> arm
        Arms that learn uneven planted ranks, by their names in the legend.
    uniform : float
        Rank of all modules without allocation.
    """
    cells = allocation_table(ranks, arms)
    truth = pd.DataFrame({"planted": sorted(set(cells["planted"]) or {0, 4})})
    references = pd.concat([
        truth.assign(recipe=_TRUTH, value=truth["planted"]), truth.assign(recipe=_UNIFORM, value=uniform)
    ])  # fmt: skip
    marks: list[Mark] = [Line("planted", "value", "recipe", data=references)]
    missing = [name for name in arms if name not in set(cells["recipe"])]
    if missing:
        marks.append(write_word(2.0, 0.3, f"not run: {', '.join(missing)}"))
    return curves(
        cells.astype(dict.fromkeys(["planted", "value", "low", "high"], "float64")),
        "planted",
        (
            Axis(label="rank of the teacher's update", ticks=ticks_at(truth["planted"])),
            Axis(label="final rank", limits=(0, None)),
        ),
        *marks,
        title="Final rank by planted rank",
        caption=f"Final rank, mean over the modules with the same planted rank. Bands and bars: {INTERVAL}.",
        colors=[*arms, _TRUTH, _UNIFORM],
    )
