"""Block schedule of LISA runs: intervals between draws, visits per block, and coverage of the blocks over time."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis import norms


def list_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """List the sampling intervals of the schedule in the records of one or more LISA runs.

    Returns
    -------
    DataFrame
        One row per run, interval and block: ``run, interval`` (from 0), ``start, stop`` (first and last step, counted
        from 1), ``module, place, active``.
    """
    rows = norms.select_quantity(table, "active").astype({"run": "str", "module": "str", "step": "int64"})
    rows = rows.rename(columns={"step": "start"})
    last = table.groupby(table["run"].astype("str"))["step"].max()
    starts = rows[["run", "start"]].drop_duplicates().sort_values(["run", "start"])
    by_run = starts.groupby("run")["start"]
    # An interval ends before the next one starts; the last one ends with the run.
    stops = (by_run.shift(-1) - 1).fillna(starts["run"].map(last).astype("float64"))
    starts = starts.assign(interval=by_run.cumcount(), stop=stops.astype("int64"))
    blocks = rows.merge(starts, on=["run", "start"])
    blocks = blocks.assign(active=blocks["value"] > 0).sort_values(["run", "start", "place"], ignore_index=True)
    return blocks[["run", "interval", "start", "stop", "module", "place", "active"]]


def interval_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Return LISA's schedule settings of each run: the number of active blocks (gamma) and steps per interval (K).

    Returns
    -------
    DataFrame
        ``run, blocks, steps``, as observed in the first interval.
    """
    first = list_intervals(table).query("interval == 0")
    interval = first.groupby("run").agg(blocks=("active", "sum"), start=("start", "first"), stop=("stop", "first"))
    return interval.assign(steps=interval["stop"] - interval["start"] + 1)[["blocks", "steps"]].reset_index()


def count_visits(table: pd.DataFrame) -> pd.DataFrame:
    """Count how often LISA's schedule trained each block.

    Returns
    -------
    DataFrame
        ``run, module, place``; ``intervals`` and ``steps`` in which the block was active; ``first``, the first such
        step or NA; ``draws`` of the run; ``frequency``,
        the fraction of them that selected it; ``expected``, its selection probability.
    """
    rows = list_intervals(table)
    on = rows[rows["active"]].assign(steps=lambda rows: rows["stop"] - rows["start"] + 1)
    per_block = ["run", "module"]
    sums = on.groupby(per_block).agg(intervals=("start", "size"), steps=("steps", "sum"), first=("start", "min"))
    # Blocks that were never drawn have no sums, so the columns need an integer type with NA.
    visits = rows[[*per_block, "place"]].drop_duplicates().merge(sums.astype("Int64"), on=per_block, how="left")
    visits = visits.fillna({"intervals": 0, "steps": 0})
    draws = visits["run"].map(rows.groupby("run")["interval"].nunique())
    visits = visits.assign(draws=draws, frequency=visits["intervals"].astype("float64") / draws)
    return visits.merge(_chances(table).rename("expected").reset_index(), on=per_block)


def block_coverage(table: pd.DataFrame) -> pd.DataFrame:
    """Count the blocks that LISA's schedule trained by the n-th draw, and the expected number: sum of 1 - (1 - p)^n.

    Returns
    -------
    DataFrame
        ``run, interval, step, value, expected``: a row for the first step of each interval and the last of the run.
    """
    rows = list_intervals(table)
    # A block counts from its first draw on, so the cumulative maximum marks the blocks reached so far.
    reached = rows.assign(value=rows.groupby(["run", "module"])["active"].cummax())
    by_draw = reached.groupby(["run", "interval", "start", "stop"])["value"].sum().reset_index()
    missed = 1 - _chances(table)
    draws = zip(by_draw["run"], by_draw["interval"], strict=True)
    by_draw["expected"] = [(1 - missed[run] ** (interval + 1)).sum() for run, interval in draws]
    ends = by_draw.drop_duplicates("run", keep="last")
    ends = ends[ends["start"] < ends["stop"]].assign(start=lambda rows: rows["stop"])
    reached_blocks = pd.concat([by_draw, ends]).sort_values(["run", "start"], ignore_index=True)
    return reached_blocks.rename(columns={"start": "step"})[["run", "interval", "step", "value", "expected"]]


def _chances(table: pd.DataFrame) -> pd.Series:
    """Return the selection probability of each block, by run and module."""
    rows = table[table["quantity"] == "draw_probability"].astype({"run": "str", "module": "str"})
    return rows.set_index(["run", "module"])["value"]
