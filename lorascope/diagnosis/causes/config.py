"""Configuration and files of an adapter: rank, alpha, initialization, patterns, scale, budget."""

from __future__ import annotations

import math
from statistics import multimode
from typing import Any

from lorascope.diagnosis.case import SHARE, Case, TrainedModule, largest
from lorascope.diagnosis.causes.finding import DoctorRule, Found, caution, found, names_of
from lorascope.diagnosis.training_case import Evidence
from lorascope.formats.peft_experts import ExpertPart
from lorascope.formats.peft_lora import CONFIG
from lorascope.schema.name_patterns import Ends, Patterns

WHOLE = 1.0  # fraction of |W|: an update as large as the weight replaces the pretrained weight
HABIT = 16.0  # alpha / r: alpha 16 is common down to rank 1, so only a larger scale is called a cause
UNEVEN = 2.0  # ratio of scales: alpha is usually r or 2 r, so a larger ratio of two modules is not intended
NEARLY = 0.01  # fraction of the components to prune: masking every few steps may miss the end of the schedule


@DoctorRule(id="LS104")
def rank_use(case: Case) -> Found:
    """Count the modules that would need only a quarter of their rank."""
    known = {
        each.module: (each.rank, each.energy_rank)
        for each in case.measured
        if each.update_norm > 0 and each.rank is not None and not math.isnan(each.energy_rank)
    }
    if known and min(rank for rank, _ in known.values()) >= 4:
        narrow = sum(needed <= rank // 4 for rank, needed in known.values())
        ranks = {rank // 4 for rank, _ in known.values()}
        bound = f"rank {ranks.pop()} or less" if len(ranks) == 1 else "a quarter of their rank"
        yield found(f"{narrow or 'none'} of {len(known)} modules have {SHARE:.0%} of their energy in {bound}")


@DoctorRule(id="LS105")
def experts(case: Case) -> Found:
    """Count the modules that are experts of one parameter."""
    counts = [part.experts for part in case.parts.values() if isinstance(part, ExpertPart) and part.experts > 1]
    if counts:
        number = " or ".join(map(str, sorted({*counts})))
        yield found(f"{len(counts)} of {len(case.parts)} modules are experts in one tensor, {number} per parameter")


@DoctorRule(id="LS106")
def incomplete_norms(case: Case) -> Found:
    """Find adapters whose |dW| is only approximately the norm of their update."""
    if not case.files.config:
        unknown = f"no {CONFIG}, so alpha is unknown: |dW| is the norm of B A, without the factor alpha / r"
        yield caution(unknown)
    if case.files.kind == "DoRA" and any(part.has_thin_factors for part in case.parts.values()):
        yield caution("DoRA: |dW| is the norm of B A only; add --base DIR for the whole update")
    for note in case.notes:
        yield caution(note)


@DoctorRule(id="LS008")
def unmatched_targets(case: Case) -> Found:
    """Find targets that are the end of no module's name: a typing error that PEFT does not report."""
    keys, names = case.files.config.get("target_modules") or (), {*case.configured.values()}
    # PEFT rejects a single pattern that matches nothing.
    if not isinstance(keys, str):
        ends = Ends(names)
        idle = [key for key in keys if key not in names and not any(ends.names_with_end(f".{key}"))]
        yield from _unmatched_keys(case, "target_modules", idle)


@DoctorRule(id="LS009", inspected=True)
def unmatched_patterns(case: Case) -> Found:
    """Find keys of a pattern that match no module."""
    # AdaLoRA's ranks are masks per parameter.
    for field in ("rank_pattern", "alpha_pattern")[case.masks_components :]:
        keys = Patterns(case.files.config.get(field) or {}, f"{field} of {case.files.path / CONFIG}")
        yield from _unmatched_keys(case, field, keys.unused_keys(case.configured.values()))


def _unmatched_keys(case: Case, field: str, keys: list[str]) -> Found:
    if keys:
        message, count = f"{field} matches no module of this adapter", len(case.parts)
        yield found(message, keys, field=field, keys=keys, modules=count)


@DoctorRule(id="LS010", suppresses=("diverged", "rate-large"), live_from=2)
def overscaled(case: Evidence) -> Found:
    """Find updates that are larger than the weights, at an unusually large scale."""
    adapted = case.adapted
    if huge := [each for each in adapted if each.relative_update > WHOLE and each.scale > HABIT]:
        (most,) = largest(huge, "relative_update")
        update, scale = most.relative_update, most.scale
        message = f"the update is larger than the weight in {len(huge)} of {len(adapted)} modules"
        message = f"{message}, up to {update:.3g} |W| in {most.module}, at scale {scale:.4g}"
        evidence = {"modules": len(huge), "relative_update": update, "threshold": WHOLE, "scale": scale}
        yield found(message, **evidence, habit=HABIT)


@DoctorRule(id="LS011")
def uneven_scale(case: Case) -> Found:
    """Find modules with another rank that are missing in ``alpha_pattern``."""
    config, adapted = case.meta.method, case.adapted
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # Without an alpha_pattern the scale is alpha / r, which AutoLoRA intends.
    known = [each for each in adapted if not math.isnan(each.scale)]
    if case.masks_components or not ranks or not alphas or not known:
        return
    own, scaled = Patterns(ranks, "rank_pattern"), Patterns(alphas, "alpha_pattern")
    groups: dict[tuple[bool, bool], list[TrainedModule]] = {}
    for each in known:
        name = case.configured[each.module]
        groups.setdefault((own.first(name) is not None, scaled.first(name) is not None), []).append(each)
    # A scale that alpha_pattern sets for a module of the usual rank is meant to be unusual.
    usual_ones = groups.get((False, False)) or groups.get((True, True))
    if not usual_ones:
        return
    usual = min(multimode(each.scale for each in usual_ones))
    ranked = groups.get((True, False), [])
    if off := [each for each in ranked if each.scale >= UNEVEN * usual or each.scale <= usual / UNEVEN]:
        scale = off[0].scale
        verb, modules = "has" if len(off) == 1 else "have", names_of(off)
        lacking = f"{verb} an entry in rank_pattern but none in alpha_pattern"
        message = f"{len(off)} of {len(adapted)} modules {lacking}, so scale {scale:.4g} instead of {usual:.4g}"
        yield found(message, modules, modules=modules, scale=scale, usual=usual, threshold=UNEVEN)


@DoctorRule(id="LS012")
def allocator_idle(case: Case) -> Found:
    """Find AdaLoRA adapters that were never pruned, although they should have been."""
    if excess := _allocator_excess(case, idle=True):
        in_use = f"all {excess['of']} components are still in use, the budget is {excess['budget']}"
        yield found(f"{in_use}: the allocator never removed one", **excess)


@DoctorRule(id="LS013")
def budget_missed(case: Case) -> Found:
    """Find AdaLoRA adapters that were pruned too little, or not yet."""
    if excess := _allocator_excess(case, idle=False):
        in_use = f"{excess['components']} of {excess['of']} components are in use, the budget is {excess['budget']}"
        yield found(f"{in_use}: the schedule did not finish", **excess)


def _allocator_excess(case: Case, idle: bool) -> dict[str, Any]:
    """Return the components of an AdaLoRA adapter that exceeds its budget, idle or not; else an empty dict.

    The allocator is idle if it removed no component by the last step, although it should have.
    """
    method = case.meta.method
    # A module without components counts, because the others received its part of the budget.
    ranked = [(each.rank, each.used) for each in case.modules if each.rank is not None]
    if not case.masks_components or not ranked:
        return {}
    # A folder is already masked, so only the configuration has the initial rank; 8 and 12 are PEFT's defaults.
    each = method.get("target_rank", method.get("target_r", 8))
    first = method.get("init_rank", method.get("init_r", 12))
    budget, whole = round(each * len(ranked)), first * len(ranked)
    held = sum(rank if math.isnan(used) else min(rank, int(used)) for rank, used in ranked)
    steps, due = case.meta.states["last"].step, True
    if steps is not None:
        warm, every = method.get("tinit", 0), method.get("deltaT", 1)
        fixed = (method.get("total_step") or steps) - method.get("tfinal", 0)
        due = steps - 1 >= fixed or (steps - 1) // every * every > warm
    if held - budget <= NEARLY * (whole - budget) or (held == whole and due) != idle:
        return {}
    return {"components": held, "budget": budget, "of": whole, "threshold": NEARLY}
