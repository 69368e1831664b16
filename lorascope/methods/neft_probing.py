"""Linear probing, NeFT's first selection rule: neurons whose weights are most similar to linear probes.

::

    h_a(x) = mean over the tokens of text x of the output of block a, with W_0
    c_a    = coefficients of a ridge classifier of the labels y(x) from h_a(x), one row per class
    score of neuron n = max over blocks a and classes of |cos(w_n, c_a)|

Probing is a separate phase. It uses the texts of its batches, and only the task's head trains.

Source: NeFT (arXiv 2403.11621), section 3 (a preliminary experiment, for XNLI); the ridge classifier, its strengths and
the division of each probe by its norm from the authors' code.

Departs:

- The probes are fitted on all rows of the phase's batches, from the train split. The authors hold out 1,000 rows to
  score each probe.
- The score is the maximum over the classes; the authors use the coefficients of one class.
- Neurons are selected over all projections, as in the other modes; the authors select the top k of each projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from lorascope.adapters.hidden_states import token_means
from lorascope.adapters.host_weights import host_weight, to_array
from lorascope.analysis import neurons, selected_neurons
from lorascope.array_types import Float, Shaped
from lorascope.methods.method import Method, Step, task_head
from lorascope.runs.run import Run
from lorascope.schema import module_table
from lorascope.schema.records import Quantity, Record, register

PROBE_COSINE = "probe_cosine"
_LARGEST = "largest |cosine| between a neuron's weights and the coefficients of a probe"
_QUANTITY = Quantity("|cos| with probes", "", "neuron", "mean", _LARGEST, "NeFT, section 3")
register('train NeFT(select_by="probed")', **{PROBE_COSINE: _QUANTITY})
_NO_CLASSES = "cannot use select_by='probed' without classes: use a classifier and a task with classes"
_STRENGTHS = np.logspace(0.8, 4.1, 12)  # of the ridge penalty, as in the authors' code


@dataclass(kw_only=True)
class Probing(Method):
    """Phase of NeFT that collects hidden states, fits linear probes and scores the neurons after the last batch.

    Parameters
    ----------
    targets : tuple of str
        Roles whose neurons are scored.
    """

    targets: tuple[str, ...] = neurons.DEFAULT

    def attach(self, model: nn.Module) -> None:
        """Freeze all parameters except the task's head."""
        head = task_head(model).values()
        if not head:
            raise ValueError(_NO_CLASSES)
        self._groups = neurons.list_groups(module_table.describe(model), self.targets)
        model.requires_grad_(False)
        for parameter in head:
            parameter.requires_grad_(True)
        self.labels_: list[Shaped[np.ndarray, "rows"]] = []
        self.states_: dict[str, list[Float[np.ndarray, "rows layers d"]]] = {}
        self.found_: list[tuple[str, int, Float[np.ndarray, "neurons"]]] = []

    def before_step(self, step: Step) -> None:
        """Store the labels and the mean hidden states of the batch."""
        labels = step.batch["labels"]
        if labels.is_floating_point():
            raise ValueError(_NO_CLASSES)
        self.labels_.append(to_array(labels))
        for stack, states in token_means(step.model, step.batch).items():
            self.states_.setdefault(stack, []).append(states)

    def after_step(self, step: Step) -> None:
        """Fit the probes and score the neurons after the last batch."""
        if not step.last:
            return
        labels = np.concatenate(self.labels_)
        probes = {stack: directions(np.concatenate(states), labels) for stack, states in self.states_.items()}
        for group in self._groups:
            weight = to_array(host_weight(step.model.get_submodule(group.module)).float())[group.slices]
            # A neuron is a row of an up projection and a column of a down projection.
            vectors = weight if group.axis == 1 else weight.T
            stack = group.stack if group.stack in probes else ""  # one stack has no name
            scores = largest_cosines(vectors, probes[stack])
            self.found_.append((group.module, group.first, scores))
        self.labels_, self.states_ = [], {}  # large, and no longer part of the method's state

    def settled(self, step: Step) -> bool:
        """Return whether this is the last step; the scores exist only then."""
        return step.last

    def records(self, step: Step) -> Iterable[Record]:
        """Yield the score of every neuron at the end."""
        for module, first, scores in self.found_:
            yield Record(PROBE_COSINE, scores, module, np.arange(first, first + len(scores)))


def directions(
    states: Float[np.ndarray, "rows layers d"], labels: Shaped[np.ndarray, "rows"]
) -> Float[np.ndarray, "probes d"]:
    """Fit linear probes, a ridge classifier per layer; stack a row of coefficients per layer and class, one for two."""
    if len(np.unique(labels)) < 2:
        reason = f"all {len(labels)} texts belong to one class. Increase tune_steps or batch_size"
        raise ValueError(f"cannot fit linear probes: {reason}")
    # Imported here because it takes half a second, and only this mode needs it.
    from sklearn.linear_model import RidgeClassifierCV

    probes = [RidgeClassifierCV(_STRENGTHS).fit(layer, labels) for layer in states.transpose(1, 0, 2)]
    return np.vstack([probe.coef_ for probe in probes])


def largest_cosines(
    vectors: Float[np.ndarray, "neurons d"], probes: Float[np.ndarray, "probes d"]
) -> Float[np.ndarray, "neurons"]:
    """Return each vector's largest absolute cosine with a linear probe: NaN for a zero vector, 0 with a zero probe."""
    cosines = _normalize(vectors, np.nan) @ _normalize(probes, 0.0).T
    return np.abs(cosines).max(axis=1)


def _normalize(rows: Float[np.ndarray, "rows d"], zero: float) -> Float[np.ndarray, "rows d"]:
    """Divide each row by its norm, in float64; a row of zeros becomes ``zero``."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.full(rows.shape, zero), where=norms > 0)


def probe_scores(run: Run, groups: Sequence[neurons.NeuronGroup]) -> pd.DataFrame:
    """Return the scores of NeFT's linear probing for these neurons, the input of ``neurons.select_neurons``."""
    scores = selected_neurons.last_scores(run, PROBE_COSINE).rename(columns={"value": PROBE_COSINE})
    if scores.empty:
        fix = f"delete {run.path} and probe again"
        raise ValueError(f"reference must be a run with {PROBE_COSINE}, got {run.id} of an earlier version: {fix}")
    scores = neurons.scores_of_groups(scores, groups)
    probed = set(zip(scores["module"], scores["role"], strict=True))
    for group in groups:
        if (group.module, group.role) not in probed:
            reason = f"run {run.id} ({run.label}) did not probe it. Remove it from targets"
            raise ValueError(f"cannot score the neurons of {group.role} ({group.module}): {reason}")
    return scores
