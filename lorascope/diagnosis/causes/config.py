"""Causes that lie in what was asked for: patterns, scale, budget, targets."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.causes.evidence import Case, Finding, Found, count_phrase
from lorascope.diagnosis.inspection import first_and_count
from lorascope.schema.name_patterns import Ends, Patterns

WHOLE = 1.0  # of |W|: an update as large as the weight replaces what was pretrained
HABIT = 16.0  # alpha / r: alpha 16 is common down to rank 1, so an update is blamed on the scale only above it
UNEVEN = 2.0  # between scales: r and 2 r are both common, more than that between two modules is neither
NEARLY = 0.01  # of the components to be taken: masked every few steps, a whole schedule may leave the cube's tail


def find_unmatched_keys(case: Case) -> Found:
    """Parts of a configuration that are about no module: a typing error that PEFT does not report."""
    config = case.meta["method"]
    if case.history:
        return
    names = list(case.adapted["module"])
    known, ends = set(names), Ends(names)
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        keys = config.get(field) or ()
        # One pattern in place of a list has to fit something, or PEFT refuses; AdaLoRA's ranks are masks by parameter.
        if isinstance(keys, str) or (field == "rank_pattern" and case.is_adalora):
            continue
        # A target is the end of a name, a key of a pattern an expression of it.
        idle = (
            [key for key in keys if key not in known and not any(ends.names_with_end(f".{key}"))]
            if field == "target_modules"
            else Patterns(keys, field).unused_keys(names)
        )
        if idle:
            yield Finding(
                "unmatched",
                f"{field} names no module of this adapter: {first_and_count(idle)}",
                {"field": field, "keys": idle, "modules": len(names)},
                "compare with model.named_modules(): PEFT matches the end of the name, and passes over what fits none",
            )


def find_overscaled_updates(case: Case) -> Found:
    """Updates larger than the weights, by a scale beyond habit."""
    adapted = case.adapted
    huge = adapted[(adapted["relative_update"] > WHOLE) & (adapted["scale"] > HABIT)]
    if len(huge):
        most = huge.sort_values("relative_update", ascending=False, kind="stable").iloc[0]
        yield Finding(
            "overscaled",
            f"the update is larger than the weight in {len(huge)} of {len(adapted)} modules, at most "
            f"{most['relative_update']:.3g} of |W| in {most['module']}, at scale {most['scale']:.4g}",
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
    """An ``alpha_pattern`` that leaves out modules whose rank is another one."""
    config, adapted = case.meta["method"], case.adapted
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    # Without any alpha_pattern the scale follows alpha / r, as AutoLoRA means it to.
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
            f"{count_phrase(off, adapted)} a rank of their own but no alpha: scale {off['scale'].iloc[0]:.4g} where "
            f"others have {usual:.4g}: {first_and_count(off['module'])}",
            {"modules": list(off["module"]), "scale": float(off["scale"].iloc[0]), "usual": usual, "threshold": UNEVEN},
            "give alpha_pattern the keys of rank_pattern, with alpha = scale x rank",
        )


def find_allocator_excess(case: Case) -> Found:
    """AdaLoRA with more components than its budget."""
    method = case.meta["method"]
    # A module that lost all its components counts: others got its share of the budget.
    ranked = case.modules[case.modules["rank"].notna()]
    if not case.is_adalora or ranked.empty:
        return
    # What a folder holds was masked already, so the start is known from the configuration alone; 8 and 12 are PEFT's.
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
            f"all {whole} components are still in use, the budget is {budget}: the allocator never took one",
            evidence,
            "call model.base_model.update_and_allocate(step) between optimizer.step() and zero_grad()",
        )
    else:
        yield Finding(
            "budget-missed",
            f"{held} of {whole} components are in use, the budget is {budget}: the schedule was cut short",
            evidence,
            "set total_step to the steps that are really taken, and tinit + tfinal well below it",
        )


def _is_allocation_due(case: Case) -> bool:
    """Should PEFT's allocator have taken something by the last step? Of a folder the number of steps is not known."""
    method, steps = case.meta["method"], case.meta["states"]["last"]["step"]
    if steps is None:
        return True
    warm, every = method.get("tinit", 0), method.get("deltaT", 1)
    fixed = (method.get("total_step") or steps) - method.get("tfinal", 0)
    return steps - 1 >= fixed or (steps - 1) // every * every > warm


def find_tied_twice(case: Case) -> Found:
    """One weight under two names, with an adapter on each."""
    for one, other in case.tied:
        yield Finding(
            "tied-twice",
            f"{one} and {other} are one weight of the base, and each has an adapter: merged, they overwrite each other",
            {"modules": [one, other]},
            "adapt one of the two, or untie them first (tie_word_embeddings=False) and save the base",
        )
