"""Checks of the training: unused adapters, learning rate, divergence, leaked rows."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.causes.evidence import Case, Finding, Found

STILL = 1e-4  # fraction of |W|: below the resolution of float16 and bfloat16, 5e-4 and 4e-3, so merging loses it
WORSE = 1.0  # nats: batches differ by less, and a final loss this far above the first one means failure


def find_unused(case: Case) -> Found:
    """Find training runs that did not use the adapters."""
    method, steps = case.meta.method, int(case.losses.index.max() if len(case.losses) else 0)
    # PEFT's prompt and prefix methods adapt no module; the others have target_modules.
    promised = (method.get("name") == "peft" and method.get("target_modules")) or len(case.adapted)
    if not case.history or not case.meta.states or len(case.unchanged_adapters) < len(case.adapted) or not promised:
        return
    if case.meta.left_out:  # parameters that trained there are in no update
        return
    state = f"all {len(case.adapted)} adapters are unchanged" if len(case.adapted) else "no adapter was active"
    yield Finding(
        "unused",
        f"{state} after {steps} steps: they are disabled, frozen, or on modules that the forward pass does not use",
        {"modules": len(case.adapted), "update_norm": 0.0, "steps": steps},
        "train with the adapter enabled (set_adapter, no disable_adapter), on modules that the forward pass uses",
    )


def find_rate_small(case: Case) -> Found:
    """Find training runs that changed the weights, but hardly."""
    rows = case.adapted if len(case.adapted) else case.modules[case.modules["role"] != "head"]
    known = rows[["moved", "weight_norm"]].dropna()
    norm = float(np.sqrt((known["weight_norm"] ** 2).sum()))
    share = float(np.sqrt((known["moved"] ** 2).sum())) / norm if norm else np.nan
    if not 0 < share < STILL:
        return
    rate = case.meta.settings.get("lr")
    at_rate = f" at learning rate {rate:.3g}" if rate else ""
    yield Finding(
        "rate-small",
        f"training changed the weights by only {share:.1e} of |W|, less than {STILL:g}{at_rate}",
        {"moved": share, "threshold": STILL, "lr": rate},
        "raise the learning rate by a factor of 10 or more (FourierFT needs far more than LoRA), or train longer",
    )


def find_diverged(case: Case) -> Found:
    """Find losses that ended far above the first one, or became NaN."""
    fix = "lower the learning rate (by a factor of 10), warm up longer, or clip gradients"
    rate, error = case.meta.settings.get("lr"), str(case.meta.error or "")
    if "became" in error:
        yield Finding("diverged", f"training stopped: {error.partition(':')[0]}", {"error": error, "lr": rate}, fix)
        return
    losses = case.losses.to_numpy()
    if len(losses) < 2:
        return
    start, end = float(losses[0]), float(losses[-max(1, len(losses) // 5) :].mean())
    if not end - start < WORSE:
        yield Finding(
            "diverged",
            f"the loss went from {start:.3g} to {end:.3g} (mean of the last fifth), at learning rate {rate:.3g}",
            {"start": start, "end": end, "threshold": WORSE, "lr": rate},
            fix,
        )


def find_leaked(case: Case) -> Found:
    """Find evaluation rows that training saw."""
    share = case.meta.eval_overlap or 0.0
    if share > 0:
        yield Finding(
            "leak",
            f"{100 * share:.3g}% of the evaluation rows are training rows, so they do not measure generalization",
            {"share": share, "threshold": 0.0},
            "use separate rows for eval_dataset, such as the test rows of train_test_split",
        )
