"""Kept ranks and figures of methods that allocate ranks."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.runs.run import Run


def keep_ranks(run: Run) -> pd.DataFrame:
    """Return the kept table ``ranks``; see ``evidence.statistics.ranks``."""
    ranks = run.ranks()
    found = run.modules[run.modules["module"].isin(ranks)]
    return found[["module", "stack", "layer", "role"]].assign(value=found["module"].map(ranks).astype("int16"))


def allocation_figures(runs: Mapping[str, Run], label: str) -> list[ReportFigure]:
    """Draw the allocation of the run ``label``, its history and the scores that decided it."""
    run = {label: runs[label]}
    return [draw("rank_allocation", run, chance=True), draw("rank_replay", run), draw("importance", run)]
