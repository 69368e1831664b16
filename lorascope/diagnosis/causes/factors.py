"""Checks of the factors: zero, unchanged, collapsed or NaN."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.causes.evidence import Case, Finding, Found, count_phrase
from lorascope.diagnosis.inspection import first_and_count

FAINT = 1e-3  # fraction of the median change per layer: layers of healthy runs differ by less than a hundredfold
SINGLE = 1.01  # effective rank: real training exceeds it, identical components give 1 up to rounding
ROOM = 4  # components: with fewer, a single direction is not suspicious


def find_not_a_number(case: Case) -> Found:
    """Find updates whose norm is NaN or infinite."""
    broken = case.modules["module"][~np.isfinite(case.modules["update_norm"])]
    if len(broken):
        yield Finding(
            "nan",
            f"{count_phrase(broken, case.modules)} NaN or infinity: {first_and_count(broken)}",
            {"modules": len(broken), "of": len(case.modules)},
            "train again with bf16 instead of fp16, a lower learning rate or clipping; this adapter cannot be repaired",
        )


def find_scale_zero(case: Case) -> Found:
    """Find adapters with scale 0."""
    mute = case.adapted["module"][case.adapted["scale"] == 0]
    if len(mute):
        yield Finding(
            "scale-zero",
            f"{count_phrase(mute, case.adapted)} scale 0, so no output and no gradient: {first_and_count(mute)}",
            {"modules": len(mute), "of": len(case.adapted), "scale": 0.0},
            "set lora_alpha above 0 (r or 2 r are common), and train again",
        )


def find_untrained(case: Case) -> Found:
    """Find adapters that equal their initialization."""
    if not case.history and 0 < len(case.adapted) == len(case.unchanged_adapters):
        yield Finding(
            "untrained",
            f"{'E' if case.is_adalora else 'B'} is still zero in all {len(case.adapted)} modules, so it has no effect",
            {"modules": len(case.adapted), "update_norm": 0.0},
            "save after training, and save the adapter that was trained (PEFT saves each adapter name separately)",
        )


def find_dead(case: Case) -> Found:
    """Find modules that no gradient can change, and layers that changed far less than the others."""
    empty = case.adapted["module"][case.adapted["empty"] & (case.adapted["scale"] != 0)]
    if len(empty):
        yield Finding(
            "dead",
            f"{count_phrase(empty, case.adapted)} zeros in all factors, so their gradients are zero: "
            f"{first_and_count(empty)}",
            {"modules": len(empty), "of": len(case.adapted)},
            "initialize one factor randomly and the other with zeros, as PEFT does, and train again",
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
            "check these layers for a separate learning rate, a mask, or a branch without gradient",
        )


def find_frozen(case: Case) -> Found:
    """Find adapters that did not change while others did."""
    resting, adapted = case.unchanged_adapters["module"], case.adapted
    # AdaLoRA may remove all components of a module, which is not a fault.
    if 0 < len(resting) < len(adapted) and (adapted["update_norm"] > 0).any() and not case.is_adalora:
        yield Finding(
            "frozen",
            f"{count_phrase(resting, adapted)} an update of exactly zero while others changed: "
            f"{first_and_count(resting)}",
            {"modules": list(resting), "of": len(adapted), "update_norm": 0.0},
            "make them trainable (requires_grad, groups of the optimizer), or remove them from the targets",
        )


def find_collapsed(case: Case) -> Found:
    """Find updates that use a single direction of their rank."""
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
            "initialize A randomly (equal rows get equal gradients and stay equal); otherwise rank 1 is enough",
        )  # fmt: skip
