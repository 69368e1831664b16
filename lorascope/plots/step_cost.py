"""Figures of what a step costs: the memory it holds, beside what larger models would, and the seconds it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from lorascope.analysis import memory_estimate, norms
from lorascope.analysis import step_time as pace
from lorascope.charts.chart import Axis, Bar, Chart, Drawable, Mark, Rule, wrap
from lorascope.plots.registry import figure
from lorascope.plots.run_groups import Cohort, Runs, gather

_PARTS = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer",
}
_REST = "rest up to the peak"
_COLORS = (*memory_estimate.PARTS, _REST)
_PAPERS = {"7B": (128, 2), "70B": (256, 4)}  # rank of LoRA and active blocks of LISA, as in its paper
_UNITS = {"MiB": 2**20, "GiB": 2**30}
_CARD = 24e9 / 2**30
_COUNTS = "no interval, since seeds differ in the length of their texts alone"


@figure(
    needs=tuple(_PARTS),
    reads="A bar ends at the peak of one step. Its parts at the optimizer step are counted over living tensors; the "
    "rest is what the allocator had given out besides at the highest moment, activations above all. Panels of larger "
    "models are computed from shapes and know no rest.",
    misleads="A peak belongs to one batch and length of text: with longer ones the rest outgrows all that a method can "
    "save. On a small model the embedding is half of everything, so LISA, which always trains it, saves little.",
)
def memory(runs: Runs, control: Runs | None = None, computed: Sequence[str] = ("7B", "70B")) -> Drawable:
    """Bytes of a step by part, one bar a label, above those of larger models by arithmetic (LISA, Fig. 3; Adapprox).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Of ``ls.memory.measure``, or any with ``observe.memory()``, which know no peak. One panel a model.
    computed : sequence of str
        Sizes of models below: "7B" and "70B" of LLaMA-2 by every method, "117M" and "345M" of GPT-2 by every optimizer
        of all weights, with a first moment and without.
    """
    cohort = gather("memory", runs, control)
    cohort.require(*_PARTS)
    if unknown := [size for size in computed if size not in (*_PAPERS, *memory_estimate.GPT2)]:
        raise ValueError(
            f"computed={unknown[0]!r} is no LLaMA-2 whose shapes are known: {', '.join(_PAPERS)}, and no GPT-2: "
            f"{', '.join(memory_estimate.GPT2)}"
        )
    models = _group_by_model(cohort)
    cells = {model: _measured_memory(own) for model, own in models.items()}
    caption = _memory_caption(models, cells, computed)
    panels = [
        _cost_bars(cells[model], own.labels, f"{model}, measured", "memory (MiB)", [], caption, cohort)
        for model, own in models.items()
    ]
    for size in computed:
        model, unit, rows = _computed_memory(size)
        card: list[Mark] = [Rule(x=_CARD)] if size == "7B" else []
        label = f"memory of {model} ({unit})"
        panels.append(
            _cost_bars(rows, list(rows["recipe"].unique()), f"{model}, computed", label, card, caption, cohort)
        )
    return wrap(panels, 1)


def _computed_memory(size: str) -> tuple[str, str, pd.DataFrame]:
    """Name of a model, the unit for its size, and what it holds."""
    if size in memory_estimate.GPT2:
        model, unit, table = f"GPT-2 {size}", "MiB", memory_estimate.optimizers(memory_estimate.GPT2[size])
    else:
        model, unit, (rank, active) = f"LLaMA-2 {size}", "GiB", _PAPERS[size]
        table = memory_estimate.table(memory_estimate.LLAMA2[size], rank, active, width=2)
    return model, unit, table.assign(recipe=table["method"], value=table["bytes"] / _UNITS[unit])


def _group_by_model(cohort: Cohort) -> dict[str, Cohort]:
    """The runs of every model, by name."""
    parts = {}
    for model in dict.fromkeys(run.meta["model"] for run in cohort.runs):
        own = (replace(g, runs=tuple(run for run in g.runs if run.meta["model"] == model)) for g in cohort.groups)
        parts[model] = Cohort(cohort.name, tuple(group for group in own if group.runs))
    return parts


def _measured_memory(cohort: Cohort) -> pd.DataFrame:
    """Mean over the runs of every label and part after the last step, in MiB; the rest where all know their peak."""
    table = norms.last(cohort.table[cohort.table["quantity"].isin([*_PARTS, "peak_bytes"])])
    wide = table.pivot(index="run", columns="quantity", values="value").astype("float64")
    parts = wide[list(_PARTS)].rename(columns=_PARTS)
    if "peak_bytes" in wide:
        parts[_REST] = wide["peak_bytes"] - parts.sum(axis="columns")
    long = parts.reset_index().melt("run", var_name="part", value_name="bytes")
    means = (
        cohort.label(long)
        .groupby(["recipe", "kind", "part"], sort=False)["bytes"]
        .agg(lambda values: values.mean(skipna=False))
    )
    cells = means.dropna().reset_index()
    return cells.assign(value=cells["bytes"] / 2**20, source="measured")


def _cost_bars(
    rows: pd.DataFrame, order: list[str], title: str, label: str, marks: list[Mark], caption: str, cohort: Cohort
) -> Chart:
    return Chart(
        rows,
        [Bar("value", "recipe", "part", mode="stack"), *marks],
        title=title,
        x=Axis(label=label, limits=(0, None)),
        y=Axis(order=order),
        caption=caption,
        colors=_COLORS,
        meta=cohort.meta,
    )


def _batch_phrase(cohort: Cohort) -> list[str]:
    """Models and rows of a batch."""
    told = (f"{run.meta['model']}, {run.meta['settings'].get('batch_size')} texts" for run in cohort.runs)
    return list(dict.fromkeys(told))


def _memory_caption(models: Mapping[str, Cohort], cells: Mapping[str, pd.DataFrame], computed: Sequence[str]) -> str:
    """What was measured where, and what was worked out."""
    where = "; ".join(f"{' and '.join(_batch_phrase(own))}, {own.sample}" for own in models.values())
    told = [f"Measured, after the last step: {where}."]
    known = {model: set(rows["recipe"][rows["part"] == _REST]) for model, rows in cells.items()}
    unknown = [label for model, own in models.items() for label in own.labels if label not in known[model]]
    if unknown:
        told.append(f"No peak was measured of {', '.join(dict.fromkeys(unknown))}.")
    if computed:
        told.append("Computed from shapes, not measured, without activations.")
    if not _PAPERS.keys().isdisjoint(computed):
        told.append("LLaMA-2: weights and gradients of 2 bytes, optimizer of 4.")
    if not memory_estimate.GPT2.keys().isdisjoint(computed):
        told.append("GPT-2: 4 bytes a number.")
    if "7B" in computed:
        told.append("Dashed: a card of 24 GB.")
    if any(len(group.runs) > 1 for own in models.values() for group in own.groups):
        told.append(f"Mean over runs; {_COUNTS}.")
    return " ".join(told)


@figure(
    needs=tuple(pace.PARTS),
    reads="A bar is the time of one step: the loss, its gradients, and the rest, which is the optimizer above all. A "
    "method is cheaper where its bar ends further left by more than the spread that the caption states.",
    misleads="On one machine, model, batch and length of text: where the embedding is most of the model or texts are "
    "short, the optimizer counts for more than it would. Adapters add to the forward what they save elsewhere.",
)
def step_seconds(runs: Runs, control: Runs | None = None) -> Chart:
    """Milliseconds of a step by part, one bar a label (LISA, Fig. 4).

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Of ``lorascope.step_time.measure``.
    """
    cohort = gather("step_seconds", runs, control)
    cohort.require(*pace.PARTS)
    rows = cohort.label(pace.medians(cohort.table))
    cells = rows.groupby(["recipe", "part"], sort=False)["value"].mean().mul(1e3).reset_index()
    spread = (
        f"The middle half of the steps lies within ±{pace.spread(cohort.table):.0%} of their median, at the widest."
    )
    return Chart(
        cells,
        [Bar("value", "recipe", "part", mode="stack")],
        title="One step",
        x=Axis(label="time of a step (ms)", limits=(0, None)),
        y=Axis(order=cohort.labels),
        caption=cohort.caption(
            f"Medians over the steps after {pace.WARM}: {'; '.join(_batch_phrase(cohort))}.",
            spread,
            interval=_COUNTS,
        ),
        colors=list(pace.PARTS.values()),
        meta=cohort.meta,
    )
