"""A run in one table, a row a module, and as the configuration of the next one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from lorascope.schema.module_table import parse
from lorascope.updates.low_rank import Dense, LowRank, effective_rank, spectra, stable_rank

SUMMARY = ("update_norm", "relative_update", "learned_norm", "weight_norm", "stable_rank", "effective_rank")

_NO_PRODUCT = "is no product B A, so it has no ranks of a LoRA"
_ROUTED = (
    "depends on its input, no LoRA holds its router, so it cannot be exported; "
    "ls.at_gates(run, ls.mean_gates(run, texts)) is a LoRA at fixed gates, which can: near it, not equal"
)


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
    frame["exact"] = ~frame.index.isin(run.input_dependent_modules(state))
    if not all:
        frame = frame[frame["update_norm"].notna()]
    return frame.reset_index()


def peft_keywords(run: Any, ranks: Mapping[str, int], updates: Mapping[str, LowRank | Dense]) -> dict[str, Any]:
    """PEFT's keywords for a LoRA with these ranks and the updates' scales; see ``Run.lora_config``.

    PEFT reads the keys of its patterns as regular expressions that the end of a module's name has to match, so each
    is written to match the whole name and no other. A module of rank 0 is none of its targets.
    """
    kept = {name: rank for name, rank in ranks.items() if rank > 0 and name in updates}
    if not kept:
        raise ValueError(f"run {run.id} has no factored update of a rank above 0: there is nothing to configure")
    factors = products(run, {name: updates[name] for name in kept})
    alphas = {name: _alpha(factors[name].scale, rank) for name, rank in kept.items()}
    common_rank, common_alpha = mode(kept.values()), mode(alphas.values())
    return {
        "r": common_rank,
        "lora_alpha": common_alpha,
        "target_modules": targets(run, kept),
        "rank_pattern": {_exact_pattern(name): rank for name, rank in kept.items() if rank != common_rank},
        "alpha_pattern": {_exact_pattern(name): alpha for name, alpha in alphas.items() if alpha != common_alpha},
    }


def products(run: Any, updates: Mapping[str, LowRank | Dense]) -> dict[str, LowRank]:
    """The updates, if each is a product of two factors; a ValueError says of one that it is not."""
    found = {name: update for name, update in updates.items() if isinstance(update, LowRank)}
    other = next((name for name in updates if name not in found), None)
    if other is not None:
        raise ValueError(f"run {run.id} ({run.label}): the update of {other} {_NO_PRODUCT}")
    return found


def exact_products(run: Any, updates: Mapping[str, LowRank | Dense]) -> dict[str, LowRank]:
    """The updates, if each is such a product and no more; a ValueError says of one that it is not.

    One that depends on its input is no more where the run is seen at fixed gates.
    """
    found = products(run, updates)
    routed = next((name for name, update in found.items() if not (update.exact or name in run.gates)), None)
    if routed is not None:
        raise ValueError(f"run {run.id} ({run.label}): the update of {routed} {_ROUTED}")
    return found


def _exact_pattern(name: str) -> str:
    return f"^{re.escape(name)}"


def targets(run: Any, kept: Collection[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for these and no others.

    The full names; where the end of another module's name is one of them, an expression that leaves that one out.
    """
    ends = tuple(f".{name}" for name in kept)
    if any(name.endswith(ends) for name in _known_names(run) - set(kept)):
        return "|".join(map(re.escape, kept))
    return list(kept)


def _known_names(run: Any) -> set[str]:
    """All names of the model's modules that the run knows of."""
    modules = run.modules
    return {*modules["module"], *(name for names in modules.get("tied", ()) for name in names.split(","))}


def _alpha(scale: float, rank: int) -> float:
    """Scale times rank, or the whole number that gives the scale exactly where the product is off by rounding."""
    whole = round(scale * rank)
    return whole if whole / rank == scale else scale * rank


def mode(values: Iterable[Any]) -> Any:
    """The most frequent value, of equally frequent ones the first."""
    ordered = list(values)
    return max(dict.fromkeys(ordered), key=ordered.count)
