"""Dial of an update: what each of its parts buys and costs, measured by removing and scaling it.

The weight of a module is ``W(s) = W0 + dW + sum_p (s_p - 1) D_p`` with parts D_p. At s = 1 the model computes bit by
bit what the run's own adapter does, and at s = 0 of all parts what the base does. Effects, verdicts and intervals are
in ``lorascope.analysis.dial``. Path shares divide the effect of the whole update among its parts:

.. math::

    \\operatorname{share}_p = \\int_0^1 -\\frac{\\partial L}{\\partial s_p} \\, ds

with all parts at scale s, by Gauss-Legendre quadrature. They add up to the learn of the whole, which slopes at s = 1 do
not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lorascope.adapters.activation_patching import JointMove, Move
from lorascope.adapters.delta import attach
from lorascope.adapters.hidden_states import evaluation_mode
from lorascope.analysis.dial import (
    KEEP,
    PROBE,
    SCALED,
    TASK,
    WHOLE,
    Dial,
    MeasuredRows,
    RowValues,
    dial_of_rows,
    judge_rows,
)
from lorascope.analysis.domain_probe import fit_probe
from lorascope.array_types import Float
from lorascope.inputs import models, tasks
from lorascope.inputs.tasks import Task
from lorascope.inputs.text_rows import encode_rows, load_keep, require_disjoint
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.instrument_costs import NODES, announce, dial_passes, time_passes
from lorascope.insight.measured_results import recall
from lorascope.insight.receipt_origin import origin_of
from lorascope.insight.update_parts import (
    KINDS,
    PartsOfUpdate,
    ScaledUpdates,
    UpdatePart,
    add_random_controls,
    component_parts,
    group_parts,
    intruder_parts,
    slopes_of,
)
from lorascope.observe.measured_rows import (
    Divergence,
    Drift,
    JointMeasure,
    ProbeDivergence,
    RowMeasure,
    TaskLoss,
    state_rows,
)
from lorascope.runs.receipt import Receipt
from lorascope.runs.result import Result
from lorascope.training.settings import Settings

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
LARGEST_SCALE = 2.0
PROBE_ROWS = 192


def dial(
    run: Result,
    model: str | Path,
    task: str | Path | Task,
    keep: str | Path | Task | None = None,
    *,
    by: str = "module",
    rows: int = 192,
    keep_rows: int = 192,
    scales: Sequence[float] = SCALES,
    exact: int = 20,
    margin: float | None = None,
    state: str = "last",
    progress: bool = True,
) -> Dial:
    """Measure what each part of an update buys on the task and costs elsewhere, by removing it and scaling it.

    Parameters
    ----------
    run : Run or Adapter
        Run of an adapter method, or an adapter.
    model : str or path
        Its base model; see ``ls.models.load``.
    task : str, path or Task
        Task on whose validation rows learning is measured; see ``ls.tasks.load``.
    keep : str, path or Task, optional
        Text without labels on which the model should stay as it was, by default the bundled sentences of domains other
        than the task's. A language model is compared with its base by KL divergence, an encoder with a new head by the
        drift of its mean hidden state.
    by : {"module", "component", "layer", "role", "intruder", "whole"}
        Parts of the update: modules, singular components with random controls, layers, roles, intruder dimensions with
        the most similar other directions of their modules, or only the whole.
    rows, keep_rows : int
        Maximum numbers of rows.
    scales : sequence of float
        Scales of the curves; 0 and 1 are always among them. The whole update has a curve, and so have parts whose
        verdict is trade, only forgets or hurts.
    exact : int
        Number of components that are removed: those with the largest path shares on rows of the training split. Other
        components have shares and slopes, but no verdict.
    margin : float, optional
        Increase of the task loss that a best scale may cost in nats, by default the even share of a part.
    state : {"last", "best"}
        Saved parameters.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Dial
        With ``summary()``, ``table``, ``curve(part)`` and ``best(margin)``.

    Raises
    ------
    ValueError
        The run has no adapter or an input-dependent one, the model is not its base, there are fewer than 32 rows, rows
        to keep are among those of the task, or an argument is out of range.
    """
    if by not in KINDS:
        raise ValueError(f"by must be one of {', '.join(KINDS)}, got {by!r}")
    if exact < 1:
        raise ValueError(f"exact must be an integer >= 1, got {exact}")
    for scale in scales:
        if not 0 <= scale <= LARGEST_SCALE:
            raise ValueError(f"scales must be in [0, {LARGEST_SCALE:g}], got {scale:g}")
    scales = sorted({0.0, 1.0, *map(float, scales)})
    adapted = open_adapted(run, model, task, state)
    max_length = run.meta.settings.get("max_length", Settings.max_length)
    texts = _Texts(adapted, load_keep(keep, adapted.task, adapted.base), rows, keep_rows, max_length)
    kept_text = str(getattr(keep, "name", keep) or "")
    call = DialCall(str(model), kept_text, by, tuple(scales), exact, margin, state)
    content = {"call": call, "texts": texts.identity()}
    return recall("dial", run, adapted, content, partial(_turn, run, texts, call, progress), progress)


class DialCall(NamedTuple):
    """Arguments of a dial that change its result, apart from its texts."""

    model: str
    keep: str
    by: str
    scales: tuple[float, ...]
    exact: int
    margin: float | None
    state: str


def _turn(run: Result, texts: _Texts, call: DialCall, progress: bool) -> Dial:
    """Measure the parts of an update."""
    began = time.process_time()
    adapted, by, scales = texts.adapted, call.by, call.scales
    parts, directions = _find_parts(adapted, by)
    with evaluation_mode(adapted.base), tqdm(desc="dial", unit="pass", disable=not progress, leave=False) as bar:
        # What the base returns is measured before its adapter is attached.
        measures = texts.measures("validation")
        selecting = {}
        if by == "component":
            selecting = texts.measures("train")
        if probe := texts.probe():
            measures[PROBE] = probe
        attach(adapted.base, adapted.deltas)
        updates = ScaledUpdates(adapted.base, adapted.deltas, directions)
        removed = parts
        number = min(len(parts), 2 * call.exact) if by == "component" else len(parts)
        seconds = 0.0
        for axis in (TASK, KEEP):
            per_row = time_passes(measures[axis], updates).per_row(dial_passes(by, number))
            seconds += per_row * len(measures[axis].order)
        announce("dial", seconds, progress)
        if selecting:
            largest = set(DialedModel(updates, selecting, bar).largest_shares(parts, call.exact))
            parts, directions = add_random_controls(PartsOfUpdate(parts, directions), largest)
            removed = [part for part in parts if part in largest or part.control]
            updates = ScaledUpdates(adapted.base, adapted.deltas, directions)
        dialed = DialedModel(updates, measures, bar)
        whole = UpdatePart(WHOLE, tuple(adapted.deltas), energy=1.0)
        values = dialed.curve(whole, scales)
        values += dialed.removals(removed)
        axes: dict[str, MeasuredRows] = {}
        for axis, measure in measures.items():
            axes[axis] = measure.rows()
        controls = {part.name for part in removed if part.control}
        verdicts = judge_rows(values, axes, len(parts) - len(controls), controls)
        # Most parts need no other scale, and controls are never shipped.
        scaled = [part for part in removed if verdicts[part.name] in SCALED and not part.control]
        # At scale 1, every part is as trained.
        for part in scaled:
            values += [item._replace(part=part.name) for item in values if item[:2] == (WHOLE, 1.0)]
        values += dialed.curves(scaled, [scale for scale in scales if scale not in (0.0, 1.0)])
        shares = slopes = {TASK: np.zeros(0), KEEP: np.zeros(0)}
        if parts:  # gradients take as long as three measurements of all rows
            shares, slopes = dialed.path_shares(parts), dialed.slopes(parts, 1.0)
    receipt = Receipt(
        run=run.id,
        base=call.model,
        rows={TASK: measures[TASK].receipt, KEEP: measures[KEEP].receipt},
        call={"by": by, "scales": [*scales], "exact": call.exact, "margin": call.margin, "state": call.state},
        **origin_of(
            "dial",
            run,
            call.model,
            adapted.task,
            texts.keep if call.keep else None,
            by=by,
            rows=texts.rows,
            keep_rows=texts.keep_rows,
            scales=scales,
            exact=call.exact,
            margin=call.margin,
            state=call.state,
        ),
        seconds=time.process_time() - began,
    )
    described = pd.DataFrame([part.to_row() for part in (whole, *parts)])
    # Intruder dimensions are only some of the update, so their shares do not add up to that of the whole.
    divided = 1.0 if parts and by != "intruder" else np.nan
    is_part = ~described["control"].to_numpy()[1:]
    for axis, name in ((TASK, "learn"), (KEEP, "forget")):
        described[f"{name}_share"] = [divided * shares[axis][is_part].sum(), *shares[axis]]
        described[f"{name}_slope"] = [divided * slopes[axis][is_part].sum(), *slopes[axis]]
    return dial_of_rows(run.label, values, axes, described, call.margin, receipt)


@dataclass(frozen=True, eq=False)
class _Texts:
    """Rows of the task and rows to keep, of the same splits."""

    adapted: AdaptedBase
    keep: Task
    rows: int
    keep_rows: int
    max_length: int

    def identity(self) -> list[Any]:
        """Return what the rows depend on, apart from the model."""
        keep = self.keep.name, self.keep.kind, self.keep.hash
        return [self.adapted.task.hash, keep, self.rows, self.keep_rows, self.max_length]

    def measures(self, split: str) -> dict[str, RowMeasure]:
        """Return what is measured on each axis; the adapter is detached."""
        base = self.adapted.base
        task_rows = encode_rows(base, self.adapted.task, split, self.rows, self.max_length)
        keep_rows = encode_rows(base, self.keep, split, self.keep_rows, self.max_length)
        require_disjoint(task_rows.table, keep_rows.table)
        distance = Drift if self._has_new_head() else Divergence
        return {TASK: TaskLoss(base, *task_rows), KEEP: distance(base, *keep_rows)}

    def _has_new_head(self) -> bool:
        """Return whether the head was trained from random weights, so that the base predicts nothing with it."""
        return bool(models.missing(self.adapted.base))

    def probe(self) -> RowMeasure | None:
        """Return the divergence of a probe of the text's domain on the rows to keep, if it is better than a guess."""
        if not self._has_new_head() or "text" not in self.keep.table:
            return None
        base = self.adapted.base
        domains = load_keep(tasks.load("sentiment"), self.adapted.task, base)
        names = tasks.load("sentiment").table["group"]
        states, classes = [], []
        for split in ("train", "validation"):
            rows = encode_rows(base, domains, split, PROBE_ROWS, self.max_length)
            states.append(state_rows(base, rows.encoded))
            labels = names[domains.table["split"] == split].head(PROBE_ROWS)
            classes.append(labels.astype("category").cat.codes.to_numpy(np.int64))
        fitted = fit_probe(states[0], classes[0], states[1], classes[1])
        # The divergence of a guess would be noise.
        if fitted.accuracy <= fitted.chance:
            return None
        keep_rows = encode_rows(base, self.keep, "validation", self.keep_rows, self.max_length)
        return ProbeDivergence(base, *keep_rows, fitted)


