"""Analysis of rank allocations: current ranks, parameters, distribution over depth and roles, and seed agreement.

``current_ranks`` returns the ranks of modules; ``norms.pool_modules`` sums them by place, layer or role.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis import baseline_ranks, norms
from lorascope.analysis.even_spacing import evenly_spaced
from lorascope.analysis.head_similarity import cosines, mean_of_pairs
from lorascope.analysis.seed_intervals import CONFIDENCE, Interval, jackknife_estimate, pseudo_values
from lorascope.array_types import Float

THIRDS = ("bottom", "middle", "top")
PHASES = ("warm-up", "decay", "final")


def current_ranks(table: pd.DataFrame, step: int | None = None) -> pd.DataFrame:
    """Return the rank allocation at a step: the rank of every module, the last one recorded up to it.

    Parameters
    ----------
    table : DataFrame
        Records of one or more runs.
    step : int, optional
        Training step; by default the end of training.

    Returns
    -------
    DataFrame
        Rows of ``rank`` with their ``place``, one per run and module, including ranks of zero.

    Raises
    ------
    ValueError
        No rank was recorded, or not up to this step.
    """
    rows = norms.select_quantity(table, "rank")
    if step is not None:
        rows = rows[(rows["step"] <= step).fillna(False)]
        if rows.empty:
            raise ValueError(f"step must be at least the first step with a recorded rank, got {step}")
    # Rows without a step come from adapter folders, so any recorded step replaces them.
    ordered = rows.sort_values("step", kind="stable", na_position="first")
    latest = ordered.drop_duplicates(["run", "module"], keep="last").sort_index()
    return latest if step is None else latest.assign(step=step)


def add_parameters(ranks: pd.DataFrame, modules: pd.DataFrame) -> pd.DataFrame:
    """Add the parameters of a rank allocation: rank times the sum of inputs and outputs, NaN if the size is unknown.

    ``ranks`` are from ``current_ranks``; ``modules`` is the module table, see ``Run.modules``.
    """
    sizes = modules.set_index("module").reindex(columns=["in_features", "out_features"]).astype("float64")
    cost = sizes.sum(axis=1, skipna=False)
    return ranks.assign(parameters=ranks["value"] * cost.reindex(ranks["module"].astype("str")).to_numpy())


def depth_thirds(ranks: pd.DataFrame) -> pd.Series:
    """Return for each row of a rank allocation its third of the stack's adapted layers; NA outside the blocks."""
    third = pd.Series(pd.NA, ranks.index, dtype="object")
    for _, rows in ranks.dropna(subset="layer").groupby("stack", observed=True):
        layers = np.unique(rows["layer"].to_numpy(np.int64))
        index = np.searchsorted(layers, rows["layer"].to_numpy(np.int64))
        middle = (6 * index + 3) // (2 * len(layers))  # a layer belongs to the third that contains its midpoint
        third[rows.index] = np.array(THIRDS, dtype=object)[middle]
    return third.astype(pd.CategoricalDtype(list(THIRDS), ordered=True))


def kendall_tau(ranks: Float[np.ndarray, "run module"]) -> Float[np.ndarray, "run run"]:
    """Compute Kendall's tau-b between the rank allocations of every pair of runs; NaN if all ranks of one are equal."""
    first, second = np.triu_indices(ranks.shape[1], 1)
    # tau-b is the cosine between the vectors of pairwise orders, in which ties are 0.
    order = np.sign(ranks[:, first] - ranks[:, second])
    return cosines(order @ order.T)


def stability(ranks: pd.DataFrame) -> Interval:
    """Compute the stability of rank allocations: mean tau over pairs of runs, 95% t-interval (NaN below three runs).

    Pairs share runs, so they are not independent; see ``seed_intervals.pseudo_values``.
    """
    wide = _pivot_ranks(ranks).to_numpy()
    if len(wide) < 2:  # tau takes the memory of all pairs of modules
        return Interval(np.nan, np.nan, np.nan, len(wide))
    taus = kendall_tau(wide)
    return jackknife_estimate(pseudo_values(taus)).interval((1 - CONFIDENCE) / 2)


def random_ranks(ranks: pd.DataFrame, cap: int | None = None) -> pd.DataFrame:
    """Replace rank allocations by random ones (``baseline_ranks.random``) of equal budget, one draw per run."""
    draws = []
    for seed, (_, rows) in enumerate(ranks.groupby("run", observed=True, sort=False)):
        draws.append(rows.assign(value=_draw_ranks(rows["value"].to_numpy(), cap, seed)))
    return pd.concat(draws)


