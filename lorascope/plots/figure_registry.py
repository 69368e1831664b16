"""Registry of figures: the decorator that adds one, how to read each, and the records that it requires of a run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Any, Literal, TypeVar

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.plots.requirements import missing_reason
from lorascope.plots.run_groups import Cohort, Runs, gather
from lorascope.runs.result import Result

Topic = Literal["updates", "ranks", "factors", "routers", "neurons", "schedules", "optimizers"]
_RESULT = """Returns
-------
Chart or Panels
    ``.save("figure.pdf")`` writes it, ``.mpl(ax=ax)`` draws one panel on your axes, ``.plotly()`` is interactive."""
AnyFigure = TypeVar("AnyFigure", bound=Callable[..., Drawable])


@dataclass(frozen=True)
class Figure:
    """Figure in the registry: its function, topic, reading, caveat and requirements.

    Parameters
    ----------
    name : str
        Name of the function in ``lorascope.plots``.
    draw : callable
        The function: ``draw(runs, control=None, ...)``.
    topic : str
        Gallery page of the figure: "updates", "ranks", "factors", "routers", "neurons", "schedules" or "optimizers".
    needs : tuple of str
        Quantities that must be recorded. Also possible: ``"updates"`` (adapter factors), ``"updates at several
        steps"``, ``"updates at many steps"`` (12), ``"spectra"`` (singular values of updates), ``"frequencies"``
        (Fourier coefficients), ``"basis"`` (coefficients on any basis) and ``"heads"`` (HydraLoRA's experts).
    history : bool
        Whether the quantities must be recorded at more than one step.
    runs : int
        Minimum number of runs.
    reads, misleads : str
        How to read the figure, and its caveat; at most two sentences each, as plain text.
    """

    name: str
    draw: Callable[..., Any]
    topic: Topic
    needs: tuple[str, ...]
    history: bool
    runs: int
    reads: str
    misleads: str

    @property
    def example(self) -> str:
        """Code that draws the figure from the runs of the gallery: the examples of its docstring."""
        return example_code(self.draw)


class FigureAdvice(pd.DataFrame):
    """Table of `available`, displayed as the figures that can be drawn, and what to do for the others."""

    def __repr__(self) -> str:
        lines = []
        for advice, figures in self._by_advice().items():
            lines.append(f"{advice}:")
            lines += wrap(", ".join(figures), 100, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = ""
        for advice, figures in self._by_advice().items():
            cells = (escape(advice), ", ".join(map(escape, figures)))
            rows += "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells).join(("<tr>", "</tr>"))
        return f"<table>{rows}</table>"

    def _by_advice(self) -> dict[str, list[str]]:
        """Return the figures by what to do for them, those that can be drawn first."""
        groups: dict[str, list[str]] = {"drawn from this run": [], "drawn from two runs or more, such as this one": []}
        ready, of_several = groups.values()
        for row in self.to_dict("records"):
            if not row["drawable"]:
                # What to do is behind the colon; figures may need several records for one reason.
                advice = dict.fromkeys(reason.partition(": ")[2] or reason for reason in row["missing"].split("; "))
                groups.setdefault("; ".join(advice), []).append(row["figure"])
            elif row["runs"] > 1:
                of_several.append(row["figure"])
            else:
                ready.append(row["figure"])
        return {advice: figures for advice, figures in groups.items() if figures}


FIGURES: dict[str, Figure] = {}


def figure(
    *,
    topic: Topic,
    needs: tuple[str, ...],
    reads: str,
    misleads: str,
    history: bool = False,
    runs: int = 1,
) -> Callable[[AnyFigure], AnyFigure]:
    """Register a function ``draw(runs, control=None, ...)`` as a figure in the registry; for parameters see `Figure`.

    The function starts with `gather_runs` and ends with `Cohort.complete`.

    Raises
    ------
    ValueError
        There is already a figure of this name.
    """

    def register(draw: AnyFigure) -> AnyFigure:
        name = draw.__name__
        # A module that is imported again, as in a notebook, replaces its own figures.
        if name in FIGURES and FIGURES[name].draw.__module__ != draw.__module__:
            raise ValueError(f"there is already a figure {name!r}, of {FIGURES[name].draw.__module__}")
        FIGURES[name] = Figure(name, draw, topic, needs, history, runs, reads, misleads)
        return document_result(draw)

    return register


def example_code(draw: Callable[..., Any]) -> str:
    """Return the code of the examples in the docstring of a figure."""
    return "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)", draw.__doc__ or "", re.MULTILINE))


def document_result(draw: AnyFigure) -> AnyFigure:
    """Add to the docstring of a figure what can be done with its result, which is the same for all figures."""
    sections = inspect.cleandoc(draw.__doc__ or "").split("\n\n")
    later = [number for number, section in enumerate(sections) if section.startswith(("Raises\n", "Examples\n"))]
    sections.insert(min(later, default=len(sections)), _RESULT)
    draw.__doc__ = "\n\n".join(sections)
    return draw


def gather_runs(name: str, runs: Runs, control: Runs | None = None, check: bool = True) -> Cohort:
    """Gather the runs of a figure in the registry by label, and check the records that its entry requires.

    Parameters
    ----------
    name : str
        Name of the figure.
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    check : bool
        Whether to check the runs; False for a figure whose parameters select what it requires.

    Raises
    ------
    ValueError
        A run lacks records, or the runs cannot be grouped, as for `gather`.
    """
    entry = FIGURES[name]
    cohort = gather(name, runs, control, entry.needs)
    if check:
        cohort.require(*entry.needs, history=entry.history)
    return cohort


def gather_apart(name: str, runs: Runs, control: Runs | None) -> dict[str, Cohort]:
    """Gather the runs of a figure in the registry, and its controls in separate panels, by the prefix of titles."""
    cohorts = {"": gather_runs(name, runs)}
    if control is not None:
        cohorts["control: "] = gather_runs(name, control)
    return cohorts


def available(run: Result) -> pd.DataFrame:
    """List the figures in the registry, whether the run has their records, and what is missing.

    It is displayed as advice: the figures that can be drawn, and what to do for the others.

    Returns
    -------
    DataFrame
        ``figure, runs, drawable, missing``: minimum number of runs, whether this run can be one of them, and if not,
        the missing records and how to get them.

    Examples
    --------
    >>> ls.plots.available(ls.example("lora"))
    >>> ls.plots.available(ls.example("lora")).query("drawable")
    """
    rows = []
    for name, entry in FIGURES.items():
        reasons = [missing_reason(run, need, entry.history) for need in entry.needs]
        missing = "; ".join(filter(None, reasons))
        rows.append({"figure": name, "runs": entry.runs, "drawable": not missing, "missing": missing})
    return FigureAdvice(rows)
