"""Contents of a series of checkpoints: the first and last one, and where the updates still move."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.analysis.settling import THRESHOLD, Distances, distances
from lorascope.diagnosis.inspection import Inspection, inspect, json_values, known_mean, pool_norms, role_position
from lorascope.diagnosis.terminal import WIDTH, elide, norm, number, percent
from lorascope.files.printable import printable
from lorascope.runs.checkpoint_names import count_and_span
from lorascope.runs.loading import is_series
from lorascope.runs.series import Series

_LABEL = 15
_Row = dict[str, Any]


@dataclass(frozen=True)
class SeriesInspection:
    """Result of ``lorascope inspect`` for the checkpoints of one training.

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
    def facts(self) -> list[tuple[str, str]]:
        """Facts of the last checkpoint under the name of the series, and the steps."""
        (_, kind), *facts = self.last.facts
        absent = len(self.series.meta.modules) - len(self.distances.values)
        return [
            (self.series.label, kind),
            *facts,
            ("checkpoints", count_and_span(self.distances.steps)),
            *(("skipped", reason) for reason in self.series.skipped.values()),
            *([("absent", f"{absent} modules of other checkpoints, which the last one lacks")] if absent else []),
        ]

    def modules(self) -> list[_Row]:
        """Return one row per module of the last checkpoint, in the order of the axes.

        Keys are ``module, stack, layer, role, rank, first_norm, update_norm, first_effective_rank, effective_rank,
        last_change`` (relative distance of the last two checkpoints) and ``settled``, see `Distances.settled`. Values
        of a module that the first checkpoint lacks are NaN there.
        """
        ranks, (first, *_), last = self.series.ranks(), self.series.checkpoints.values(), self.series.last
        rows = []
        for place in self.series.meta.modules:
            if (name := place.module) in self.distances.values:
                before, after = first.measures.get(name, {}), last.measures[name]
                rows.append({
                    "module": name, "stack": place.stack, "layer": place.layer, "role": place.role, "rank": ranks[name],
                    "first_norm": before.get("update_norm", np.nan), "update_norm": after["update_norm"],
                    "first_effective_rank": before.get("effective_rank", np.nan),
                    "effective_rank": after["effective_rank"], **self._movement([name]),
                })  # fmt: skip
        return rows

    def roles(self) -> list[_Row]:
        """Return one row per stack and role: norms of all its modules together, and their mean effective ranks."""
        groups: dict[tuple[str, str], list[_Row]] = {}
        for row in self.modules():
            groups.setdefault((row["stack"], row["role"]), []).append(row)

        def in_order(item: tuple[tuple[str, str], list[_Row]]) -> tuple[int, ...]:
            return role_position(*item[0], [row["layer"] for row in item[1]])

        return [
            {"stack": stack, "role": role, "modules": len(group)}
            | {name: pool_norms(row[name] for row in group) for name in ("first_norm", "update_norm")}
            | {name: known_mean(row[name] for row in group) for name in ("first_effective_rank", "effective_rank")}
            | self._movement([row["module"] for row in group])
            for (stack, role), group in sorted(groups.items(), key=in_order)
        ]

    def _movement(self, modules: Sequence[str]) -> _Row:
        change = float(self.distances.relative(modules)[-2])
        return {"last_change": change, "settled": self.distances.settled(modules)}

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; unknown values are None."""
        found = {
            "name": self.series.label, "path": str(self.series.path), "kind": self.last.facts[0][1],
            "facts": dict(self.facts[1:]), "steps": list(self.distances.steps), "threshold": THRESHOLD,
            "roles": self.roles(), "modules": self.modules(), "findings": list(self.last.findings),
        }  # fmt: skip
        return dict(json_values(found))


def inspect_series(series: Series, spectra: bool = False) -> SeriesInspection:
    """Measure the first and last checkpoint of a series, and the distance of every checkpoint to the last one.

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
    return SeriesInspection(series, inspect(series.last, spectra), distances(series))


def series_screen(inspection: SeriesInspection, all: bool = False) -> str:
    """Format a series as text of 80 columns: one line per role, or per module if ``all`` is set."""
    modules = inspection.modules()
    before, last = inspection.distances.steps[-2:]
    lines = [line for label, text in inspection.facts for line in _fact(label, text)]
    lines += ["", *(_module_lines(modules) if all else _role_lines(inspection.roles())), ""]
    lines += _fact("last change", f"of the update from step {before} to {last}, relative to its norm at step {last}")
    moving = sorted(modules, key=lambda row: -np.nan_to_num(row["last_change"], nan=np.inf))[:3]
    for place, row in enumerate(moving):
        label = "" if place else "moves most"
        lines.append(f"{label:<{_LABEL}}{percent(row['last_change']):<6} {elide(row['module'], WIDTH - _LABEL - 7)}")
    early = sorted(row["settled"] for row in modules if row["settled"] < last)
    count = f"{len(early)} of {len(modules)} modules before step {last}" + (
        f", the first at step {early[0]}" if early else ""
    )
    lines += _fact("settled", f"{count}: the update stays within {THRESHOLD:.0%} of the last one from there on")
    for place, text in enumerate(inspection.last.findings):
        lines += _fact("" if place else "findings", text)
    lines += [f"{'next':<{_LABEL}}{command}" for command in _next_command(inspection.series)]
    return "\n".join(lines)


def _next_command(series: Series) -> list[str]:
    """Return the command that plots the series, if one folder has all checkpoints."""
    folder = Path(series.path or "")
    if {adapter.files.path.parent for adapter in series.checkpoints.values()} != {folder}:
        return []
    paths = [*sorted((str(folder), os.path.relpath(folder)), key=len), "FOLDER"]
    option = "" if is_series(folder) else " --series"
    commands = [f"lorascope plot settling {printable(shlex.quote(path))}{option} -o settling.pdf" for path in paths]
    return [next((command for command in commands if len(command) <= WIDTH - _LABEL), commands[-1])]


def _role_lines(rows: Iterable[_Row]) -> list[str]:
    heads = ("|dW| first", "last", "effective first", "last", "last change", "settled")
    return [
        f"{'role':<{_LABEL}}" + "".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True)),
        *(_numbers(f"{row['stack']} {row['role']}".strip(), _LABEL, row, _WIDTHS) for row in rows),
    ]


def _module_lines(rows: Iterable[_Row]) -> list[str]:
    heads = ("first", "last", "eff.", "last", "change", "settled")
    return [
        f"{'module':<{_NAME}}" + "".join(f"{head:>{width}}" for head, width in zip(heads, _NARROW, strict=True)),
        *(_numbers(row["module"], _NAME, row, _NARROW) for row in rows),
    ]


_WIDTHS, _NARROW = (11, 8, 16, 7, 13, 10), (8, 8, 6, 6, 8, 9)
_NAME = WIDTH - sum(_NARROW)


def _numbers(name: str, width: int, row: Mapping[str, Any], widths: Sequence[int]) -> str:
    cells = [norm(row["first_norm"]), norm(row["update_norm"])]
    cells += [number(row["first_effective_rank"]), number(row["effective_rank"])]
    cells += [percent(row["last_change"]), str(row["settled"])]
    shown = "".join(f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
    return f"{elide(name, width - 1):<{width}}{shown}"


def _fact(label: str, text: str) -> list[str]:
    """Return the lines of a fact, the first with its label."""
    lines = textwrap.wrap(printable(text), WIDTH - _LABEL) or [""]
    labels = [elide(label, _LABEL - 1), *[""] * (len(lines) - 1)]
    return [f"{head:<{_LABEL}}{line}".rstrip() for head, line in zip(labels, lines, strict=True)]
