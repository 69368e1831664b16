"""Screens of one adapter or run: its norms along the layers, or one line per module."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lorascope.diagnosis.case import largest
from lorascope.diagnosis.inspection import Inspection, pool_norms
from lorascope.diagnosis.null import below_null, outliers
from lorascope.diagnosis.terminal import (
    WIDTH,
    Elided,
    Fact,
    NumberColumn,
    elide,
    join_paths,
    layer_chart,
    norm,
    number,
    numbers_table,
    percent,
    report_screen,
    span,
    whole,
)
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.adapter import Adapter

_SHARE = {False: ("energy", 7, percent, "energy"), True: ("dW/W", 7, percent, "relative_update")}


def inspection_screen(inspection: Inspection, target: Console, null: pd.DataFrame | None = None) -> str:
    """Format one adapter or run, with the table of ``null_table`` if there is one."""
    ranks = ("rank", 6, span, "least_rank", "most_rank"), ("effective", 9, number, "effective_rank")
    columns = (("|dW|", 7, norm, "update_norm"), _SHARE[inspection.has_base], *ranks)
    chart = layer_chart(inspection, target, "|dW| by layer", _pool_layers, columns, "{} per layer", " (RMS)")
    listed = []
    for each in largest(inspection.measured, "update_norm", 3):
        used = "" if math.isnan(each.effective_rank) else f"  rank {number(each.effective_rank)}"
        used += "" if each.rank is None else f" of {each.rank}"
        listed.append(Elided(each.module, f"{norm(each.update_norm):<6} ", used))
    run, folders = inspection.run, [Path(inspection.path or "")]
    if isinstance(run, Adapter) and run.base is not None and run.files.needs_base:
        folders.append(run.base.folder)
    # Relative or absolute, whichever is shorter.
    paths = [min(str(folder), os.path.relpath(folder), key=len) for folder in folders]
    names = paths, ["ADAPTER", "BASE"][: len(paths)]
    commands = [f"lorascope plot spectrum {join_paths(*each)} -o spectrum.pdf" for each in names]
    facts = [("largest |dW|", listed), *([] if null is None else _null_facts(null))]
    return report_screen(inspection, target, *chart, facts=facts, commands=commands)


def _null_facts(table: pd.DataFrame) -> Iterator[Fact]:
    """Yield the ranks next to those of random factors, and the modules whose norm is an outlier."""
    compared, lines = table.dropna(subset=["effective_rank_p"]), []
    for name, words in (("effective_rank", "effective"), ("stable_rank", "stable")):
        if len(compared):
            count = int(below_null(table, name).sum())
            mean = f"{words} rank of random factors: {number(compared[f'{name}_null'].mean())}"
            lines.append(Text(f"{mean}; lower in {count} of {len(compared)} modules"))
    lines = lines or [Text("no product of two factors of rank >= 2")]
    start = pool_norms(table["untrained_norm"])
    if table["untrained_norm"].isna().any():
        lines.append(Text("|dW| before training: unknown for this kind of start"))
    elif start:
        lines.append(Text(f"|dW| before training: {norm(start)} (random coefficients)"))
    yield "null", lines
    far = outliers(table)
    named = [Elided(row["module"], f"z {row['norm_z']:<6.1f} ") for row in far.head(3).to_dict("records")]
    more = [Text(f"and {len(far) - 3} more")] if len(far) > 3 else []
    known = int(table["norm_z"].notna().sum())
    text = f"norms of {known} modules with a role in five layers or more: none" if known else "needs five layers"
    yield "outliers", [*named, *more] or [Text(text)]


def modules_screen(inspection: Inspection, target: Console) -> str:
    """Format one adapter or run, with one line per module instead of the chart."""
    dead = ("dead", 4, whole, "dead")
    after: tuple[NumberColumn, ...] = (("stable", 6, number, "stable_rank"), ("90%", 4, whole, "energy_rank"), dead)
    if inspection.has_base:
        after = (dead, ("intr", 4, whole, "intruders"), ("1-cos", 7, norm, "neuron_median"))
    ranks = ("rank", 4, span, "rank", "rank"), ("eff", 6, number, "effective_rank")
    columns = (("|dW|", 7, norm, "update_norm"), _SHARE[inspection.has_base], *ranks, *after)
    rows, width = inspection.module_rows(), WIDTH - sum(width + 1 for _, width, *_ in columns)
    modules = [row["module"] for row in rows]
    # Names that are too long lose their common prefix: cut in the middle, they would lose their layer.
    cut = len(modules) > 1 and max(map(len, modules)) > width
    parts = zip(*(row["module"].split(".") for row in rows if row["layer"] is not None), strict=False)
    same = takewhile(lambda part: len(set(part)) == 1, parts) if cut else ()
    shared = ".".join(part[0] for part in same)
    names = [[Elided(name.removeprefix(f"{shared}."))] for name in modules]
    head = elide(f"module of {shared}" if shared else "module", width)
    return report_screen(inspection, target, numbers_table([(head, width)], names, columns, rows))


def _pool_layers(cell: list[dict[str, Any]]) -> float:
    """Return the root mean square of |dW| over the layers of a cell."""
    norm = math.hypot(*(row["update_norm"] for row in cell))
    return norm / len({row["layer"] for row in cell}) ** 0.5
