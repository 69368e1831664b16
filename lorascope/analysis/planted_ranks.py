"""How well found ranks meet planted ones."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lorascope.analysis.score_agreement import spearman
from lorascope.runs.run import Run


def recovered_ranks(run: Run) -> pd.DataFrame:
    """Planted and found rank of every module with a planted one.

    Returns
    -------
    DataFrame
        ``run, module, planted, found``; a module that carries no adapter at the end has found rank 0.
    """
    truth = run.table[run.table["quantity"] == "planted_rank"]
    modules = truth["module"].astype("str")
    ranks = run.ranks()
    found = [ranks.get(module, 0) for module in modules]
    return pd.DataFrame({"run": run.id, "module": modules, "planted": truth["value"], "found": found})


def rank_correlation(run: Run) -> float:
    """Spearman's correlation of planted and found ranks; 0 where all found ranks are the same, which tells nothing."""
    rho = float(spearman(recovered_ranks(run)[["planted", "found"]].to_numpy(np.float64))[0, 1])
    return 0.0 if np.isnan(rho) else rho


def absolute_error(run: Run) -> float:
    """Mean over the modules of |found - planted|."""
    table = recovered_ranks(run)
    return float((table["found"] - table["planted"]).abs().mean())
