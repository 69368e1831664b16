"""Evidence about a training in progress, which ``alarms`` collects from the model and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorascope.diagnosis.case import Case, ModuleEvidence, TrainedModule


@dataclass
class TrainingEvidence(ModuleEvidence):
    """Case of a training in progress: evidence about its modules, losses and learning rate.

    Parameters
    ----------
    modules : list of TrainedModule
        Modules that train or have an adapter, as they are now.
    losses : mapping step -> float
        Losses at the recorded steps.
    steps : int
        Number of finished steps.
    moving_steps : int
        Number of steps at a nonzero learning rate.
    learning_rate : float or None
        Learning rate of the step.
    masks_components, expects_adapters : bool
        See ``Case``.
    tied : sequence of pairs of str
        See ``Case``.
    unoptimized : sequence of str
        Modules whose trainable adapter parameters the optimizer does not contain.
    has_gradient : bool
        Whether any trained parameter has a gradient other than zero.
    frozen : mapping module -> names
        Parameters of each adapter without ``requires_grad``.
    nonfinite : str
        What was not finite first, see ``describe_nonfinite``; "" while the weights are finite.
    distance, distance_limit : float
        Last recorded distance from the base on the rows to keep, and its limit; NaN and infinity without a limit.
    """

    modules: list[TrainedModule]
    losses: Mapping[int, float]
    steps: int
    moving_steps: int
    learning_rate: float | None
    masks_components: bool
    expects_adapters: bool
    tied: Sequence[tuple[str, str]]
    unoptimized: Sequence[str]
    has_gradient: bool
    frozen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    nonfinite: str = ""
    distance: float = math.nan
    distance_limit: float = math.inf
    error = ""  # of a training that has stopped
    fewest_losses = 10  # for an estimate of their noise: they are losses of single batches, compared at each check

    def has(self, need: str) -> bool:
        """Return whether there is evidence of this kind; see ``Kind.needs``."""
        return True


Evidence = Case | TrainingEvidence
"""Evidence that rules read: a folder, or a training in progress."""
