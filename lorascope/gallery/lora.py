"""Figures of LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis import norms
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Bar, Heat
from lorascope.evidence.statistics import alora
from lorascope.evidence.statistics import lora as statistics
from lorascope.gallery.base import (
    GalleryFigure,
    accuracy_bars,
    accuracy_by_rank,
    add_printed_sizes,
    own_labels,
    training_loss,
)
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed, heat_by_role
from lorascope.schema import module_table

HEADING = "LoRA"


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin([statistics.FULL, "LoRA"])]
    return add_printed_sizes(plots.accuracy_by_parameters(runs), numbers, "LoRA, table 2, SST-2")


def _draw_ranks(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 6", data="MNLI-m")
    numbers = numbers.assign(rank=numbers["method"].map({f"all four, rank {rank}": rank for rank in _BY_RANK}))
    numbers = numbers.dropna(subset="rank").assign(source="printed")
    ranks = {label: rank for rank, label in _BY_RANK.items()}
    chart = accuracy_by_rank(runs, ranks, "Accuracy by rank", LORA_RATES)
    return add_printed(chart, numbers, "rank", "LoRA, table 6, MNLI-m, all four attention matrices")


def _draw_low_data(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 16")
    bars = {f"MNLI, {rows} rows": f", {rows}" for rows in ("1,000", "100")} | {"MNLI, 392,000 rows": ""}
    names = {"full fine-tuning": "full", "LoRA": "LoRA"}
    numbers = numbers[numbers["data"].isin(list(bars)) & numbers["method"].isin(list(names))]
    recipe = numbers["method"].map(names) + numbers["data"].map(bars)
    chart = accuracy_bars(runs, "Accuracy by number of training examples", start=0.5)
    chart = replace(chart, marks=[mark for mark in chart.marks if isinstance(mark, Bar)])  # no numbers under the dots
    return add_printed(chart, numbers.assign(recipe=recipe, source="printed"), "recipe", "LoRA, table 16, MNLI")


def _draw_amplification(runs: Mapping[str, Sequence[Any]]) -> Chart:
    """Plot the kept table ``amplification`` by layer and role, averaged over seeds on a logarithmic scale."""
    tables = pd.concat(run.tables[statistics.AMPLIFICATION] for run in runs[statistics.LOW])
    ratios = np.log10(tables["update"] / tables["random"]).groupby(tables["module"]).mean()
    cells = pd.DataFrame([module_table.parse(name) for name in ratios.index], columns=["stack", "layer", "role"])
    cells = cells.assign(value=ratios.to_numpy(), recipe="").astype({"layer": "Int16"})
    cells = cells.assign(place=norms.place(cells))
    (chart,) = heat_by_role(
        cells,
        [""],
        lambda own: Heat("place", "role", "value", "log10 of the ratio", ".2f", scale="diverging"),
        "layer",
        "Norm of W between eight left and right singular vectors of the update, over its expectation for random "
        f"directions; mean of {len(runs[statistics.LOW])} seeds. 0: no amplification.",
    )
    return replace(chart, title="Base weight along the update, relative to random directions")


_BOTH, _RANKS = own_labels(statistics.FULL, statistics.LOW), own_labels(statistics.LOW, statistics.HIGH)
LORA_RATES = "LoRA of rank 1 and 2 has the learning rate of rank 8; the other ranks have their own."
_BY_RANK = {**statistics.LOWER, 4: alora.UNIFORM, 8: statistics.LOW, 64: statistics.HIGH}
_COMPARED = "full fine-tuning and LoRA"

FIGURES = [
    GalleryFigure(
        name="update-norm",
        alt=f"Update norm by layer: {_COMPARED}",
        arms=_BOTH,
        draw=plots.update_norm,
        quantities=("update_norm",),
    ),
    GalleryFigure(
        name="update-norm-heat",
        alt=f"Update norm by block and role: {_COMPARED}",
        arms=_BOTH,
        draw=plots.update_norm_heat,
        quantities=("update_norm",),
    ),
    GalleryFigure(
        name="norm-over-steps",
        alt=f"Update norm by layer over the steps: {_COMPARED}",
        arms=_BOTH,
        draw=plots.norm_over_steps,
        quantities=("update_norm",),
    ),
    GalleryFigure(
        name="training-curves",
        alt=f"Training loss: {_COMPARED} of rank 8 and 64",
        arms=_BOTH | _RANKS,
        draw=training_loss,
        quantities=("loss",),
    ),
    GalleryFigure(
        name="spectrum",
        alt="Singular values of the updates of rank 8 and 64",
        arms=_RANKS,
        draw=plots.spectrum,
        quantities=("update_norm",),
        arrays=("singular_values",),
    ),
    GalleryFigure(
        name="subspace-similarity",
        alt="Subspace similarity of rank 8 and rank 64 with different seeds, and at chance",
        arms=_RANKS,
        # With one seed, the smaller random A equals the first rows of the larger one.
        draw=lambda runs: plots.subspace_similarity(
            {statistics.LOW: runs[statistics.LOW][0], statistics.HIGH: runs[statistics.HIGH][1]}
        ),
        seeds=2,
    ),
    GalleryFigure(
        name="subspace-seeds",
        alt="Subspace similarity of two seeds of rank 64, and at chance",
        arms=own_labels(statistics.HIGH),
        draw=plots.subspace_similarity,
        seeds=2,
    ),
    GalleryFigure(
        name="low-data",
        alt="Accuracy of full fine-tuning and LoRA on all examples, on 1,000 and on 100, and printed numbers",
        arms={
            "full": statistics.FULL,
            "LoRA": statistics.LOW,
            "full, 1,000": statistics.MORE_FULL,
            "LoRA, 1,000": statistics.MORE_LOW,
            "full, 100": statistics.FEW_FULL,
            "LoRA, 100": statistics.FEW_LOW,
        },
        draw=_draw_low_data,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="amplification",
        alt="Norm of the base weight along the directions of the update, relative to random ones",
        arms=own_labels(statistics.LOW),
        draw=_draw_amplification,
        seeds=None,
        scores_only=True,
        table=statistics.AMPLIFICATION,
    ),
    GalleryFigure(
        name="accuracy-lora",
        alt="Accuracy by trained parameters: full fine-tuning, LoRA of rank 1 to 64, and printed numbers",
        arms=own_labels(statistics.FULL, *_BY_RANK.values()),
        draw=_draw_sizes,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="ranks-lora",
        alt="Accuracy of LoRA by rank, and printed numbers",
        arms=own_labels(*_BY_RANK.values()),
        draw=_draw_ranks,
        seeds=None,
        scores_only=True,
    ),
]
