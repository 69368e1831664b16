"""What a probe is: the runs it needs, and what it finds in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn

from lorascope import observe
from lorascope.charts.chart import Drawable
from lorascope.inputs.tasks import Task
from lorascope.methods.base import Method
from lorascope.plots import FIGURES
from lorascope.probes.claims import Verdict
from lorascope.runs.run import Run

PROBES: dict[str, Probe] = {}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison: a method on a model and a task, to be run for several seeds.

    Parameters
    ----------
    label : str
        Its name in legends and in the findings.
    method : Method
        With its own rates.
    settings : mapping
        Keywords of ``train``; ``steps`` among them.
    model : str, or callable
        A name for ``models.load``, or what makes a fresh model.
    task : str or Task
        A name for ``tasks.load``, or the task itself.
    blocks : int or None
        Keep the first blocks of the model only.
    cost : float
        Of a step on 16 rows, in full fine-tuning steps of minilm on 16 sentences.
    vary : callable, optional
        ``vary(arm, seed)`` gives the arm of a seed, where more than chance depends on it: the text, the ranks, or what
        else the run is seeded with (``seed`` among the settings).
    """

    label: str
    method: Method
    settings: Mapping[str, Any]
    model: str | Callable[[], nn.Module] = "minilm"
    task: str | Task = "sentiment"
    blocks: int | None = None
    cost: float = 1.0
    vary: Callable[[Arm, int], Arm] | None = None

    @property
    def budget(self) -> float:
        """Cost of one seed, in full fine-tuning steps of minilm on 16 sentences."""
        return self.cost * self.settings["steps"] * self.settings["batch_size"] / 16


def encoder_settings(quick: bool) -> dict[str, Any]:
    """How every arm on minilm trains, so that probes share their runs."""
    steps = 24 if quick else 300
    shared: dict[str, Any] = {"steps": steps, "observe": [observe.norms(), observe.factors(every=steps)]}
    if quick:
        return shared | {"batch_size": 8, "eval_every": 12, "eval_size": 100, "test_size": 300}
    return shared | {"batch_size": 16}


@dataclass(frozen=True)
class Exhibit:
    """A chart with what is to be said of it.

    Parameters
    ----------
    chart : Chart or Panels
    reads : str
        How to read it.
    misleads : str
        When it misleads.
    figure : str
        Its name in ``plots``, if it has one.
    """

    chart: Drawable
    reads: str
    misleads: str
    figure: str = ""


@dataclass(frozen=True)
class Findings:
    """What a probe found.

    Parameters
    ----------
    verdicts : sequence of Verdict
    exhibits : sequence of Exhibit
    tables : mapping title -> DataFrame
        Numbers that belong beside the charts.
    notes : sequence of str
        What was held fixed, what does not enter the claims, and what is missing.
    """

    verdicts: Sequence[Verdict]
    exhibits: Sequence[Exhibit]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One paper's motivating observation, to be made again and judged.

    Parameters
    ----------
    name, title, source, question : str
    quick_budget : float
        Stated cost of a quick run over all its seeds, in full fine-tuning steps of minilm on 16 sentences.
    arms : callable
        ``arms(quick)`` gives the runs it needs.
    judge : callable
        ``judge(runs)``, a mapping label of an arm -> runs by seed, gives the findings; with ``measure``
        ``judge(runs, measured)``, a mapping run id -> table.
    measure : callable, optional
        ``measure(run)`` gives a table that needs the model again: made once a run, and kept beside the runs.
    measure_cost : float
        Of a quick run's measuring, in full fine-tuning steps of minilm on 16 sentences.
    seeds : int
        Seeds of a full run.
    """

    name: str
    title: str
    source: str
    question: str
    quick_budget: int
    arms: Callable[[bool], Sequence[Arm]]
    judge: Callable[..., Findings]
    measure: Callable[[Run], pd.DataFrame] | None = None
    measure_cost: float = 0
    seeds: int = 3


def exhibit(figure: str, chart: Drawable) -> Exhibit:
    """A chart with the reading that the catalogue of figures gives for it."""
    return Exhibit(chart, FIGURES[figure].reads, FIGURES[figure].misleads, figure)


def register(probe: Probe) -> Probe:
    """Enter a probe into ``PROBES``."""
    PROBES[probe.name] = probe
    return probe
