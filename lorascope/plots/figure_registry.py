"""Registry of figures: the decorator that adds one, how to read each, and the records that it requires of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.plots.requirements import missing_reason
from lorascope.plots.run_groups import Cohort, Runs, gather
from lorascope.runs.result import Result

Topic = Literal["updates", "ranks", "factors", "routers", "neurons", "schedules", "optimizers"]
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
        steps"``, ``"spectra"`` (singular values of updates), ``"frequencies"`` (Fourier coefficients), ``"basis"``
        (coefficients on any basis) and ``"heads"`` (HydraLoRA's experts).
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
        return "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)", self.draw.__doc__ or "", re.MULTILINE))


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
        return draw

    return register


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

    Returns
    -------
    DataFrame
        ``figure, runs, drawable, missing``: minimum number of runs, whether this run can be one of them, and if not,
        the missing records and how to get them.
    """
    rows = []
    for name, entry in FIGURES.items():
        reasons = [missing_reason(run, need, entry.history) for need in entry.needs]
        missing = "; ".join(filter(None, reasons))
        rows.append({"figure": name, "runs": entry.runs, "drawable": not missing, "missing": missing})
    from lorascope.schema.uncut_table import UncutTable  # imports pandas, which no other command needs at once

    return UncutTable(rows)
