"""Figures of the cost of a step: memory, measured and computed for larger models, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from lorascope.analysis import memory_estimate, norms, step_time
from lorascope.charts.chart import Chart, Drawable, wrap
from lorascope.charts.marks import Rule, Text
from lorascope.plots.builders import stacked_bars
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Cohort, Runs, require_choices, shown_model

_QUANTITIES = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
}
_ACTIVATIONS = "rest (mostly activations)"
_COLORS = (*memory_estimate.COMPONENTS, _ACTIVATIONS)
_PAPERS = {"7B": (128, 2), "70B": (256, 4)}  # rank of LoRA and active blocks of LISA, as in the LISA paper
_UNITS = {"MiB": 2**20, "GiB": 2**30}
_CARD = 24e9 / 2**30  # memory of a 24 GB GPU in GiB
_MARGIN = 0.12  # position of percentages to the right of the longest bar, over its length: they fit into a column
_COUNTS = "no interval, because seeds differ only in the length of their texts"


@figure(
    topic="optimizers",
    needs=tuple(_QUANTITIES),
    reads="Each bar ends at the peak memory of one step; parameters, gradients and optimizer state are counted, the "
    "rest is everything else at the peak. Panels of larger models are computed from shapes and have no rest.",
    misleads="Peaks hold for one batch size and text length: with longer texts the rest outgrows all that a method can "
    "save. In small models the embedding is up to half of all parameters, and LISA always trains it, so LISA saves "
    "little there.",
)
def memory(runs: Runs, control: Runs | None = None, computed: Sequence[str] = ("7B", "70B")) -> Drawable:
    """Plot the memory cost of a step by part, measured and computed for larger models (LISA, Fig. 3; Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of ``ls.step_memory.measure``, or runs with ``observe.memory()``, which have no peak. One panel per model.
    computed : sequence of str
        Model sizes to add below: "7B" and "70B" (LLaMA-2 with every method), "117M" and "345M" (GPT-2 with every
        optimizer of all weights, with and without a first moment).

    Raises
    ------
    ValueError
        A computed size is unknown.

    Examples
    --------
    ``full`` and ``lora`` are runs with ``observe=[ls.observe.memory()]``.

    >>> ls.plots.memory({"full fine-tuning": full, "LoRA": lora}, computed=("7B",))
    """
    cohort = gather_runs("memory", runs, control)
    for size in computed:
        require_choices(computed=(size, (*_PAPERS, *memory_estimate.GPT2)))
    models, cells = {}, {}
    without_peak: dict[str, None] = {}
    batches, are_averaged = [], False
    for model in dict.fromkeys(run.meta.model for run in cohort.runs):
        models[model] = measured = _runs_of_model(cohort, model)
        cells[model] = rows = _measured_memory(measured)
        with_peak = set(rows["recipe"][rows["part"] == _ACTIVATIONS])
        without_peak |= dict.fromkeys(label for label in measured.labels if label not in with_peak)
        batches.append(f"{' and '.join(_batch_phrase(measured))}, {measured.sample}")
        are_averaged |= len(measured.runs) > len(measured.groups)
    # Sentence -> whether it applies.
    notes = {
        f"Measured after the last step: {'; '.join(batches)}.": True,
        f"Peak memory not measured: {', '.join(without_peak)}.": without_peak,
        "Larger models are computed from shapes, not measured, and have no activations.": computed,
        "LLaMA-2: 2 bytes per weight and per gradient, 4 per optimizer entry.": {*_PAPERS} & {*computed},
        "GPT-2: 4 bytes per number.": {*memory_estimate.GPT2} & {*computed},
        f"Mean over runs; {_COUNTS}.": are_averaged,
    }
    caption = " ".join(sentence for sentence, applies in notes.items() if applies)
    panels = []
    for model, rows in cells.items():
        # Models of different size have separate axes.
        name = shown_model(model)
        label, title = f"memory of {name} (MiB)", f"{name}, measured"
        panels.append(stacked_bars(rows, models[model].labels, label, _COLORS, title=title, caption=caption))
    for size in computed:
        if size in memory_estimate.GPT2:
            model, unit, table = f"GPT-2 {size}", "MiB", memory_estimate.compare_optimizers(memory_estimate.GPT2[size])
        else:
            model, unit, (rank, active) = f"LLaMA-2 {size}", "GiB", _PAPERS[size]
            table = memory_estimate.compare_methods(memory_estimate.LLAMA2[size], rank, active, width=2)
        rows = table.assign(recipe=table["method"], value=table["bytes"] / _UNITS[unit])
        # The LISA paper claims that the 7B model trains on a 24 GB GPU.
        card = [Rule(x=_CARD)] if size == "7B" else []
        label, title = f"memory of {model} ({unit})", f"{model}, computed"
        if card:
            title += " (line: 24 GB)"
        panels.append(
            stacked_bars(rows, list(rows["recipe"].unique()), label, _COLORS, *card, title=title, caption=caption)
        )
    title = "Memory of a training step" + _least_memory(list(cells.values()), cohort.labels[0])
    return cohort.complete(wrap(panels, 1, title))


def _least_memory(models: Sequence[pd.DataFrame], first: str) -> str:
    """Return the method with the lowest peak in all measured models, and its memory relative to that of the first."""
    shares: dict[str, list[float]] = {}
    for rows in models:
        peaks = rows.groupby("recipe")["value"].sum()
        # Bars without a peak lack their rest.
        if first not in peaks or (rows["part"] == _ACTIVATIONS).sum() < len(peaks):
            return ""
        shares.setdefault(str(peaks.idxmin()), []).append(100 * peaks.min() / peaks[first])
    if len(shares) != 1 or first in shares:
        return ""
    ((label, percentages),) = shares.items()
    ends = dict.fromkeys((f"{min(percentages):.0f}", f"{max(percentages):.0f}"))
    return f", measured: least with {label}, {' to '.join(ends)}% of {first}"


def _runs_of_model(cohort: Cohort, model: str) -> Cohort:
    groups = []
    for group in cohort.groups:
        if runs := tuple(run for run in group.runs if run.meta.model == model):
            groups.append(replace(group, runs=runs))
    return Cohort(cohort.name, tuple(groups))


def _measured_memory(cohort: Cohort) -> pd.DataFrame:
    """Return the mean over runs by label and part after the last step, in MiB; "rest" only if all recorded a peak."""
    table = norms.last_recorded(cohort.table[cohort.table["quantity"].isin([*_QUANTITIES, "peak_bytes"])])
    wide = table.pivot(index="run", columns="quantity", values="value").astype("float64")
    by_part = wide[list(_QUANTITIES)].rename(columns=_QUANTITIES)
    # ``observe.memory`` records no peak.
    if "peak_bytes" in wide:
        by_part[_ACTIVATIONS] = wide["peak_bytes"] - by_part.sum(axis="columns")
    long = by_part.reset_index().melt("run", var_name="part", value_name="bytes")
    # If one run lacks a part, the mean of the others would belong to other runs than the other parts.
    means = cohort.label(long).groupby(["recipe", "kind", "part"], sort=False)["bytes"].mean(skipna=False)
    cells = means.dropna().reset_index()
    return cells.assign(value=cells["bytes"] / 2**20, source="measured")


def _batch_phrase(cohort: Cohort) -> list[str]:
    """Return the models with their batch sizes as text."""
    batches = (
        f"{shown_model(run.meta.model)}, batch size {run.meta.settings.get('batch_size')}" for run in cohort.runs
    )
    return list(dict.fromkeys(batches))


@figure(
    topic="optimizers",
    needs=tuple(step_time.COMPONENTS),
    reads="Each bar is the time of one step: forward (the loss), backward (its gradients) and the rest, mostly the "
    "optimizer. A method is faster than the first one where its bar ends to the left of the line, by more than the "
    "spread in the caption.",
    misleads="Times hold for one machine, model, batch size and text length: with large embeddings or short texts the "
    "optimizer's fraction is larger than usual. Adapters slow down the forward pass, which offsets their savings: "
    "compare whole bars.",
)
def step_seconds(runs: Runs, control: Runs | None = None) -> Chart:
    """Plot the time cost of a step by part in milliseconds, one bar per label (LISA, Fig. 4).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of ``ls.step_time.measure``. The first label is the one that percentages refer to.

    Examples
    --------
    ``timed`` are results of ``ls.step_time.measure``, by label.

    >>> ls.plots.step_seconds(timed)
    """
    cohort = gather_runs("step_seconds", runs, control)
    rows = cohort.label(step_time.median_times(cohort.table))
    cells = rows.groupby(["recipe", "part"], sort=False)["value"].mean().mul(1e3).reset_index()
    spread = step_time.relative_spread(cohort.table)
    devices = dict.fromkeys(run.meta.device or "an unnamed device" for run in cohort.runs)
    reference = ""
    if len(cohort.labels) > 1:
        reference = f" Line and percentages: {cohort.labels[0]}."
    caption = cohort.caption(
        f"{'; '.join(_batch_phrase(cohort))}, on {', '.join(devices)}. Medians over the steps after step "
        f"{step_time.WARM}. Rest: mostly the optimizer.{reference}",
        f"Half the interquartile range of the steps: at most {spread:.0%} of their median.",
        interval=_COUNTS,
        pair=_COUNTS,
    )
    colors, label = list(step_time.COMPONENTS.values()), "time per step (ms)"
    bars = stacked_bars(cells, cohort.labels, label, colors, title="Time per step", caption=caption)
    if len(cohort.labels) == 1:
        return cohort.complete(bars)
    # The end of a bar is compared with that of the first one.
    totals = cells.groupby("recipe", sort=False)["value"].sum().reset_index()
    first, longest = totals["value"].iloc[0], totals["value"].max()
    totals["words"] = (100 * totals["value"] / first).map("{:.0f}%".format)
    totals["margin"] = (1 + _MARGIN) * longest
    marks = [*bars.marks, Rule(x=first), Text("margin", "recipe", "words", data=totals)]
    shares = totals.set_index("recipe")["value"].drop(cohort.labels[0]) / first
    ends = {str(label): f"{label} {shares[label]:.0%}" for label in (shares.idxmin(), shares.idxmax())}
    title = f"Time per step: {', '.join(ends.values())} of {cohort.labels[0]}"
    x = replace(bars.x, limits=(0, (1 + 2 * _MARGIN) * longest))
    return cohort.complete(replace(bars, marks=marks, title=title, x=x))