def random_stability(ranks: pd.DataFrame, cap: int | None = None) -> Float[np.ndarray, "draw"]:
    """Draw the random baseline of a rank allocation's ``stability``: the mean tau of as many random runs, 200 times."""
    wide = _pivot_ranks(ranks).to_numpy()
    taus = []
    for draw in range(200):
        # Every draw of every run has a separate seed.
        sample = [_draw_ranks(row, cap, draw * len(wide) + run) for run, row in enumerate(wide)]
        taus.append(mean_of_pairs(kendall_tau(np.array(sample))))
    return np.array(taus)


def initial_cap(table: pd.DataFrame) -> int | None:
    """Return the largest initially allocated rank if no module ever exceeds it, else None: ranks are then unbounded."""
    rows = norms.select_quantity(table, "rank")
    first = rows["step"].isna() | (rows["step"] == rows["step"].min())
    start, most = rows.loc[first.fillna(True), "value"].max(), rows["value"].max()
    return int(start) if start == most else None


def decision_steps(table: pd.DataFrame, most: int) -> list[int]:
    """Return up to ``most`` evenly spaced steps with a recorded rank budget (or rank), including the first and last."""
    rows = table[table["quantity"] == "budget"]
    if rows.empty:  # only methods that allocate in steps, AdaLoRA and ALoRA, record a budget
        rows = table[table["quantity"] == "rank"]
    return evenly_spaced(np.unique(rows["step"].dropna().to_numpy(np.int64)).tolist(), most)


def budget_phases(budget: pd.DataFrame) -> list[tuple[str, int, int]]:
    """Return the phases before, during and after the changes of an allocation's rank budget; empty if it never changes.

    Parameters
    ----------
    budget : DataFrame
        ``at`` (steps in order) and ``value``.

    Returns
    -------
    list of (str, int, int)
        Name, first step and last step of each nonempty phase.
    """
    steps, value = budget["at"].to_numpy(np.int64), budget["value"].to_numpy()
    changes = steps[1:][np.diff(value) != 0]
    if not len(changes):
        return []
    ends = list(map(int, (steps[0], changes[0], changes[-1], steps[-1])))
    return [phase for phase in zip(PHASES, ends, ends[1:], strict=False) if phase[1] < phase[2]]


def step_corners(budget: pd.DataFrame) -> pd.DataFrame:
    """Return a rank budget, see ``budget_phases``, as corners of a step line: a value applies until the next step."""
    before = budget.assign(value=budget["value"].shift()).dropna(subset="value")
    return pd.concat([before, budget]).sort_values("at", kind="stable", ignore_index=True)


def component_course(table: pd.DataFrame, quantity: str = "importance") -> pd.DataFrame:
    """Return a quantity by which rank is allocated, of every component over the steps, and whether it is ``kept``.

    Methods that record ``kept`` determine it at their last selection. For other methods, the components kept are the
    most important ones at the last scoring, as many per module as its rank.
    """
    tables = []
    for _, run_table in table.groupby("run", observed=True, sort=False):
        recorded = set(run_table["quantity"])
        judge = next(name for name in ("kept", "importance", quantity) if name in recorded)  # in order of preference
        final = norms.last_recorded(norms.select_quantity(run_table, judge))
        if judge == "kept":
            retained = final["value"] > 0
        else:
            latest = current_ranks(run_table)
            number = final["module"].astype("str").map(dict(zip(latest["module"], latest["value"], strict=True)))
            position = final.groupby("module", observed=True)["value"].rank(method="first", ascending=False)
            retained = position <= number
        kept_components = final.loc[retained, ["module", "index"]].assign(kept=True)
        tables.append(
            norms.select_quantity(run_table, quantity)
            .merge(kept_components, how="left")
            .fillna({"kept": False})
            .astype({"kept": bool})
        )
    return pd.concat(tables, ignore_index=True)


def _draw_ranks(ranks: Float[np.ndarray, "module"], cap: int | None, seed: int) -> Float[np.ndarray, "module"]:
    """Draw random ranks with the same sum for the same modules."""
    allocation = baseline_ranks.random(list(map(str, range(len(ranks)))), int(ranks.sum()), seed, cap)
    return np.array(list(allocation.values()), dtype=np.float64)


def _pivot_ranks(ranks: pd.DataFrame) -> pd.DataFrame:
    wide = ranks.astype({"run": "str", "module": "str"}).pivot(index="run", columns="module", values="value")
    return wide.dropna(axis="columns")
