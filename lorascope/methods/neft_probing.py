"""Probing, NeFT's first way to choose neurons: whose weights are most like what linear probes read from the states?

    h_a(x) = mean over the tokens of text x of the output of block a, with W_0
    c_a    = coefficients of a ridge classifier of the labels y(x) from h_a(x), one row a class
    score of neuron n = max over blocks a and classes of |cos(w_n, c_a)|

This is a phase of its own: the texts are those of its batches, and nothing trains but the task's head.

Source: NeFT (arXiv 2403.11621), section 3 (a preliminary experiment, for XNLI); the ridge classifier, its strengths and
the division of each probe by its norm from the authors' code.

Departs:

- The probes are fitted on the rows of the phase's batches, all of them from the train split; the authors hold out 1,000
  rows to score each probe.
- The authors score by the coefficients of one class; here the score is the maximum over the classes.
- They take the top k of each projection; here the choice is over all projections together, as in the other modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from sklearn.linear_model import RidgeClassifierCV
from torch import nn

from lorascope.adapters.hidden_states import token_means
from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.analysis import neurons, selected_neurons
from lorascope.methods.base import Method, Step, task_head
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.records import Quantity, Record, register

PROBE_COSINE = "probe_cosine"
register(
    PROBE_COSINE,
    Quantity(
        "|cos| with probes",
        index="neuron",
        definition="largest |cosine| between a neuron's weights and the coefficients of a probe",
        source="NeFT, section 3",
    ),
)
_STRENGTHS = np.logspace(0.8, 4.1, 12)


@dataclass(kw_only=True)
class Probing(Method):
    """Keep the hidden states of every batch; after the last one fit the probes and score the neurons.

    Parameters
    ----------
    targets : tuple of str
        Roles that neurons are scored of.
    """

    targets: tuple[str, ...] = neurons.DEFAULT

    def attach(self, model: nn.Module) -> None:
        """Freeze all but the task's head."""
        head = task_head(model).values()
        if not head:
            raise ValueError("select_by 'probed' needs a class for every row: give a classifier and a task with labels")
        self._parts = neurons.parts(module_table.describe(model), self.targets)
        model.requires_grad_(False)
        for parameter in head:
            parameter.requires_grad_(True)
        self.labels_: list[Shaped[np.ndarray, "rows"]] = []
        self.states_: dict[str, list[Float[np.ndarray, "rows layers d"]]] = {}
        self.found_: list[tuple[str, int, Float[np.ndarray, "neurons"]]] = []

    def before_step(self, step: Step) -> None:
        """Keep what the batch shows."""
        self.labels_.append(to_array(step.batch["labels"]))
        for stack, states in token_means(step.model, step.batch).items():
            self.states_.setdefault(stack, []).append(states)

    def after_step(self, step: Step) -> None:
        """After the last batch fit the probes and score the neurons."""
        if not step.last:
            return
        labels = np.concatenate(self.labels_)
        probes = {stack: directions(np.concatenate(kept), labels) for stack, kept in self.states_.items()}
        for part in self._parts:
            weight = to_array(host_weight(step.model.get_submodule(part.module)).float())[part.where]
            alike = likeness(weight if part.axis == 1 else weight.T, probes[part.stack if part.stack in probes else ""])
            self.found_.append((part.module, part.first, alike))
        self.labels_, self.states_ = [], {}

    def settled(self, step: Step) -> bool:
        """Nothing trains that could be best earlier."""
        return step.last

    def records(self, step: Step) -> Iterable[Record]:
        """At the end the score of every neuron."""
        for module, first, alike in self.found_:
            yield Record(PROBE_COSINE, alike, module, np.arange(first, first + len(alike)))


def directions(
    states: Float[np.ndarray, "rows layers d"], labels: Shaped[np.ndarray, "rows"]
) -> Float[np.ndarray, "probes d"]:
    """Coefficients of a ridge classifier of every layer, one row a layer and class (one a layer where two classes are).

    Raises
    ------
    ValueError
        All texts are of one class.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"all {len(labels)} probed texts are of one class: give more of them, by tune_steps or batch_size"
        )
    probes = [RidgeClassifierCV(_STRENGTHS).fit(layer, labels) for layer in states.transpose(1, 0, 2)]
    return np.vstack([probe.coef_ for probe in probes])


def likeness(
    vectors: Float[np.ndarray, "neurons d"], probes: Float[np.ndarray, "probes d"]
) -> Float[np.ndarray, "neurons"]:
    """Largest |cosine| between each vector and a probe; NaN for a vector of zeros. A probe of zeros counts as 0."""
    return np.abs(_unit_rows(vectors, np.nan) @ _unit_rows(probes, 0.0).T).max(axis=1)


def _unit_rows(rows: Float[np.ndarray, "n d"], zero: float) -> Float[np.ndarray, "n d"]:
    """Rows divided by their norms; rows of zeros become ``zero``."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.full(rows.shape, zero), where=norms > 0)


def probe_scores(run: Run, places: Sequence[neurons.Part]) -> pd.DataFrame:
    """Scores that a run of probing gave the neurons in these places, for ``neurons.select`` by ``probe_cosine``.

    Raises
    ------
    ValueError
        It probed none of one of them, or its probes were not divided by their norms.
    """
    scores = selected_neurons.scores(run, PROBE_COSINE).rename(columns={"value": PROBE_COSINE})
    if scores.empty:
        mend = f"delete {run.path} and probe again"
        raise ValueError(f"reference must be a run with {PROBE_COSINE}, got {run.id} of an earlier version: {mend}")
    found = neurons.scores_at(scores, places)
    known = set(zip(found["module"], found["role"], strict=True))
    if absent := [part for part in places if (part.module, part.role) not in known]:
        one = absent[0]
        raise ValueError(f"run {run.id} ({run.label}) did not probe {one.role} ({one.module}): leave it out of targets")
    return found
