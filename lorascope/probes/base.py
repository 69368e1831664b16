"""Definition of a probe: the runs it needs and the findings it draws from them."""

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
from lorascope.schema.deprecation import accept_old_fields, formerly

PROBES: dict[str, Probe] = {}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of a study: a method on a model and a task, run for several seeds.

    Parameters
    ----------
    label : str
        Name of the arm in legends, in findings and in ``probes.json``.
    method : Method
        Method with its learning rates.
    settings : mapping
        Keyword arguments of ``train``, including ``steps`` and ``batch_size``.
    model : str, or callable
        Name for ``models.load``, or a function that returns a fresh model. Default "minilm".
    task : str or Task
        Name for ``tasks.load``, or the task itself. Default "sentiment".
    blocks : int or None
        Number of leading blocks of the model to keep; None keeps all.
    cost : float
        Cost of a step on 16 examples, in full fine-tuning steps of minilm on 16 examples. Default 1.
    vary : callable, optional
        ``vary(arm, seed)`` returns the arm of one seed. Use it if the task, the ranks or the training seed (``seed`` in
        ``settings``) depends on the seed.
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
        """Cost of one seed, in full fine-tuning steps of minilm on 16 examples."""
        return self.cost * self.settings["steps"] * self.settings["batch_size"] / 16


def encoder_settings(quick: bool) -> dict[str, Any]:
    """Return the training settings of the arms on minilm. They are the same for all probes, so that runs are shared."""
    steps = 24 if quick else 300
    # Snapshots of factors are large, so only those at step 0 and at the end are saved.
    shared: dict[str, Any] = {"steps": steps, "observe": [observe.norms(), observe.factors(every=steps)]}
    if quick:
        return shared | {"batch_size": 8, "eval_every": 12, "eval_size": 100, "test_size": 300}
    return shared | {"batch_size": 16}


@dataclass(frozen=True)
class ReportFigure:
    """A chart with its reading and its caveat.

    Parameters
    ----------
    chart : Chart or Panels
        Chart to draw.
    reads : str
        How to read the chart.
    misleads : str
        Caveat: a confounder and its remedy.
    figure : str
        Name of the figure in ``plots``; "" if the chart is not one of them.
    """

    chart: Drawable
    reads: str
    misleads: str
    figure: str = ""


@accept_old_fields
@dataclass(frozen=True)
class Findings:
    """Results of a probe.

    Parameters
    ----------
    verdicts : sequence of Verdict
        One verdict per judged claim.
    figures : sequence of ReportFigure
        Figures of the report, in order.
    tables : mapping title -> DataFrame
        Tables printed after the figures.
    notes : sequence of str
        What was held fixed, what no claim uses, and what is missing.
    """

    verdicts: Sequence[Verdict]
    figures: Sequence[ReportFigure] = field(metadata=formerly("exhibits"))
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Study of one paper: it repeats the paper's observation and judges its claims.

    Parameters
    ----------
    name, title, source, question : str
        Name on the command line; heading, reference and question in the report.
    quick_budget : int
        Upper bound on the cost of a quick run with all its seeds, in full fine-tuning steps of minilm on 16 examples.
    arms : callable
        ``arms(quick)`` returns the arms to train.
    judge : callable
        ``judge(runs)`` returns the findings; ``runs`` maps the label of an arm to its runs by seed. With ``measure``,
        ``judge(runs, measured)``; ``measured`` maps a run id to its table.
    measure : callable, optional
        ``measure(run)`` returns a table of measurements on the trained model. It is called once per run, and the table
        is stored next to the runs.
    measure_cost : float
        Cost of ``measure`` in a quick run, per seed, in full fine-tuning steps of minilm on 16 examples. Default 0.
    seeds : int
        Number of seeds of a full run. Default 3.
    former_labels : mapping
        Old label of an arm -> label, so that folders of earlier versions can be read. Default empty.
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
    former_labels: Mapping[str, str] = field(default_factory=dict)


def make_report_figure(figure: str, chart: Drawable) -> ReportFigure:
    """Return a chart with the reading and the caveat that ``FIGURES`` lists for it."""
    return ReportFigure(chart, FIGURES[figure].reads, FIGURES[figure].misleads, figure)


def register(probe: Probe) -> Probe:
    """Add a probe to ``PROBES`` and return it."""
    PROBES[probe.name] = probe
    return probe
