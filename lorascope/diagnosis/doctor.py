"""Diagnosis of a run or an adapter: evidence for the checks, and their findings.

The folder of an adapter contains its factors; with its base model, the weights are known as well. A run also has a
training history.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from lorascope.diagnosis.causes import CAUSES, Case, Finding
from lorascope.runs.adapter import Adapter
from lorascope.runs.result import Result

_COLUMNS = ("rank", "scale", "update_norm", "moved", "weight_norm", "relative_update", "effective_rank", "used")
# Names of the evidence in ``skipped_checks``, which are also keys of the JSON output.
_NEEDS = {"weights": "norms of the weights", "base": "norms of the weights", "history": "a history"}
SKIP_REASONS = {"norms of the weights": "no weight norms", "a history": "no training history"}
"""Missing evidence -> reason to print."""


def diagnose(run: Result) -> list[Finding]:
    """Diagnose why a run or an adapter is not as intended.

    Parameters
    ----------
    run : Run
        Result of ``train`` or ``load``. More checks are possible for an adapter that was loaded with its base.

    Returns
    -------
    list of Finding
        With ``cause, message, evidence, fix`` each; empty if nothing was found.
    """
    return findings(collect_evidence(run))


def findings(case: Case) -> list[Finding]:
    """Return the findings of all checks, without those that only follow from another finding."""
    found = {cause: list(cause.find(case)) for cause in CAUSES}
    # A finding may explain others: NaN weights, for example, also make the loss diverge.
    follows = {name for cause, own in found.items() if own for name in cause.suppresses}
    return [finding for own in found.values() for finding in own if finding.cause not in follows]


def skipped_checks(case: Case) -> dict[str, list[str]]:
    """Return missing evidence -> names of the checks that require it."""
    lacking = {need for need in ("weights", "base", "history") if not getattr(case, need)}
    missing: dict[str, list[str]] = {}
    for cause in CAUSES:
        if cause.needs in lacking:
            missing.setdefault(_NEEDS[cause.needs], []).extend(cause.names)
    return missing


def collect_evidence(run: Result) -> Case:
    """Collect the evidence for all checks."""
    history = not isinstance(run, Adapter)
    modules = _module_evidence(run) if run.meta.states else _no_modules()
    losses = pd.Series(dtype="float64")
    if history and "records.parquet" in run.meta.checksums:
        rows = run.table[run.table["quantity"] == "loss"].sort_values("step")
        losses = pd.Series(rows["value"].to_numpy(), index=rows["step"].to_numpy(dtype="int64"))
    base = history or (isinstance(run, Adapter) and run.base is not None)
    return Case(
        modules, losses, run.meta, history, bool(modules["weight_norm"].notna().any()), base, _tied_modules(run)
    )


def _module_evidence(run: Result) -> pd.DataFrame:
    """Return ``Case.modules``."""
    frame = run.summary(all=True)
    recorded = run.table["module"][run.table["quantity"] == "update_norm"]
    frame = frame[frame["rank"].notna() | frame["module"].isin(recorded)].reset_index(drop=True)
    frame["adapted"] = (frame["rank"] > 0).fillna(False).astype(bool)
    # A pruned module has not moved, even if it was recorded before PEFT's allocator masked it.
    frame["moved"] = frame["learned_norm"].fillna(frame["update_norm"]).mask(frame["rank"].eq(0).fillna(False), 0.0)
    updates = run.updates()
    parts = [_component_evidence(updates.get(name)) for name in frame["module"]]
    frame[["scale", "used", "empty"]] = pd.DataFrame(parts, columns=["scale", "used", "empty"], index=frame.index)
    return frame


def _component_evidence(update: Any) -> tuple[float, float, bool]:
    """Return the scale of an update, its number of nonzero components, and whether all its factors are zero.

    These are NaN, NaN and False unless the update is a product B A.
    """
    if update is None or (product := update.thin) is None:
        return np.nan, np.nan, False
    used = product.A.any(axis=1) & product.B.any(axis=0)
    return float(product.scale), float(np.count_nonzero(used)), not (product.A.any() or product.B.any())


def _tied_modules(run: Result) -> tuple[tuple[str, str], ...]:
    if not run.meta.states:
        return ()
    adapted = {name for name, rank in run.ranks().items() if rank}
    modules = run.modules
    if isinstance(run, Adapter):
        # safetensors stores a shared weight once: a head that is missing in the base is tied to the embedding.
        ends = {role: modules["module"][modules["role"] == role] for role in ("embed", "head")}
        lacking = [name for name in ends["head"] if run.base is not None and not run.base.has_weight(name)]
        return tuple((one, other) for one in ends["embed"] for other in lacking)
    pairs = zip(modules["module"], modules["tied"], strict=True)
    return tuple((one, other) for one, tied in pairs for other in tied.split(",") if {one, other} <= adapted)


def _no_modules() -> pd.DataFrame:
    """Return an empty ``Case.modules``."""
    frame = pd.DataFrame({name: pd.Series(dtype="float64") for name in _COLUMNS})
    words = {name: pd.Series(dtype="str") for name in ("module", "stack", "role")}
    flags = {name: pd.Series(dtype="bool") for name in ("adapted", "empty")}
    return frame.assign(**words, **flags, layer=pd.Series(dtype="Int16"))
