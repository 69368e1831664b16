"""Contents of a series of checkpoints and their screen: the first and last one, and where the updates still move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lorascope.analysis.settling import THRESHOLD, Distances, update_distances
from lorascope.analysis.turning_points import allows_turns
from lorascope.diagnosis.inspection import Facts, Inspection, inspect
from lorascope.diagnosis.inspection_screen import header_blocks, report_screen, shell_command
from lorascope.files.lazy_pandas import pandas as pd
from lorascope.files.printable import printable
from lorascope.files.text_layout import (
    Block,
    Elided,
    TableColumn,
    aligned_table,
    format_norm,
    format_number,
    format_percent,
    text_block,
)
from lorascope.files.typed_json import json_values
from lorascope.runs.checkpoint_names import count_and_span
from lorascope.runs.loading import is_series
from lorascope.runs.module_summary import Row, column, group_by_role, mean_without_nan, pool_norms
from lorascope.runs.series import Series

_ROLE_COLUMNS = (
    TableColumn("role", 15, "name"),
    TableColumn("|dW| first", 10, "first_norm", format_norm),
    TableColumn("last", 7, "update_norm", format_norm),
    TableColumn("effective first", 15, "first_effective_rank", format_number),
    TableColumn("last", 6, "effective_rank", format_number),
    TableColumn("last change", 12, "last_change", format_percent),
    TableColumn("settled", 9, "settled", str),
)
_MODULE_COLUMNS = (
    TableColumn("module", 35, "module"),
    TableColumn("first", 7, "first_norm", format_norm),
    TableColumn("last", 7, "update_norm", format_norm),
    TableColumn("eff.", 5, "first_effective_rank", format_number),
    TableColumn("last", 5, "effective_rank", format_number),
    TableColumn("change", 7, "last_change", format_percent),
    TableColumn("settled", 8, "settled", str),
)


@dataclass(frozen=True)
class SeriesInspection:
    """Inspection of a series of checkpoints of one training, as ``lorascope inspect`` shows it.

    Parameters
    ----------
    series : Series
    last : Inspection
        Inspection of the last checkpoint.
    distances : Distances
        Distances of the updates to the last one.
    """

    series: Series
    last: Inspection
    distances: Distances

    @property
    def facts(self) -> Facts:
        """Facts of the last checkpoint under the name of the series, and the steps."""
        (_, kind), *facts = self.last.facts
        return ((self.series.label, kind), *facts, ("checkpoints", count_and_span(self.distances.steps)))

    @property
    def absences(self) -> Facts:
        """Checkpoints that were skipped, with the reason, and modules that the last one lacks."""
        skipped = tuple(("skipped", reason) for reason in self.series.skipped.values())
        absent = len(self.series.meta.modules) - len(self.distances.values)
        if not absent:
            return skipped
        return (*skipped, ("absent", f"{absent} modules of other checkpoints, which the last one lacks"))

    def modules(self) -> list[Row]:
        """Return one row per module of the last checkpoint, in the order of the axes.

        Keys are ``module, stack, layer, role, rank, first_norm, update_norm, first_effective_rank, effective_rank,
        last_change`` (relative distance of the last two checkpoints) and ``settled``, see `Distances.settled`. Values
        of a module that the first checkpoint lacks are NaN there.
        """
        ranks, (first, *_), last = self.series.ranks(), self.series.checkpoints.values(), self.series.last
        rows = []
        for module in self.series.meta.modules:
            name = module.module
            if name not in self.distances.values:
                continue
            before, after = first.measures.get(name, {}), last.measures[name]
            rows.append({
                "module": name, "stack": module.stack, "layer": module.layer, "role": module.role, "rank": ranks[name],
                "first_norm": before.get("update_norm", np.nan), "update_norm": after["update_norm"],
                "first_effective_rank": before.get("effective_rank", np.nan),
                "effective_rank": after["effective_rank"], **self._movement([name]),
            })  # fmt: skip
        return rows

    def roles(self) -> list[Row]:
        """Return one row per stack and role: norms of all its modules together, and their mean effective ranks."""
        rows = []
        for (stack, role), modules in group_by_role(self.modules()):
            row: Row = {"stack": stack, "role": role, "modules": len(modules)}
            for name in ("first_norm", "update_norm"):
                row[name] = pool_norms(column(modules, name))
            for name in ("first_effective_rank", "effective_rank"):
                row[name] = mean_without_nan(column(modules, name))
            rows.append(row | self._movement(column(modules, "module")))
        return rows

    def _movement(self, modules: Sequence[str]) -> Row:
        change = float(self.distances.relative(modules)[-2])  # the last distance, to itself, is 0
        return {"last_change": change, "settled": self.distances.settled(modules)}

    def table(self) -> pd.DataFrame:
        """Return the rows of ``modules`` as a table, with the name of the series."""
        return pd.DataFrame(self.modules()).astype({"layer": "Int16"}).assign(name=self.series.label)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; unknown values are None."""
        values = {
            "name": self.series.label, "path": str(self.series.path), "kind": self.last.facts[0][1],
            "facts": dict(self.facts[1:] + self.absences), "steps": list(self.distances.steps), "threshold": THRESHOLD,
            "roles": self.roles(), "modules": self.modules(), "findings": list(self.last.findings),
        }  # fmt: skip
        return dict(json_values(values))


