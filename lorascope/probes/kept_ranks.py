"""Kept ranks of the runs of rank allocators."""

from __future__ import annotations

import pandas as pd

from lorascope.runs.run import Run


def keep_ranks(run: Run) -> pd.DataFrame:
    """Return the kept table ``ranks``; see ``evidence.statistics.ranks``."""
    ranks = run.ranks()
    found = run.modules[run.modules["module"].isin(ranks)]
    return found[["module", "stack", "layer", "role"]].assign(value=found["module"].map(ranks).astype("int16"))
