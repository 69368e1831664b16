"""Figures of importance scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.analysis.score_agreement import correlate
from lorascope.evidence.statistics import agreement
from lorascope.evidence.statistics.lora import LOW
from lorascope.gallery.base import GalleryFigure, own_labels

HEADING = "Importance scores"


def _correlate_components(runs: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Correlate the kept scores of components within each run."""
    found = pd.concat(run.tables[agreement.SCORES].assign(run=run.id) for run in runs[LOW])
    return correlate(found[found["component"] >= 0])


_SHARED: dict[str, Any] = {"arms": own_labels(LOW), "seeds": None, "scores_only": True, "table": agreement.SCORES}

FIGURES = [
    GalleryFigure(
        name="against-truth",
        alt="Rank correlation of every score with the loss increase on removal of a component",
        draw=lambda runs: plots.against_truth(_correlate_components(runs), agreement.HALVES[0], "components"),
        **_SHARED,
    ),
    GalleryFigure(
        name="agreement",
        alt="Rank correlation of every pair of scores",
        draw=lambda runs: plots.agreement(_correlate_components(runs), "components"),
        **_SHARED,
    ),
]
