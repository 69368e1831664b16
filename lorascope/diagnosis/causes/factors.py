"""Causes that the factors tell of: what never moved, cannot move, or is no number."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.causes.evidence import Case, Finding, Found, count_phrase
from lorascope.diagnosis.inspection import first_and_count

FAINT = 1e-3  # of the median layer's change: layers of healthy runs differ by less than a hundredfold
SINGLE = 1.01  # effective rank: training in earnest spreads further, identical components give 1 to rounding
ROOM = 4  # components: with fewer, a single direction is no wonder


def find_not_a_number(case: Case) -> Found:
    """Norms that are no numbers."""
    broken = case.modules["module"][~np.isfinite(case.modules["update_norm"])]
    if len(broken):
        yield Finding(
            "nan",
            f"{count_phrase(broken, case.modules)} NaN or infinity: {first_and_count(broken)}",
            {"modules": len(broken), "of": len(case.modules)},
            "train again with bf16 in place of fp16, a lower rate or clipping; nothing can be saved of this one",
        )


def find_scale_zero(case: Case) -> Found:
    """An adapter that is multiplied by nothing."""
    mute = case.adapted["module"][case.adapted["scale"] == 0]
    if len(mute):
        yield Finding(
            "scale-zero",
            f"{count_phrase(mute, case.adapted)} scale 0, so neither output nor gradient: {first_and_count(mute)}",
            {"modules": len(mute), "of": len(case.adapted), "scale": 0.0},
            "set lora_alpha above 0 (r or 2 r are common), and train again",
        )


def find_untrained(case: Case) -> Found:
    """An adapter that is what its initialisation made it."""
    if not case.history and 0 < len(case.adapted) == len(case.unchanged_adapters):
        yield Finding(
            "untrained",
            f"{'E' if case.is_adalora else 'B'} is still zero in all {len(case.adapted)} modules: it does nothing",
            {"modules": len(case.adapted), "update_norm": 0.0},
            "save after training, and the adapter that trained (PEFT saves each name by itself)",
        )


def find_dead(case: Case) -> Found:
    """Modules no gradient can move, and layers that hardly changed beside the others."""
    empty = case.adapted["module"][case.adapted["empty"] & (case.adapted["scale"] != 0)]
    if len(empty):
        yield Finding(
            "dead",
            f"{count_phrase(empty, case.adapted)} zeros in all factors, which no gradient can move: "
            f"{first_and_count(empty)}",
            {"modules": len(empty), "of": len(case.adapted)},
            "initialise one factor at random and the other by zero, as PEFT does, and train again",
        )
    layers = case.modules.dropna(subset=["layer"])
    moved = layers.groupby(["stack", "layer"], observed=True)["moved"].agg(
        lambda norms: float(np.sqrt((norms**2).sum()))
    )
    moved = moved[moved > 0]
    faint = moved[moved < FAINT * moved.median()]
    if len(faint):
        names = [f"{stack} {layer}".strip() for stack, layer in faint.index]
        share = float(faint.min() / moved.median())
        yield Finding(
            "dead",
            f"{len(faint)} of {len(moved)} layers changed by less than {FAINT:g} of the median layer: "
            f"{first_and_count(names)} ({share:.1e})",
            {"layers": names, "share": share, "threshold": FAINT},
            "look for a rate of their own, a mask, or a branch without gradient at these layers",
        )


def find_frozen(case: Case) -> Found:
    """Adapters that stayed where they began while others moved."""
    resting, adapted = case.unchanged_adapters["module"], case.adapted
    # AdaLoRA may take all components of a module: that is its choice.
    if 0 < len(resting) < len(adapted) and (adapted["update_norm"] > 0).any() and not case.is_adalora:
        yield Finding(
            "frozen",
            f"{count_phrase(resting, adapted)} an update of exactly zero while others moved: "
            f"{first_and_count(resting)}",
            {"modules": list(resting), "of": len(adapted), "update_norm": 0.0},
            "let them train (requires_grad, the optimizer's groups), or leave them out of the targets",
        )


def find_collapsed(case: Case) -> Found:
    """Ranks of which one direction is left."""
    adapted = case.adapted
    known = adapted[(adapted["used"] >= ROOM) & (adapted["update_norm"] > 0) & adapted["effective_rank"].notna()]
    narrow = known[known["effective_rank"] <= SINGLE]
    if len(narrow) > len(known) / 2:
        yield Finding(
            "collapsed",
            f"{len(narrow)} of {len(known)} updates have one direction (effective rank at most {SINGLE:g} of "
            f"{int(known['used'].max())}): {first_and_count(narrow['module'])}",
            {"modules": len(narrow), "of": len(known), "effective_rank": float(narrow["effective_rank"].max()),
             "threshold": SINGLE},
            "draw A at random: equal rows get equal gradients and stay equal; else rank 1 is enough",
        )  # fmt: skip
