"""Which blocks trained when (LISA): the intervals between two draws, and how many blocks they have reached."""

from __future__ import annotations

import pandas as pd

from lorascope.analysis import norms


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """One row a run, interval and block.

    Parameters
    ----------
    table : DataFrame
        Records of one or several runs.

    Returns
    -------
    DataFrame
        ``run, interval`` (from 0), ``start, stop`` (first and last step, counted from 1), ``module, place, active``.
    """
    rows = norms.select(table, "active").astype({"run": "str", "module": "str", "step": "int64"})
    last = table.groupby("run", observed=True)["step"].max()
    starts = rows[["run", "step"]].drop_duplicates().sort_values(["run", "step"]).rename(columns={"step": "start"})
    each = starts.groupby("run")["start"]
    stops = (each.shift(-1) - 1).fillna(starts["run"].map({str(run): int(step) for run, step in last.items()}))
    starts = starts.assign(interval=each.cumcount(), stop=stops.astype("int64"))
    found = rows.rename(columns={"step": "start"}).merge(starts, on=["run", "start"])
    found = found.assign(active=found["value"] > 0).sort_values(["run", "start", "place"], ignore_index=True)
    return found[["run", "interval", "start", "stop", "module", "place", "active"]]


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """How many blocks each run trains at a time, and for how many steps: gamma and K.

    Returns
    -------
    DataFrame
        ``run, blocks, steps``.
    """
    first = intervals(table).query("interval == 0")
    found = first.groupby("run").agg(blocks=("active", "sum"), start=("start", "first"), stop=("stop", "first"))
    return found.assign(steps=found["stop"] - found["start"] + 1)[["blocks", "steps"]].reset_index()


def visits(table: pd.DataFrame) -> pd.DataFrame:
    """How often each block trained.

    Returns
    -------
    DataFrame
        ``run, module, place, intervals, steps``; ``first``, the first step it trained in, NA if in none; ``frequency``
        among the draws, and ``expected``, the chance of it.
    """
    rows = intervals(table)
    on = rows[rows["active"]].assign(steps=lambda rows: rows["stop"] - rows["start"] + 1)
    per_block = ["run", "module"]
    sums = on.groupby(per_block).agg(intervals=("start", "size"), steps=("steps", "sum"), first=("start", "min"))
    found = rows[[*per_block, "place"]].drop_duplicates().merge(sums.astype("Int64"), on=per_block, how="left")
    found = found.fillna({"intervals": 0, "steps": 0})
    draws = found["run"].map(rows.groupby("run")["interval"].nunique())
    expected = _chances(table).rename("expected").reset_index()
    found = found.assign(frequency=found["intervals"].astype("float64") / draws)
    return found.merge(expected, on=per_block)


def coverage(table: pd.DataFrame) -> pd.DataFrame:
    """Number of blocks that have trained by the n-th draw, and how many to expect: sum of 1 - (1 - chance)^n.

    Returns
    -------
    DataFrame
        ``run, interval, step, value, expected``: one row for the first step after a draw, and one for the last of all.
    """
    rows = intervals(table)
    reached = rows.assign(value=rows.groupby(["run", "module"])["active"].cummax())
    by_draw = reached.groupby(["run", "interval", "start", "stop"])["value"].sum().reset_index()
    missed = 1 - _chances(table)
    draws = zip(by_draw["run"], by_draw["interval"], strict=True)
    by_draw["expected"] = [float((1 - missed[run] ** (interval + 1)).sum()) for run, interval in draws]
    ends = by_draw.drop_duplicates("run", keep="last")
    ends = ends[ends["start"] < ends["stop"]].assign(start=lambda rows: rows["stop"])
    found = pd.concat([by_draw, ends]).sort_values(["run", "start"], ignore_index=True)
    return found.rename(columns={"start": "step"})[["run", "interval", "step", "value", "expected"]]


def importance(adapted: pd.DataFrame, full: pd.DataFrame, active: int, quantity: str = "update_norm") -> pd.DataFrame:
    """What LISA's chances stand for: the norm of a layer under LoRA over that under full fine-tuning (section 3.2).

    The ratios of the blocks can be its ``weights``; the paper draws all blocks alike.

    Parameters
    ----------
    adapted, full : DataFrame
        Records of runs under LoRA and of full fine-tuning; several are averaged.
    active : int
        Blocks that train at a time.
    quantity : str
        A norm by module; which one the paper means it does not say.

    Returns
    -------
    DataFrame
        ``stack, layer, place``; ``adapted`` and ``full``, the mean over the steps; their ``ratio``; ``clipped``, the
        ratio as a probability; and ``practical``, the one that is used: 1 outside the blocks, else active / blocks.
    """
    key = list(norms.LAYER)
    means = [
        norms.mean_over_steps(norms.pool(norms.select(table, quantity)))
        .astype({"place": "str"})
        .groupby(key, dropna=False, sort=False, observed=True)["value"]
        .mean()
        .rename(name)
        for name, table in (("adapted", adapted), ("full", full))
    ]
    blocks = means[1].reset_index()["layer"].count()  # an adapter may leave some alone, draws do not
    found = pd.concat(means, axis="columns", join="inner").reset_index()
    inside = found["layer"].notna()
    ratio = found["adapted"] / found["full"]
    practical = (active / max(1, blocks) * inside).where(inside, 1.0)
    return found.assign(ratio=ratio, clipped=ratio.clip(upper=1), practical=practical)


def _chances(table: pd.DataFrame) -> pd.Series:
    """The chance of a draw, by run and module."""
    rows = table[table["quantity"] == "draw_probability"].astype({"run": "str", "module": "str"})
    return rows.set_index(["run", "module"])["value"]
