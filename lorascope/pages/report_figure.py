"""Figure of a page: a chart with its reading and its caveat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorascope import plots
from lorascope.charts.chart import Drawable


@dataclass(frozen=True)
class ReportFigure:
    """Figure of a report: a chart, and its reading and its caveat, if any.

    Parameters
    ----------
    chart : Chart or Panels
        Chart to draw.
    reads : str
        How to read the chart. Default none.
    misleads : str
        Caveat: a confounder and its remedy. Default none.
    title : str
        Heading, instead of the chart's title. Default none.
    """

    chart: Drawable
    reads: str = ""
    misleads: str = ""
    title: str = ""


def draw(figure: str, *runs: Any, **options: Any) -> ReportFigure:
    """Return a figure of ``lorascope.plots`` for a report, with the reading and the caveat that ``FIGURES`` lists."""
    chart = getattr(plots, figure)(*runs, **options)
    return ReportFigure(chart, plots.FIGURES[figure].reads, plots.FIGURES[figure].misleads)
