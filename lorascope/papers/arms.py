"""Arms of the study: configurations that are trained with several seeds, and what is kept of their runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from torch import nn

    from lorascope.inputs.tasks import Task
    from lorascope.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One configuration of the study: a method on a model and a task, run for several seeds.

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
"""Kept table: labels of arms, and ``function(*runs)`` of their finished runs with one seed.

The function returns the table without ``arm, seed, run``; it belongs to the run of the last label.
"""


@dataclass(frozen=True)
class Scored:
    """Result of a ``ComputedArm`` with one seed: values of its row in the evidence, and kept tables."""

    row: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComputedArm:
    """Arm that ``train`` does not train, such as an optimizer on a quadratic.

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