def _find_parts(adapted: AdaptedBase, by: str) -> PartsOfUpdate:
    if by == "component":
        return component_parts(adapted.base, adapted.updates)
    if by == "intruder":
        return intruder_parts(adapted.base, adapted.updates)
    if by == WHOLE:
        return PartsOfUpdate([], {})
    return group_parts(adapted.base, adapted.updates, by)


def _to_row_values(
    part: str, scale: float, axes: Sequence[str], values: Float[np.ndarray, "row *measures"]
) -> list[RowValues]:
    columns = values.reshape(len(values), -1).T
    return [RowValues(part, scale, axis, column) for axis, column in zip(axes, columns, strict=True)]


def _is_replayed(part: UpdatePart) -> bool:
    """Return whether anything can be replayed for a part: a module, or the modules of one layer.

    A role has a module in the first block, and almost nothing precedes it.
    """
    return len(part.modules) == 1 or part.layer is not None


def _is_finite(measured: Sequence[RowValues]) -> bool:
    return all(np.isfinite(item.values).all() for item in measured)


@dataclass(frozen=True, eq=False)
class DialedModel:
    """Adapted model with rows on which its parts are measured."""

    updates: ScaledUpdates
    measures: Mapping[str, RowMeasure]
    bar: tqdm

    @cached_property
    def passes(self) -> list[tuple[list[str], RowMeasure]]:
        """Axes that are measured in the same pass: a probe reads the states whose drift is measured."""
        passes: list[tuple[list[str], RowMeasure]] = []
        for axis, measure in self.measures.items():
            if axis == KEEP and PROBE in self.measures:
                passes.append(([KEEP, PROBE], JointMeasure([measure, self.measures[PROBE]])))
            elif axis != PROBE:
                passes.append(([axis], measure))
        return passes

    def curve(self, part: UpdatePart, scales: Sequence[float]) -> list[RowValues]:
        """Measure a part at several scales; a curve ends at the first value that is not finite."""
        values: list[RowValues] = []
        for scale in scales:
            measured = self._scaled(part, scale)
            # Beyond scale 1 an update may leave the range of the dtype.
            if not _is_finite(measured):
                break
            values += measured
        return values

    def curves(self, parts: Sequence[UpdatePart], scales: Sequence[float]) -> list[RowValues]:
        """Measure each part at several scales; see ``curve``."""
        values: list[RowValues] = []
        replayed = self._replayed([part for part in parts if _is_replayed(part)], scales)
        for part in parts:
            if not _is_replayed(part):
                values += self.curve(part, scales)
                continue
            for scale in scales:
                measured = replayed[part.name, scale]
                if not _is_finite(measured):
                    break
                values += measured
        return values

    def removals(self, parts: Sequence[UpdatePart]) -> list[RowValues]:
        """Measure the model without each part."""
        values: list[RowValues] = []
        for part in parts:
            if not _is_replayed(part):
                values += self._scaled(part, 0.0)
        replayed = self._replayed([part for part in parts if _is_replayed(part)], [0.0])
        for measured in replayed.values():
            values += measured
        return values

    def _replayed(
        self, parts: Sequence[UpdatePart], scales: Sequence[float]
    ) -> dict[tuple[str, float], list[RowValues]]:
        """Measure parts of single blocks at each scale; what precedes a part is computed once."""
        moves: dict[str, list[Move | JointMove]] = {}
        keys: dict[str, list[tuple[str, float]]] = {}
        values: dict[tuple[str, float], list[RowValues]] = {}
        for part in parts:
            module = part.modules[0]
            for scale in scales:
                moves.setdefault(module, []).append(self.updates.rescaling(part, scale))
                keys.setdefault(module, []).append((part.name, scale))
                values[part.name, scale] = []
        if not moves:
            return values
        for axes, measure in self.passes:
            self.bar.update()
            for module, arrays in measure.moved_values(moves).items():
                for key, array in zip(keys[module], arrays, strict=True):
                    values[key] += _to_row_values(*key, axes, array)
        return values

    def _scaled(self, part: UpdatePart, scale: float) -> list[RowValues]:
        values = []
        with self.updates.scaled(part, scale):
            for axes, measure in self.passes:
                self.bar.update()
                values += _to_row_values(part.name, scale, axes, measure.values())
        return values

    def path_shares(self, parts: Sequence[UpdatePart]) -> dict[str, Float[np.ndarray, "part"]]:
        """Divide learn and forget of the whole update among the parts, which are all at one scale along the path."""
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        shares = {TASK: np.zeros(len(parts)), KEEP: np.zeros(len(parts))}
        for node, weight in zip(nodes, weights, strict=True):
            # The quadrature is on [-1, 1], the path on [0, 1].
            for axis, slopes in self.slopes(parts, (node + 1) / 2).items():
                shares[axis] += weight / 2 * slopes
        return {TASK: -shares[TASK], KEEP: shares[KEEP]}

    def slopes(self, parts: Sequence[UpdatePart], scale: float) -> dict[str, Float[np.ndarray, "part"]]:
        """Return the slope of task loss and distance from the base by part, with all parts at one scale."""
        slopes = {}
        with self.updates.gated(scale) as gates:
            for axis in (TASK, KEEP):
                self.bar.update()
                gradients = self.measures[axis].slopes(list(gates.values()))
                slopes[axis] = slopes_of(parts, dict(zip(gates, gradients, strict=True)))
        return slopes

    def largest_shares(self, parts: Sequence[UpdatePart], number: int) -> list[UpdatePart]:
        """Return the parts with the largest path shares, relative to all of them, on either axis; in their order."""
        largest = np.zeros(len(parts))
        for shares in self.path_shares(parts).values():
            largest = np.maximum(largest, np.abs(shares) / (np.abs(shares).sum() or 1.0))
        order = np.argsort(-largest, kind="stable")
        return [parts[index] for index in sorted(order[:number].tolist())]
