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


_TRUTH = "loss increase on removal"


def _component_scores(runs: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Return the kept scores of the components of each run, without those of whole modules."""
    found = pd.concat(run.tables[agreement.SCORES].assign(run=run.id) for run in runs[LOW])
    return found[found["component"] >= 0]


def _correlate_with_truth(runs: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    """Correlate every score with the loss increase on both halves of the text together, as the claims do.

    The correlation between the halves is how well the loss increase can be measured at all.
    """
    scores = _component_scores(runs)
    halves = scores["score"].isin(agreement.HALVES)
    component = ["run", "module", "component"]
    truth = scores[halves].groupby(component, sort=False, observed=True)["value"].mean().reset_index()
    found = correlate(pd.concat([scores[~halves], truth.assign(score=_TRUTH)]))
    between = correlate(scores[halves])
    between = between[between["first"] < between["second"]]
    return pd.concat([found, between.assign(first="one half with the other", second=_TRUTH)])


_SHARED: dict[str, Any] = {"arms": own_labels(LOW), "seeds": None, "scores_only": True, "table": agreement.SCORES}

FIGURES = [
    GalleryFigure(
        name="against-truth",
        alt="Rank correlation of every score with the loss increase on removal of a component",
        draw=lambda runs: plots.against_truth(_correlate_with_truth(runs), _TRUTH, "components"),
        **_SHARED,
    ),
    GalleryFigure(
        name="agreement",
        alt="Rank correlation of every pair of scores",
        draw=lambda runs: plots.agreement(correlate(_component_scores(runs)), "components"),
        **_SHARED,
    ),
]
