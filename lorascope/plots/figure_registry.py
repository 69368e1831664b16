"""Registry of figures: the decorator that adds one, how to read each, and the records that it requires of a run."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Literal, TypeVar

import pandas as pd

from lorascope.charts.chart import Chart, Drawable, Panels
from lorascope.plots.requirements import missing_reason
from lorascope.plots.run_groups import MIXTURES, Runs, gather, mixture_sentences
from lorascope.runs.result import Result

Topic = Literal["updates", "ranks", "factors", "routers", "neurons", "schedules", "optimizers"]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Drawable])
_RUNS = "runs, control : Run, sequence of Run, or mapping label -> run or runs"


@dataclass(frozen=True)
class Figure:
    """Registered figure.

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
        (coefficients on any basis) and
        ``"heads"`` (HydraLoRA's experts).
    history : bool
        Whether the quantities must be recorded at more than one step.
    runs : int
        Minimum number of runs.
    reads, misleads : str
        How to read the figure, and its caveat; at most two sentences each, as plain text.
    example : str
        Code that draws the figure from the runs of the gallery.
    """

    name: str
    draw: Callable[..., Any]
    topic: Topic
    needs: tuple[str, ...]
    history: bool
    runs: int
    reads: str
    misleads: str
    example: str = ""


FIGURES: dict[str, Figure] = {}
DRAWN: dict[str, Callable[..., Any]] = {}
"""All functions of ``lorascope.plots`` that draw: the figures, and those that take tables instead of runs."""


def figure(
    *,
    topic: Topic,
    needs: tuple[str, ...],
    reads: str,
    misleads: str,
    history: bool = False,
    runs: int = 1,
    check: bool = True,
    apart: bool = False,
    takes: str = "Runs to plot, and runs to compare with.",
    raises: str = "",
    example: str = "",
) -> Callable[[Callable[..., Drawable]], Callable[..., Any]]:
    """Register a function ``draw(cohort, ...)`` as a figure ``draw(runs, control=None, ...)`` under its own name.

    The figure groups the runs, checks that they have what it requires, and adds to every chart its origin and, in the
    caption, the gates of input-dependent updates.

    Parameters
    ----------
    topic, needs, reads, misleads, history, runs, example
        See `Figure`.
    check : bool
        Whether to check ``needs`` before drawing; False for a function whose parameters choose what it needs.
    apart : bool
        Whether the function takes a list of cohorts, the runs and the control, instead of one that has both.
    takes, raises : str
        For the docstring: the parameters ``runs`` and ``control``, and when the figure raises ValueError.

    Raises
    ------
    ValueError
        There is already a figure of this name.
    """

    def register(draw: Callable[..., Drawable]) -> Callable[..., Any]:
        name, signature = draw.__name__, inspect.signature(draw)
        first, *own = signature.parameters.values()

        @wraps(draw)
        def drawn(runs: Runs, control: Runs | None = None, *args: Any, **kwargs: Any) -> Drawable:
            cohorts = [gather(name, runs, None if apart else control, needs)]
            if apart and control is not None:
                cohorts.append(gather(name, control, None, needs))
            for cohort in cohorts if check else ():
                cohort.require(*needs, history=history)
            return _complete(draw(cohorts if apart else cohorts[0], *args, **kwargs), cohorts[0].meta)

        types = {"runs": Runs, "control": Runs | None}
        added = [first.replace(name="runs", annotation=Runs)]
        added.append(first.replace(name="control", annotation=types["control"], default=None))
        drawn.__signature__ = signature.replace(parameters=[*added, *own])  # type: ignore[attr-defined]
        drawn.__annotations__ = types | {key: kind for key, kind in draw.__annotations__.items() if key != first.name}
        drawn.__doc__ = draw.__doc__ = _document(inspect.getdoc(draw) or "", takes, raises, example)
        if name in FIGURES and FIGURES[name].draw.__module__ != draw.__module__:
            raise ValueError(f"there is already a figure {name!r}, of {FIGURES[name].draw.__module__}")
        FIGURES[name] = Figure(name, drawn, topic, needs, history, runs, reads, misleads, example)
        DRAWN[name] = drawn
        return drawn

    return register


def table_figure(draw: AnyFunction) -> AnyFunction:
    """Add a function that draws a table instead of runs to ``lorascope.plots``."""
    DRAWN[draw.__name__] = draw
    return draw


def _document(doc: str, takes: str, raises: str, example: str) -> str:
    """Add the parameters ``runs`` and ``control``, the errors and the example to a docstring."""
    head = "\nParameters\n----------\n"
    text, _, own = doc.partition(head)
    runs = "" if own.startswith("runs") else f"{_RUNS}\n    {takes}\n"
    sections = [text.rstrip(), f"{head}{runs}{own}".rstrip()]
    if raises:
        sections.append(f"\nRaises\n------\nValueError\n    {raises}")
    if example:
        starts = {statement.lineno for statement in ast.parse(example).body}
        lines = enumerate(example.splitlines(), start=1)
        code = "\n".join(f"{'>>>' if number in starts else '...'} {line}" for number, line in lines)
        sections.append(f"\nExamples\n--------\n{code}")
    return "\n".join(sections) + "\n"


def _complete(drawn: Drawable, meta: dict[str, Any]) -> Drawable:
    """Add the origin of a figure to its charts, and the gates of input-dependent updates to every caption."""
    rows = [[replace(chart, meta=meta | dict(chart.meta)) for chart in row] for row in drawn.rows()]
    mixtures: dict[str, str] = {}
    for row in rows:
        for chart in row:
            mixtures |= chart.meta.get(MIXTURES, {})
    added = mixture_sentences(mixtures)
    rows = [[replace(chart, caption=" ".join([chart.caption, *added])) for chart in row] for row in rows]
    return rows[0][0] if isinstance(drawn, Chart) else Panels(tuple(map(tuple, rows)))


def available(run: Result) -> pd.DataFrame:
    """List the figures, whether the run has their records, and what is missing.

    Returns
    -------
    DataFrame
        ``figure, runs, drawable, missing``: minimum number of runs, whether this run can be one of them, and if not,
        the missing records and how to get them.
    """
    rows = []
    for name, entry in FIGURES.items():
        lacking = [missing_reason(run, need, entry.history) for need in entry.needs]
        missing = "; ".join(filter(None, lacking))
        rows.append({"figure": name, "runs": entry.runs, "drawable": not missing, "missing": missing})
    return pd.DataFrame(rows)
