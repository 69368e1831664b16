"""A run in one table, a row a module, and as the configuration of the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorascope.names import parse
from lorascope.update import LowRank, effective_rank, spectra, stable_rank

SUMMARY = ("update_norm", "relative_update", "learned_norm", "weight_norm", "stable_rank", "effective_rank")


def summarise(run: Any, chosen: Mapping[str, Any], state: str, all: bool) -> pd.DataFrame:
    """See ``Run.summary``.

    Parameters
    ----------
    run : Run
    chosen : mapping
        Step and ranks of the state.
    state : {"last", "best"}
    all : bool
        Also the modules that did not train.
    """
    table = run.table[run.table["step"] == chosen["step"]]
    wide = table[table["quantity"].isin(SUMMARY) & table["index"].isna()].pivot(
        index="module", columns="quantity", values="value"
    )
    modules = run.modules
    modules = modules[(modules["role"] != "block") & (modules["role"] != "norm")].set_index("module")
    frame = modules[["stack", "layer", "role"]].copy()
    for name in chosen["ranks"].keys() - set(frame.index):  # the second name of a tied weight, adapted by itself
        frame.loc[name] = parse(name)
    frame["rank"] = pd.Series(chosen["ranks"], dtype="Int64").reindex(frame.index)
    frame = frame.join(wide.astype("float64").reindex(index=frame.index, columns=list(SUMMARY)))
    updates = run.updates(state=state)
    # What an observer recorded stays: it also knows of a weight that trains below its adapter.
    unseen = {name: updates[name] for name in frame.index[frame["stable_rank"].isna()] if name in updates}
    for name, sigma in zip(unseen, spectra(list(unseen.values())), strict=True):
        measured = [float(np.linalg.norm(sigma)), stable_rank(sigma), effective_rank(sigma)]
        frame.loc[name, ["update_norm", "stable_rank", "effective_rank"]] = measured
    frame["exact"] = [name not in updates or updates[name].exact for name in frame.index]
    if not all:
        frame = frame[frame["update_norm"].notna()]
    return frame.reset_index()


def peft_keywords(run: Any, ranks: Mapping[str, int], updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """See ``Run.lora_config``."""
    kept = {name: rank for name, rank in ranks.items() if rank > 0 and name in updates}
    if not kept:
        raise ValueError(f"run {run.id} has no factored update of a rank above 0: there is nothing to configure")
    alphas = {name: updates[name].scale * rank for name, rank in kept.items()}
    common_rank, common_alpha = _mode(kept.values()), _mode(alphas.values())
    return {
        "r": common_rank,
        "lora_alpha": common_alpha,
        "target_modules": list(kept),
        "rank_pattern": {name: rank for name, rank in kept.items() if rank != common_rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != common_alpha},
    }


def _mode(values: Any) -> Any:
    ordered = list(values)
    return max(dict.fromkeys(ordered), key=ordered.count)
