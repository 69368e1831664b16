"""Panel of an explorer for a dial: the curve of a part, and its numbers at each stop of a slider over the scale."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from lorascope.analysis.dial import KEEP, PROBE, TASK, Dial
from lorascope.charts import plotly_backend
from lorascope.charts.chart import Chart
from lorascope.charts.figure_plan import plan_figure
from lorascope.charts.marks import Axis, Line, Point, Text
from lorascope.charts.theme import Theme

_AXES = {TASK: "task loss", KEEP: "distance from the base", PROBE: "distance of a probe"}
_GRID = 0.05  # distance of stops: the arrow keys cross the slider in some 25 steps


@dataclass(frozen=True, eq=False)
class DialSlider:
    """Slider over the scale of a part of an update, with everything that it shows.

    Parameters
    ----------
    dial : Dial
        Result of ``ls.dial``.

    Raises
    ------
    ValueError
        No part has a curve.
    """

    dial: Dial

    def __post_init__(self) -> None:
        if not self.part_names:
            scales = ", ".join(map("{:g}".format, self.dial.table["scale"].unique()))
            raise ValueError(f"dial must have a curve, got scales {scales}: measure it with scales=(0, 0.5, 1)")

    @property
    def part_names(self) -> list[str]:
        """Parts with a curve."""
        summary = self.dial.parts
        return summary.loc[summary["best_scale"].notna(), "part"].to_list()

    @property
    def scales(self) -> list[float]:
        """Measured scales. A curve ends early if it leaves the range of the dtype, and all are shown up to there."""
        curves = self.dial.table[self.dial.table["part"].isin(self.part_names)]
        last = curves.groupby("part")["scale"].max().min()
        return np.unique(curves.loc[curves["scale"] <= last, "scale"]).tolist()

    @property
    def stops(self) -> list[float]:
        """Measured scales, and the multiples of 0.05 between them."""
        scales = np.array(self.scales)
        grid = np.arange(scales[0], scales[-1], _GRID).round(2)
        is_measured = np.isclose(grid[:, None], scales).any(axis=1)
        return sorted([*self.scales, *grid[~is_measured].tolist()])

    def numbers(self, part_name: str) -> pd.DataFrame:
        """Return the columns of the dial's table by stop and axis, with values and changes interpolated linearly.

        ``low`` and ``high`` are NaN at scales that were not measured.
        """
        curve = self.dial.curve(part_name)
        tables = []
        for axis in _AXES:
            measured = curve[curve["axis"] == axis]
            if measured.empty:  # no probe
                continue
            table = measured.set_index("scale").reindex(self.stops)
            for column in ("value", "change"):
                table[column] = np.interp(self.stops, measured["scale"], measured[column])
            tables.append(table.assign(axis=axis, unit=measured["unit"].iloc[0]).reset_index())
        return pd.concat(tables).sort_values("scale", kind="stable", ignore_index=True)

    def draw(self, part_name: str) -> Chart:
        """Plot task loss against distance from the base along the curve of a part."""
        curve = self.dial.curve(part_name)
        points = curve.pivot(index="scale", columns="axis", values="value").reset_index()
        points["label"] = points["scale"].map("{:g}".format)
        points.loc[points["scale"] == self._best_scale(part_name), "label"] += " best"
        # Most curves fall steeply and then flatten, so there is room for the labels to the upper right of the dots.
        points["right"] = points[KEEP] + 0.035 * np.ptp(points[KEEP])
        points["above"] = points[TASK] + 0.04 * np.ptp(points[TASK])
        # A line is drawn in order of x, but the distance may fall along the curve, so each segment is its own.
        segments = []
        for number, (start, stop) in enumerate(pairwise(points.index)):
            segments.append(points.loc[[start, stop]].assign(segment=str(number)))
        return Chart(
            points,
            [
                Line(KEEP, TASK, stretch="segment", data=pd.concat(segments)),
                Point(KEEP, TASK),
                Text("right", "above", "label"),
            ],
            title=f"Task loss against distance from the base: {part_name}",
            x=Axis(label=f"distance from the base ({self.dial.unit})"),
            y=Axis(label="task loss (nats)"),
            caption=f"{self.dial.label}: means over rows. Dots: measured scales; lines: linear interpolation. "
            "Best: least distance within the margin of the task loss.",
            meta={"receipt": self.dial.receipt.to_json()},
        )

    def to_page(self, look: Theme, width: float) -> dict[str, Any]:
        """Return what the page shows of each part: its figure, and the position and the numbers of every stop."""
        panels = {}
        for part_name in self.part_names:
            chart = self.draw(part_name)
            figure = plotly_backend.draw(plan_figure(chart, look), width)
            panels[part_name] = {
                "title": chart.title,
                "figure": figure.to_json(),
                "stops": self._describe_stops(part_name),
            }
        return panels

    def _best_scale(self, part_name: str) -> float:
        return float(self.dial.parts.set_index("part")["best_scale"][part_name])

    def _describe_stops(self, part_name: str) -> list[dict[str, Any]]:
        scales, best, numbers = self.scales, self._best_scale(part_name), self.numbers(part_name)
        described = []
        for scale in self.stops:
            rows = numbers[numbers["scale"] == scale]
            tick, name = f"{scale:g}", f"{scale:g}, measured"
            if scale == best:
                tick, name = f"{tick}\nbest", f"{name}, best"
            elif scale not in scales:
                after = int(np.searchsorted(scales, scale))
                tick, name = "", f"{scale:g}, interpolated between {scales[after - 1]:g} and {scales[after]:g}"
            cells = []
            for row in rows.to_dict("records"):
                interval = f"{row['low']:.6g} to {row['high']:.6g}"
                if scale not in scales:
                    interval = "interpolated"
                axis_name = f"{_AXES[row['axis']]} ({row['unit']})"
                cells.append([axis_name, f"{row['value']:.6g}", f"{row['change']:.6g}", interval])
            values = rows.set_index("axis")["value"]
            position = {"x": values[KEEP], "y": values[TASK]}
            described.append({"scale": scale, "tick": tick, "name": name, "cells": cells, **position})
        return described
