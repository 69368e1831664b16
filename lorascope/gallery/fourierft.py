"""Figures of FourierFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.analysis import fourier
from lorascope.charts.chart import Chart
from lorascope.evidence.statistics import autolora
from lorascope.evidence.statistics.fourierft import BANDS, DEFAULT, EQUAL, FEW, LARGE, MANY, ORTHOGONAL, RANDOM, ZEROS
from lorascope.gallery.base import GalleryFigure, own_labels
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed
from lorascope.plots.component_ablations import metric_by_band
from lorascope.plots.run_groups import gather

HEADING = "FourierFT"


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="FourierFT", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin(["LoRA", "FourierFT"])]
    return add_printed(plots.accuracy_by_parameters(runs), numbers, "parameters", "FourierFT, table 2, SST-2")


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


_SIZES = own_labels(FEW, DEFAULT, MANY, EQUAL, LARGE)

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
