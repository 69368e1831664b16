"""Definition of a probe: the runs it needs and the findings it draws from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from torch import nn

from lorascope import observe, plots
from lorascope.analysis.seed_intervals import t_interval
from lorascope.charts.chart import Drawable
from lorascope.inputs.tasks import Task
from lorascope.methods.base import Method
from lorascope.observe import Observer
from lorascope.probes.claims import CLAIMS, Verdict
from lorascope.probes.seed_statistics import BySeed, Runs
from lorascope.runs.run import Run
from lorascope.schema.deprecation import accept_old_fields, formerly

PROBES: dict[str, Probe] = {}
"""Probes by name, in the order of the report."""
SEEDS_VARY = "Seeds vary the classifier head, adapter initialization, data order and dropout."
HELD_FIXED = f"Held fixed: model, data, splits, batch size, number of steps. {SEEDS_VARY}"
"""Notes of the studies on minilm."""
Compute = Callable[[Any], BySeed]
"""Function that computes one value per seed from the data of a probe, usually a ``Statistic``."""


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


@dataclass(frozen=True)
class Scored:
    """Result of a run of an ``OwnArm``: values of its row in the evidence, scores of test rows, and kept tables."""

    row: Mapping[str, Any]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OwnArm:
    """A registered arm that ``train`` does not train, such as word counts.

    Parameters
    ----------
    label : str
        Name of the arm.
    method : mapping
        What it does, as JSON values.
    compute : callable
        ``compute(seed)`` returns its result.
    task : str or Task
        Task that is scored by row; "" for separate data.
    """

    label: str
    method: Mapping[str, Any]
    compute: Callable[[int], Scored]
    task: str | Task = ""


def encoder_settings(quick: bool) -> dict[str, Any]:
    """Return the training settings of the arms on minilm. They are the same for all probes, so that runs are shared."""
    steps = 24 if quick else 300
    # Snapshots of factors are large, so only those at step 0 and at the end are saved.
    shared: dict[str, Any] = {"steps": steps, "observe": [observe.norms(), observe.factors(every=steps)]}
    if quick:
        return shared | {"batch_size": 8, "eval_every": 12, "eval_size": 100, "test_size": 300}
    return shared | {"batch_size": 16}


def registered_settings(steps: int = 300, *observers: Observer) -> dict[str, Any]:
    """Return the training settings of the registered arms on minilm, which are scored after the last step only."""
    # The validation split of sentiment has 1,968 rows; a mixture of tasks has more, and is scored on as many.
    observed = [observe.norms(every=10), *observers]
    return {"steps": steps, "batch_size": 16, "eval_every": 0, "eval_size": 1968, "observe": observed}


def registered_decoder_settings() -> dict[str, Any]:
    """Return the training settings of the registered arms on the whole of SmolLM2."""
    settings = {"steps": 40, "batch_size": 8, "eval_every": 0, "eval_size": 200}
    return settings | {"observe": [observe.norms(every=5)]}


def registered_factors(steps: int = 300) -> dict[str, Any]:
    """Return the settings of registered arms whose factors are read at the start and at the end."""
    return registered_settings(steps, observe.factors(every=steps))


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

    A module of ``lorascope.probes`` defines its probe as ``PROBE``. What the claims and the report read is the *data*
    of the probe: the runs by label of their arm, unless ``collect`` computes more from them.

    Parameters
    ----------
    name, title, source, question : str
        Name on the command line; heading, reference and question in the report.
    quick_budget : int
        Upper bound on the cost of a quick run with all its seeds, in full fine-tuning steps of minilm on 16 examples.
    arms : callable
        ``arms(quick)`` returns the arms to train.
    registered : callable
        ``registered()`` returns the registered arms, whose runs are the evidence for the claims. Default none.
    keep : mapping
        Name of a kept table and label of a registered arm, which may be one of another probe -> function of the
        finished run, and of the other runs that the table is computed from. Default none.
    claims : mapping
        Id of a claim -> functions that compute statistic and control by seed from the data, in the order of the report.
        A claim on an arm that only a full run trains is left out of a quick run.
    figures : callable
        ``figures(data)`` returns the figures of the report, in order.
    tables : callable
        ``tables(data)`` returns the tables by title. Default none.
    notes : callable
        ``notes(data)`` returns what was held fixed, what no claim uses, and what is missing. Default none.
    collect : callable
        ``collect(runs)`` returns the data; with ``measure``, ``collect(runs, measured)``, where ``measured`` maps a run
        id to its table. By default the data are the runs.
    measure : callable, optional
        ``measure(run)`` returns a table of measurements on the trained model. It is called once per run, and the table
        is stored next to the runs.
    measure_cost : float
        Cost of ``measure`` in a quick run, per seed, in full fine-tuning steps of minilm on 16 examples. Default 0.
    seeds : int
        Number of seeds of a full run. Default 3.
    order : int
        Place in the report; probes with the same number are in the order of their files. Default 1.
    former_labels : mapping
        Old label of an arm -> label, so that folders of earlier versions can be read. Default empty.
    """

    name: str
    title: str
    source: str
    question: str
    quick_budget: int
    arms: Callable[[bool], Sequence[Arm]]
    registered: Callable[[], Sequence[Arm | OwnArm]] = lambda: ()
    keep: Mapping[tuple[str, str], Callable[..., pd.DataFrame]] = field(default_factory=dict)
    claims: Mapping[str, tuple[Compute, Compute]] = field(default_factory=dict)
    figures: Callable[[Any], Sequence[ReportFigure]]
    tables: Callable[[Any], Mapping[str, pd.DataFrame]] = lambda data: {}
    notes: Callable[[Any], Sequence[str]] = lambda data: ()
    collect: Callable[..., Any] = lambda runs: runs
    measure: Callable[[Run], pd.DataFrame] | None = None
    measure_cost: float = 0
    seeds: int = 3
    order: int = 1
    former_labels: Mapping[str, str] = field(default_factory=dict)

    def judge(self, runs: Runs, measured: Mapping[str, pd.DataFrame] | None = None) -> Findings:
        """Judge the claims, and draw the figures and tables of the report.

        Parameters
        ----------
        runs : mapping
            Label of an arm -> runs, one per seed.
        measured : mapping, optional
            Run id -> table of ``measure``, for a probe that has it.
        """
        data = self.collect(runs) if measured is None else self.collect(runs, measured)
        verdicts, notes = [], list(self.notes(data))
        for id, (statistic, control) in self.claims.items():
            try:
                values = statistic(data), control(data)
            except KeyError as error:
                full, trained = ({arm.label for arm in self.arms(quick)} for quick in (False, True))
                if error.args[0] in full - trained:
                    continue
                raise
            if all(values):
                verdicts.append(CLAIMS[id].judge(*values))
            else:
                reason = "It needs two seeds, because the runs of a pair must not share a seed."
                notes.append(f"Not judged: {CLAIMS[id].sentence!r} {reason}")
        return Findings(verdicts, self.figures(data), self.tables(data), notes)


