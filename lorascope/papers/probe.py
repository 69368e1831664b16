"""Definition of a probe: the registered runs of a study, what is kept of them, and the figures of a single run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from torch import nn

    from lorascope.inputs.tasks import Task
    from lorascope.methods.method import Method
    from lorascope.observe import Observer


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of a probe: a method on a model and a task, run for several seeds.

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


KeptTable = tuple[tuple[str, ...], Callable[..., pd.DataFrame]]
"""Kept table of the second edition: labels of arms, and ``function(*runs)`` of their finished runs with one seed.

The function returns the table without ``arm, seed, run``; it belongs to the run of the last label.
"""


@dataclass(frozen=True)
class Scored:
    """Result of a run of a probe's ``OwnArm``: values of its row in the evidence, scores by test row, kept tables."""

    row: Mapping[str, Any]
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OwnArm:
    """Registered arm of a probe that ``train`` does not train, such as word counts.

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


@dataclass(frozen=True, kw_only=True)
class ComputedArm:
    """Arm of the second edition that ``train`` does not train, such as an optimizer on a quadratic.

    Parameters
    ----------
    label : str
        Name of the arm.
    method : Method
        The method.
    setup : str
        Name of the module that defines what the method is applied to.
    compute : callable
        ``compute(method, seed, rate)`` returns the result, with the kept table "losses".
    """

    label: str
    method: Method
    setup: str
    compute: Callable[[Method, int, float], Scored]


def encoder_settings(steps: int = 300, *observers: Observer) -> dict[str, Any]:
    """Return the training settings of a probe's arms on minilm, which are scored after the last step only."""
    from lorascope import observe

    # The validation split of sentiment has 1,968 rows; a mixture of tasks has more, and is scored on as many.
    observed = [observe.norms(every=10), *observers]
    return {"steps": steps, "batch_size": 16, "eval_every": 0, "eval_size": 1968, "observe": observed}


def decoder_settings() -> dict[str, Any]:
    """Return the training settings of a probe's arms on the whole of SmolLM2."""
    from lorascope import observe

    # A step costs as much as twelve of full fine-tuning on minilm.
    settings = {"steps": 40, "batch_size": 8, "eval_every": 0, "eval_size": 200}
    return settings | {"observe": [observe.norms(every=5)]}


def factor_settings(steps: int = 300) -> dict[str, Any]:
    """Return the settings of a probe's arms whose factors are read at the start and at the end."""
    from lorascope import observe

    return encoder_settings(steps, observe.factors(every=steps))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Probe, the study of one paper: and the runs that its registered claims need.

    A module of ``papers`` defines one or several.

    Parameters
    ----------
    name, title, source, question : str
        Short name; heading, reference and question in the report.
    arms : callable
        ``arms()`` returns the registered arms, whose runs are the evidence for the claims. Default none.
    keep : mapping
        Name of a kept table and label of a registered arm, which may be one of another probe -> function of the
        finished run, and of the other runs that the table is computed from. Default none.
    """

    name: str
    title: str
    source: str
    question: str
    arms: Callable[[], Sequence[Arm | OwnArm]] = lambda: ()
    keep: Mapping[tuple[str, str], Callable[..., pd.DataFrame]] = field(default_factory=dict)
