"""Figure of the allocators: final rank and scores by planted rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Panels
from lorascope.charts.marks import Axis, Line, Mark, Rule
from lorascope.files.printable import count_phrase
from lorascope.plots.builders import curves, ticks_at
from lorascope.plots.run_groups import INTERVAL

_TRUTH, _UNIFORM = "planted rank", "uniform rank"
_KEYS = ["recipe", "run", "planted"]


def allocation_table(ranks: pd.DataFrame, arms: Mapping[str, str]) -> pd.DataFrame:
    """Tabulate ``recipe, planted, value, low, high, n`` from the kept table ``ranks``, for arms by their names.

    The value is the final rank, averaged over the modules with the same planted rank, then over seeds, with a 95%
    interval.
    """
    of_arms = _of_arms(ranks, arms)
    return _over_seeds(of_arms.assign(value=of_arms["rank"]))


def score_tables(
    scores: pd.DataFrame, ranks: pd.DataFrame, arms: Mapping[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tabulate scores as ``allocation_table`` does for ranks, at the first and at the last step that has some.

    The value is the percentile of a component's score among those of the run, averaged over the components of a module.
    An arm with scores at one step is in the second table only.
    """
    of_arms = _of_arms(scores, arms)
    steps = of_arms.groupby("run")["step"]
    first, last = steps.transform("min"), steps.transform("max")
    tables = []
    for is_shown in ((of_arms["step"] == first) & (first < last), of_arms["step"] == last):
        components = of_arms[is_shown]
        percentile = 100 * components.groupby("run")["score"].rank(pct=True)
        planted = ranks[["run", "module", "planted"]]
        modules = components.assign(value=percentile).groupby(["recipe", "run", "module"])["value"].mean()
        tables.append(_over_seeds(modules.reset_index().merge(planted, on=["run", "module"])))
    return tables[0], tables[1]


def _of_arms(table: pd.DataFrame, arms: Mapping[str, str]) -> pd.DataFrame:
    names = {arm: name for name, arm in arms.items()}
    return table[table["arm"].isin(names)].assign(recipe=lambda rows: rows["arm"].map(names))


def _over_seeds(modules: pd.DataFrame) -> pd.DataFrame:
    cells = seed_cells(modules.groupby(_KEYS)["value"].mean().reset_index(), ["recipe", "planted"])
    return cells.astype(dict.fromkeys(["planted", "value", "low", "high"], "float64"))


def planted_allocations(ranks: pd.DataFrame, scores: pd.DataFrame, arms: Mapping[str, str], uniform: float) -> Panels:
    """Draw the final ranks and the scores of allocators by planted rank.

    Parameters
    ----------
    ranks, scores : DataFrame
        Kept tables.
    arms : mapping name -> arm
        Arms that learn uneven planted ranks, by their names in the legend.
    uniform : float
        Rank of all modules without allocation.
    """
    # Lines of an arm with fewer seeds than others, whose training continues, would look like a result.
    allocated = allocation_table(ranks, arms)
    cells = allocated[allocated["n"] == allocated["n"].max()]
    truth = pd.DataFrame({"planted": sorted(set(cells["planted"]))})
    references = pd.concat([
        truth.assign(recipe=_TRUTH, value=truth["planted"]), truth.assign(recipe=_UNIFORM, value=uniform)
    ])  # fmt: skip
    caption = (
        "Small decoders, trained on the text of planted teachers: every module of a teacher has an update of a planted "
        "rank. Left: final rank. Scores, by which components are selected: percentile of a component among those of "
        "the run, at the first and at the last selection. Means over the "
        f"modules with the same planted rank, then over {count_phrase(int(cells['n'].max()), 'seed')}; bands and "
        f"bars: {INTERVAL}."
    )
    # A sentence on an arm that is not drawn would raise a question.
    if "AutoLoRA" in set(cells["recipe"]):
        caption += (
            " AutoLoRA selects once, so it has last scores only: weights that sum to one in every module and so cannot "
            "order modules."
        )
    missing = [name for name in arms if name not in set(cells["recipe"])]
    if missing:
        caption += f" Not finished: {', '.join(missing)}."
    arms = {name: arm for name, arm in arms.items() if name not in missing}
    x = Axis(label="rank of the teacher's update", ticks=ticks_at(truth["planted"]))
    settings: dict[str, Any] = {"caption": caption, "colors": [*arms, _TRUTH, _UNIFORM]}
    marks: list[Mark] = [Line("planted", "value", "recipe", data=references)]
    y = Axis(label="final rank", limits=(0, None))
    charts = [curves(cells, "planted", (x, y), *marks, title="Final rank", **settings)]
    for when, table in zip(("First scores", "Last scores"), score_tables(scores, ranks, arms), strict=True):
        y = Axis(label="score (percentile)")
        charts.append(curves(table, "planted", (x, y), Rule(y=50), title=f"{when} (random: 50)", **settings))
    low, high = truth["planted"].min(), truth["planted"].max()
    wide = cells.pivot(index="recipe", columns="planted", values="value")
    spreads = (wide[high] - wide[low])[list(arms)].sort_values(ascending=False)
    by_method = [f"{spread:.1f} in {name}" for name, spread in spreads.items()]
    by_method[0] = by_method[0].replace(" in ", f" ranks above those of {low:.0f} in ", 1)
    title = f"Modules of planted rank {high:.0f} end {', '.join(by_method)} (truth: {high - low:.0f})"
    return Panels((tuple(charts),), title=title)
