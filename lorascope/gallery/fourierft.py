"""Figures of FourierFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis import fourier
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Line, Point
from lorascope.evidence.statistics import autolora
from lorascope.evidence.statistics.fourierft import (
    BANDS,
    COURSE,
    DEFAULT,
    EQUAL,
    FEW,
    LARGE,
    MANY,
    MEDIUM,
    ORTHOGONAL,
    POINTS,
    POINTS_FAST,
    POINTS_RANDOM,
    POINTS_SLOW,
    RANDOM,
    SMALL,
    ZEROS,
)
from lorascope.gallery.base import GalleryFigure, add_printed_sizes, own_labels
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed, ends
from lorascope.plots.component_ablations import metric_by_band
from lorascope.plots.run_groups import INTERVAL, gather

HEADING = "FourierFT"
_FIRST_EPOCH = 10  # of the toy task's axis; no seed fits all points before it


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="FourierFT", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin(["LoRA", "FourierFT"])]
    return add_printed_sizes(plots.accuracy_by_parameters(runs), numbers, "FourierFT, table 2, SST-2")


def _draw_bases(runs: Mapping[str, Sequence[Any]]) -> Chart:
    models = ("RoBERTa-base", "RoBERTa-large")
    numbers = pd.concat(
        printed(paper="FourierFT", table="Table 6", model=model, data="RTE").assign(source=f"printed: {model}")
        for model in models
    )
    numbers = numbers.assign(basis=numbers["method"].str.removesuffix(" basis"))
    return add_printed(plots.basis_ablation(runs), numbers, "basis", "FourierFT, table 6, RTE")


def _draw_bands(runs: Mapping[str, Sequence[Any]]) -> Chart:
    highest = fourier.corner((384, 384))  # of minilm's query and value weights
    return metric_by_band(gather("bias_curve", runs), highest)


def _draw_toy_task(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    """Plot the kept tables ``course``: the fraction of seeds that fit all points by epoch, and the best accuracy."""
    rows = pd.concat(run.tables[COURSE].assign(recipe=label, run=run.id) for label, of in runs.items() for run in of)
    epochs = np.append(_FIRST_EPOCH, np.unique(rows["epochs"]))
    fractions = []
    for label, own in rows.groupby("recipe", sort=False):
        fitted = own.loc[own["best_accuracy"] == 1, "epochs"].to_numpy()
        share = (fitted <= epochs[:, None]).sum(1) / len(own)
        # Every value holds until the next epoch, at which the line rises vertically.
        steps = {"epoch": np.repeat(epochs, 2)[1:], "value": np.repeat(share, 2)[:-1]}
        fractions.append(pd.DataFrame(steps).assign(recipe=label))
    best = band(rows.assign(value=rows["best_accuracy"]), ["recipe"])
    caption = (
        "Eight classes of points, learned by a network whose hidden layer has an adapter of 128 parameters; "
        f"{len(rows) // len(runs)} seeds. The paper does not state its points. Right: mean; bars: {INTERVAL}."
    )
    return set_side_by_side(
        Chart(
            pd.concat(fractions),
            [Line("epoch", "value", "recipe")],
            title="Seeds that fit all points",
            x=Axis(label="epoch", log=True),
            y=Axis(label="fraction of seeds", limits=(0, 1.02)),
            caption=caption,
        ),
        Chart(
            best,
            [Point("recipe", "value", "recipe", **ends(best))],
            title="Best accuracy",
            x=Axis(order=list(runs)),
            y=Axis(label="training accuracy"),
            caption=caption,
        ),
    )


_SIZES = own_labels(FEW, MEDIUM, DEFAULT, MANY, SMALL, EQUAL, LARGE)

FIGURES = [
    GalleryFigure(
        name="quality",
        alt="Accuracy by trained parameters: FourierFT, LoRA, and printed numbers",
        arms=_SIZES,
        draw=_draw_sizes,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="basis-ablation",
        alt="Accuracy by basis, and printed numbers",
        arms={"Fourier": DEFAULT, "random": RANDOM, "orthogonal": ORTHOGONAL},
        draw=_draw_bases,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="bias-curve",
        alt="Accuracy by frequency band",
        arms={"uniform": DEFAULT} | {label.removeprefix(f"{DEFAULT}, band "): label for label in BANDS},
        draw=_draw_bands,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="toy-task",
        alt="Toy task: seeds that fit all points by epoch, and best accuracy, with 128 parameters",
        arms={
            "Fourier": POINTS,
            "random basis": POINTS_RANDOM,
            "LoRA, lr 0.01": POINTS_SLOW,
            "LoRA, lr 0.1": POINTS_FAST,
        },
        draw=_draw_toy_task,
        seeds=None,
        scores_only=True,
        table=COURSE,
    ),
    GalleryFigure(
        name="fourier-spectrum",
        alt="Fourier coefficients in the spectrum, and their size by radius",
        arms={"48 coefficients": FEW, "1536 coefficients": DEFAULT, "1536, from zero": ZEROS},
        draw=plots.fourier_spectrum,
        seeds=1,
        quantities=("update_norm",),
        arrays=(
            "coefficients",
            "entries",
            "shape",
        ),
    ),
    GalleryFigure(
        name="update-image",
        alt="A corner of the update of one module: FourierFT and LoRA with as many parameters",
        arms=own_labels(DEFAULT, EQUAL),
        draw=partial(plots.update_image, added=True),
        seeds=1,
        quantities=("update_norm",),
        arrays=(
            "A",
            "B",
            "coefficients",
            "entries",
            "shape",
        ),
    ),
    GalleryFigure(
        name="atlas",
        alt="Spectra, norms and angles of FourierFT, LoRA and AutoLoRA on the same matrices",
        arms={"FourierFT": DEFAULT, "LoRA": LARGE, "AutoLoRA": autolora.ADAPTED},
        draw=plots.atlas,
    ),
]