def inspect_series(series: Series, spectra: bool = False) -> SeriesInspection:
    """Inspect a series: measure its first and last checkpoint, and the distance of every checkpoint to the last.

    Raises
    ------
    ValueError
        The series has a single checkpoint.
    """
    if len(series.checkpoints) < 2:
        raise ValueError(
            f"cannot inspect {printable(series.path)} as a series: it has one checkpoint, "
            f"{printable(series.last.files.path)}; inspect that"
        )
    return SeriesInspection(series, inspect(series.last, spectra), update_distances(series))


def series_screen(inspection: SeriesInspection, target: Console, all: bool = False) -> str:
    """Format the inspection of a series: one line per role, or per module if ``all`` is set."""
    modules = inspection.modules()
    before, last = inspection.distances.steps[-2:]
    if all:
        body = aligned_table(_MODULE_COLUMNS, modules)
    else:
        roles = [row | {"name": f"{row['stack']} {row['role']}".strip()} for row in inspection.roles()]
        body = aligned_table(_ROLE_COLUMNS, roles)
    change = f"of the update from step {before} to {last}, relative to its norm at step {last}"
    # A change from a zero update is infinite or NaN, and comes first.
    by_change = sorted(modules, key=lambda row: -np.nan_to_num(row["last_change"], nan=np.inf))
    moving = [Elided(row["module"], f"{format_percent(row['last_change']):<6} ") for row in by_change[:3]]
    early = sorted(row["settled"] for row in modules if row["settled"] < last)
    settled = f"{len(early)} of {len(modules)} modules before step {last}"
    if early:
        settled += f", the first at step {early[0]}"
    return report_screen(
        target,
        [*header_blocks(inspection.facts), *starmap(text_block, inspection.absences)],
        body,
        blocks=[
            text_block("last change", change),
            Block("moves most", moving),
            text_block("settled", f"{settled}: the update stays within {THRESHOLD:.0%} of the last one from there on"),
        ],
        findings=inspection.last.details,
        command=_plot_command(inspection.series),
    )


def _plot_command(series: Series) -> str:
    """Return the command that plots the series, "" unless one folder has all checkpoints."""
    folder = Path(series.path or "")
    if {adapter.files.path.parent for adapter in series.checkpoints.values()} != {folder}:
        return ""
    option = "" if is_series(folder) else " --series"
    figure = "turns" if allows_turns(series.update_steps()) else "settling"
    return shell_command(f"lorascope plot {figure} {{}}{option} -o {figure}.pdf", [folder])