Labelled = TypeVar("Labelled")


def select(arms: Mapping[str, Labelled], *labels: str) -> dict[str, Labelled]:
    """Return the arms with these labels in this order, without those that were not trained."""
    return {label: arms[label] for label in labels if label in arms}


def draw(figure: str, *runs: Any, **options: Any) -> ReportFigure:
    """Return a figure of ``lorascope.plots`` with the reading and the caveat that ``FIGURES`` lists for it."""
    chart = getattr(plots, figure)(*runs, **options)
    return ReportFigure(chart, plots.FIGURES[figure].reads, plots.FIGURES[figure].misleads, figure)


def format_mean(values: Iterable[float], digits: int) -> str:
    """Format the mean over seeds ± half the 95% t-interval."""
    return t_interval(np.fromiter(values, np.float64)).format(digits)


def tabulate(runs: Runs, columns: Mapping[str, Callable[[Sequence[Run]], Any]]) -> pd.DataFrame:
    """Tabulate the arms: one row per arm, one column per function of its runs."""
    rows = [{"": label} | {name: value(found) for name, value in columns.items()} for label, found in runs.items()]
    return pd.DataFrame(rows)


def over_seeds(value: Callable[[Run], float], digits: int) -> Callable[[Sequence[Run]], str]:
    """Return a column for ``tabulate``: the mean of a value over the runs of an arm ± half the 95% t-interval."""
    return lambda runs: format_mean(map(value, runs), digits)
