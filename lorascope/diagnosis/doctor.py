"""What went wrong with a run or an adapter: the tables that the causes look at, and the findings that stand.

An adapter's folder tells of its factors; with its base also of the weights; a run of its history besides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lorascope.diagnosis.causes import CAUSES, Case, Finding
from lorascope.runs.loading import AdapterRun
from lorascope.runs.run import Run
from lorascope.updates.low_rank import LowRank

_COLUMNS = ("rank", "scale", "update_norm", "moved", "weight_norm", "relative_update", "effective_rank", "used")
_NEEDS = {"weights": "norms of the weights", "base": "norms of the weights", "history": "a history"}


def diagnose(run: Run) -> list[Finding]:
    """Name the causes why a run or an adapter is not what was meant.

    Parameters
    ----------
    run : Run
        From ``train`` or ``load``; of an adapter that was loaded with its base more can be said.

    Returns
    -------
    list of Finding
        ``cause, message, evidence, fix`` each; empty where nothing was found.
    """
    return findings(collect_evidence(run))


def findings(case: Case) -> list[Finding]:
    """What the causes find, without what only follows from another finding."""
    found = {cause: list(cause.find(case)) for cause in CAUSES}
    follows = {name for cause, told in found.items() if told for name in cause.suppresses}
    return [finding for told in found.values() for finding in told if finding.cause not in follows]


def skipped_checks(case: Case) -> dict[str, list[str]]:
    """Names of the causes that there is no evidence for, by what is missing."""
    lacking = {need for need in ("weights", "base", "history") if not getattr(case, need)}
    missing: dict[str, list[str]] = {}
    for cause in CAUSES:
        if cause.needs in lacking:
            missing.setdefault(_NEEDS[cause.needs], []).extend(cause.names)
    return missing


def collect_evidence(run: Run) -> Case:
    """All that the causes look at, read once."""
    history = not isinstance(run, AdapterRun)
    modules = _module_evidence(run) if run.meta["states"] else _no_modules()
    losses = pd.Series(dtype="float64")
    if history and "records.parquet" in run.meta["checksums"]:
        rows = run.table[run.table["quantity"] == "loss"].sort_values("step")
        losses = pd.Series(rows["value"].to_numpy(), index=rows["step"].to_numpy(dtype="int64"))
    base = history or (isinstance(run, AdapterRun) and run.base is not None)
    return Case(
        modules, losses, run.meta, history, bool(modules["weight_norm"].notna().any()), base, _tied_modules(run)
    )


def _module_evidence(run: Run) -> pd.DataFrame:
    """``Case.modules``."""
    frame = run.summary(all=True)
    recorded = run.table["module"][run.table["quantity"] == "update_norm"]
    frame = frame[frame["rank"].notna() | frame["module"].isin(recorded)].reset_index(drop=True)
    frame["adapted"] = (frame["rank"] > 0).fillna(False).astype(bool)
    # What an allocator took has not moved, though it may have been recorded before PEFT's masked it.
    frame["moved"] = frame["learned_norm"].fillna(frame["update_norm"]).mask(frame["rank"].eq(0).fillna(False), 0.0)
    updates = run.updates()
    parts = [_component_evidence(updates.get(name)) for name in frame["module"]]
    frame[["scale", "used", "empty"]] = pd.DataFrame(parts, columns=["scale", "used", "empty"], index=frame.index)
    return frame


def _component_evidence(update: Any) -> tuple[float, float, bool]:
    """Scale of an update, how many of its components are not zero, and whether its factors hold nothing at all.

    Only a product B A has them.
    """
    if not isinstance(update, LowRank):
        return np.nan, np.nan, False
    used = update.A.any(axis=1) & update.B.any(axis=0)
    return float(update.scale), float(np.count_nonzero(used)), not (update.A.any() or update.B.any())


def _tied_modules(run: Run) -> tuple[tuple[str, str], ...]:
    if not run.meta["states"]:
        return ()
    adapted = {name for name, rank in run.ranks().items() if rank}
    modules = run.modules
    if isinstance(run, AdapterRun):
        # safetensors keep a shared weight once: a head that the base lacks is its embedding.
        ends = {role: modules["module"][modules["role"] == role] for role in ("embed", "head")}
        lacking = [name for name in ends["head"] if run.base is not None and not run.base.has_weight(name)]
        return tuple((one, other) for one in ends["embed"] for other in lacking)
    pairs = zip(modules["module"], modules.get("tied", pd.Series("", modules.index)).fillna(""), strict=True)
    return tuple((one, other) for one, tied in pairs for other in tied.split(",") if {one, other} <= adapted)


def _no_modules() -> pd.DataFrame:
    """No modules."""
    frame = pd.DataFrame({name: pd.Series(dtype="float64") for name in _COLUMNS})
    words = {name: pd.Series(dtype="str") for name in ("module", "stack", "role")}
    flags = {name: pd.Series(dtype="bool") for name in ("adapted", "empty")}
    return frame.assign(**words, **flags, layer=pd.Series(dtype="Int16"))
