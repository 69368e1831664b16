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
from lorascope.charts.marks import Heat
from lorascope.evidence.statistics import lora as statistics
from lorascope.gallery.base import GalleryFigure, accuracy_bars, own_labels, training_loss
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed, heat_by_role
from lorascope.schema import module_table

HEADING = "LoRA"


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin([statistics.FULL, "LoRA"])]
    return add_printed(plots.accuracy_by_parameters(runs), numbers, "parameters", "LoRA, table 2, SST-2")


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
        alt="Accuracy of full fine-tuning and LoRA on all examples and on 100",
        arms={
            "full": statistics.FULL,
            "LoRA": statistics.LOW,
            "full, 100 examples": statistics.FEW_FULL,
            "LoRA, 100 examples": statistics.FEW_LOW,
        },
        draw=lambda runs: accuracy_bars(runs, "Accuracy by number of training examples", start=0.5),
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
        alt="Accuracy by trained parameters: full fine-tuning, LoRA of rank 8 and 64, and printed numbers",
        arms=_BOTH | _RANKS,
        draw=_draw_sizes,
        seeds=None,
        scores_only=True,
    ),
]
