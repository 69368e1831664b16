"""Figures of Adapprox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorascope import plots
from lorascope.charts.chart import Drawable, set_side_by_side
from lorascope.evidence.statistics import adapprox as statistics
from lorascope.gallery.base import GalleryFigure, own_labels, training_loss
from lorascope.plots.run_groups import INTERVAL

HEADING = "Adapprox"


def _draw_rates(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    by_rate: dict[str, list[Any]] = {}
    for label, of in runs.items():
        for run in of:
            by_rate.setdefault(f"{label} at {run.meta.settings['lr']:g}", []).append(run)
    # The default caption lists the seeds of every rate.
    caption = f"Left: tuning runs, which choose the rate. Right: judged runs at the chosen rate. Bars: {INTERVAL}."
    return set_side_by_side(*(replace(chart, caption=caption) for chart in plots.learning_rates(by_rate).charts()))


_ADAM, _OURS = own_labels(statistics.ADAMW), own_labels(statistics.OURS)
_NAMES = (statistics.OURS, statistics.ADAMW, statistics.ADAFACTOR, statistics.CAME)

FIGURES = [
    GalleryFigure(
        name="second-moments",
        alt="Singular values of second moments by layer, as they are and shuffled",
        arms=_ADAM,
        draw=plots.second_moments,
        quantities=("moment_sigma", "moment_sigma_dealt"),
    ),
    GalleryFigure(
        name="moment-error",
        alt="Relative error of a second moment by rank, S-RSI and Adafactor",
        arms=_ADAM,
        draw=plots.moment_error,
        quantities=("moment_error", "moment_error_dealt", "moment_error_rank_one", "moment_error_s_rsi"),
    ),
    GalleryFigure(
        name="factor-rank",
        alt="Adapprox's ranks by layer, role and step, as a fraction of the maximum",
        arms=_OURS,
        draw=plots.factor_rank,
        quantities=("factor_rank", "factor_share"),
    ),
    GalleryFigure(
        name="factor-error",
        alt="Error of one step's factors, and drift from the exact average",
        arms=_OURS,
        draw=plots.factor_error,
        quantities=("factor_error", "factor_drift", "factor_drift_rank_one", "factor_drift_least"),
    ),
    GalleryFigure(
        name="learning-rates",
        alt="Validation loss by learning rate in fine-tuning, and test loss at the chosen one",
        arms=own_labels(*_NAMES),
        draw=_draw_rates,
        seeds=None,
        scores_only=True,
        tuning=True,
    ),
    GalleryFigure(
        name="training-curves-optimizers",
        alt="Training loss of pre-training: Adapprox, AdamW, Adafactor and CAME",
        arms={name: f"{name}, pre-training" for name in _NAMES},
        draw=training_loss,
        quantities=("loss",),
    ),
]
