"""Definition of a probe: the registered runs of a study, what is kept of them, and the figures of a single run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from lorascope import observe, plots
from lorascope.charts.chart import Drawable
from lorascope.inputs.tasks import Task
from lorascope.methods.base import Method
from lorascope.observe import Observer
from lorascope.plots.builders import metric_bars
from lorascope.plots.run_groups import gather
from lorascope.runs.run import Run

PROBES: dict[str, Probe] = {}
"""Probes by name, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of a study: a method on a model and a task, run for several seeds.

    Parameters
    ----------
    label : str
        Name of the arm in the registration, in legends and in tables.
    method : Method
        Method; its learning rates are replaced by those that the registration chooses.
    settings : mapping
        Keyword arguments of ``train``, including ``steps`` and ``batch_size``.
    model : str, or callable
        Name for ``models.load``, or a function that returns a fresh model. Default "minilm".
    task : str or Task
        Name for ``tasks.load``, or the task itself. Default "sentiment".
    vary : callable, optional
        ``vary(arm, seed)`` returns the arm of one seed. Use it if the task, the ranks or the training seed (``seed`` in
        ``settings``) depends on the seed.
    """

    label: str
    method: Method
    settings: Mapping[str, Any]
    model: str | Callable[[], nn.Module] = "minilm"
    task: str | Task = "sentiment"
    vary: Callable[[Arm, int], Arm] | None = None

    def of_seed(self, seed: int) -> Arm:
        """Return the arm of one seed."""
        return self.vary(self, seed) if self.vary else self


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


def encoder_settings(steps: int = 300, *observers: Observer) -> dict[str, Any]:
    """Return the training settings of the arms on minilm, which are scored after the last step only."""
    # The validation split of sentiment has 1,968 rows; a mixture of tasks has more, and is scored on as many.
    observed = [observe.norms(every=10), *observers]
    return {"steps": steps, "batch_size": 16, "eval_every": 0, "eval_size": 1968, "observe": observed}


def decoder_settings() -> dict[str, Any]:
    """Return the training settings of the arms on the whole of SmolLM2."""
    settings = {"steps": 40, "batch_size": 8, "eval_every": 0, "eval_size": 200}
    return settings | {"observe": [observe.norms(every=5)]}


def factor_settings(steps: int = 300) -> dict[str, Any]:
    """Return the settings of arms whose factors are read at the start and at the end."""
    return encoder_settings(steps, observe.factors(every=steps))


@dataclass(frozen=True, kw_only=True)
class EvidenceFigure:
    """A figure of the gallery, which is drawn from runs of the evidence.

    Parameters
    ----------
    name : str
        Name of its file, without ".png".
    alt : str
        What it shows, in one line.
    arms : mapping label -> label
        Label of the runs in the figure -> label of their registered arm.
    draw : callable
        ``draw(runs)`` returns the chart, given the runs of each label in the order of their seeds.
    seeds : int or None
        Number of seeds, from the first judged one on. None shows all seeds that all arms have, at least two. Default
        5, the first look of most claims; with two, intervals are seven times as wide.
    scores_only : bool
        Whether scores and kept tables are enough. If so, ``runs`` are ``KeptRun``.
    table : str
        Name of a kept table that all runs must have, which requires ``scores_only``. Default none.
    tuning : bool
        Whether the tuning runs are shown as well, which requires ``scores_only``.
    """

    name: str
    alt: str
    arms: Mapping[str, str]
    draw: Callable[[Mapping[str, Sequence[Any]]], Drawable]
    seeds: int | None = 5
    scores_only: bool = False
    table: str = ""
    tuning: bool = False


def own_labels(*labels: str) -> dict[str, str]:
    """Return the arms of a figure in which they have the labels of the registration."""
    return {label: label for label in labels}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Study of one paper: the runs that its registered claims need, and the paper's figures of a single run.

    A module of ``lorascope.probes`` defines its probe as ``PROBE``.

    Parameters
    ----------
    name, title, source, question : str
        Short name; heading, reference and question in the report.
    arms : callable
        ``arms()`` returns the registered arms, whose runs are the evidence for the claims. Default none.
    keep : mapping
        Name of a kept table and label of a registered arm, which may be one of another probe -> function of the
        finished run, and of the other runs that the table is computed from. Default none.
    figures : callable
        ``figures(runs)`` returns the paper's figures of one run per method, by label of the arm. Default none.
    notes : sequence of str
        What to know about these figures. Default none.
    evidence_figures : callable
        ``evidence_figures()`` returns the figures of the gallery, which show kept runs. Default none.
    order : int
        Place in the report; probes with the same number are in the order of their files. Default 1.
    """

    name: str
    title: str
    source: str
    question: str
    arms: Callable[[], Sequence[Arm | OwnArm]] = lambda: ()
    keep: Mapping[tuple[str, str], Callable[..., pd.DataFrame]] = field(default_factory=dict)
    figures: Callable[[Mapping[str, Run]], Sequence[ReportFigure]] = lambda runs: ()
    notes: Sequence[str] = ()
    evidence_figures: Callable[[], Sequence[EvidenceFigure]] = lambda: ()
    order: int = 1


def accuracy_bars(runs: Mapping[str, Sequence[Any]], title: str, start: float) -> Drawable:
    """Return the test accuracy of arms as bars, on an axis from ``start``; they may have different tasks."""
    return metric_bars(gather("accuracy", runs), start, "", (), title)


def training_loss(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    """Return the training loss over the steps, without validation scores, which arms have only after the last step."""
    return plots.training_curves(runs).charts()[0]
