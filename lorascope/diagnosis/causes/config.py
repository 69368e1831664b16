"""Checks of the configuration: patterns, scale, budget, targets."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.causes.evidence import Case, Finding, Found, count_phrase
from lorascope.diagnosis.inspection import first_and_count
from lorascope.schema.name_patterns import Ends, Patterns

WHOLE = 1.0  # fraction of |W|: an update as large as the weight replaces the pretrained weight
HABIT = 16.0  # alpha / r: alpha 16 is common down to rank 1, so only a larger scale is called a cause
UNEVEN = 2.0  # ratio of scales: alpha is usually r or 2 r, so a larger ratio of two modules is not intended
NEARLY = 0.01  # fraction of the components to prune: masking every few steps may miss the end of the schedule


def find_unmatched_keys(case: Case) -> Found:
    """Find parts of a configuration that match no module: a typing error that PEFT does not report."""
    config = case.meta.method
    if case.history:
        return
    names = list(case.adapted["module"])
    known, ends = set(names), Ends(names)
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        keys = config.get(field) or ()
        # PEFT rejects a single pattern that matches nothing. AdaLoRA's ranks are masks per parameter.
        if isinstance(keys, str) or (field == "rank_pattern" and case.is_adalora):
            continue
        # A target is the end of a module's name, a key of a pattern a regular expression for it.
        idle = (
            [key for key in keys if key not in known and not any(ends.names_with_end(f".{key}"))]
            if field == "target_modules"
            else Patterns(keys, field).unused_keys(names)
        )
        if idle:
            yield Finding(
                "unmatched",
                f"{field} matches no module of this adapter: {first_and_count(idle)}",
                {"field": field, "keys": idle, "modules": len(names)},
                "compare with model.named_modules(): PEFT matches the end of a name, and ignores other keys",
            )


def find_overscaled_updates(case: Case) -> Found:
    """Find updates that are larger than the weights, at an unusually large scale."""
    adapted = case.adapted
    huge = adapted[(adapted["relative_update"] > WHOLE) & (adapted["scale"] > HABIT)]
    if len(huge):
        most = huge.sort_values("relative_update", ascending=False, kind="stable").iloc[0]
        yield Finding(
            "overscaled",
            f"the update is larger than the weight in {len(huge)} of {len(adapted)} modules, up to "
            f"{most['relative_update']:.3g} |W| in {most['module']}, at scale {most['scale']:.4g}",
            {
                "modules": len(huge),
                "relative_update": float(most["relative_update"]),
                "threshold": WHOLE,
                "scale": float(most["scale"]),
                "habit": HABIT,
            },
            "set lora_alpha to r or 2 r: the scale is alpha / r (alpha / sqrt(r) for rsLoRA), not alpha",
        )


def find_uneven_scale(case: Case) -> Found:
    """Find modules with another rank that are missing in ``alpha_pattern``."""
    config, adapted = case.meta.method, case.adapted
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # Without an alpha_pattern the scale is alpha / r, which AutoLoRA intends.
    if case.history or case.is_adalora or not ranks or not alphas or adapted["scale"].isna().all():
        return
    usual = float(adapted["scale"].mode().iloc[0])
    own, scaled = Patterns(ranks, "rank_pattern"), Patterns(alphas, "alpha_pattern")
    left = [own.first(name) is not None and scaled.first(name) is None for name in adapted["module"]]
    ratio = adapted["scale"] / usual
    off = adapted[np.array(left) & ((ratio >= UNEVEN) | (ratio <= 1 / UNEVEN))]
    if len(off):
        yield Finding(
            "uneven-scale",
            f"{count_phrase(off, adapted)} an entry in rank_pattern but none in alpha_pattern, so scale "
            f"{off['scale'].iloc[0]:.4g} instead of {usual:.4g}: {first_and_count(off['module'])}",
            {"modules": list(off["module"]), "scale": float(off["scale"].iloc[0]), "usual": usual, "threshold": UNEVEN},
            "add the keys of rank_pattern to alpha_pattern, with alpha = scale x rank",
        )


def find_allocator_excess(case: Case) -> Found:
    """Find AdaLoRA adapters with more components than their budget."""
    method = case.meta.method
    # A module without components counts, because the others received its part of the budget.
    ranked = case.modules[case.modules["rank"].notna()]
    if not case.is_adalora or ranked.empty:
        return
    # A folder is already masked, so only the configuration has the initial rank; 8 and 12 are PEFT's defaults.
    each = method.get("target_rank", method.get("target_r", 8))
    first = method.get("init_rank", method.get("init_r", 12))
    budget, whole = round(each * len(ranked)), first * len(ranked)
    held = int(ranked[["rank", "used"]].min(axis=1).sum())
    if held - budget <= NEARLY * (whole - budget):
        return
    evidence = {"components": held, "budget": budget, "of": whole, "threshold": NEARLY}
    if held == whole and _is_allocation_due(case):
        yield Finding(
            "allocator-idle",
            f"all {whole} components are still in use, the budget is {budget}: the allocator never removed one",
            evidence,
            "call model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
        )
    else:
        yield Finding(
            "budget-missed",
            f"{held} of {whole} components are in use, the budget is {budget}: the schedule did not finish",
            evidence,
            "set total_step to the number of steps in training, and tinit + tfinal well below it",
        )


def _is_allocation_due(case: Case) -> bool:
    """Return whether PEFT's allocator should have pruned by the last step; True if the step is unknown."""
    method, steps = case.meta.method, case.meta.states["last"].step
    if steps is None:
        return True
    warm, every = method.get("tinit", 0), method.get("deltaT", 1)
    fixed = (method.get("total_step") or steps) - method.get("tfinal", 0)
    return steps - 1 >= fixed or (steps - 1) // every * every > warm


def find_tied_twice(case: Case) -> Found:
    """Find tied weights with an adapter under each of their two names."""
    for one, other in case.tied:
        yield Finding(
            "tied-twice",
            f"{one} and {other} are one weight of the base, and each has an adapter: merging one overwrites the other",
            {"modules": [one, other]},
            "adapt only one of them, or untie them first (tie_word_embeddings=False) and save the base",
        )
