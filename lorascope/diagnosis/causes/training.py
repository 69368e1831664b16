"""Causes that lie in how it was trained."""

from __future__ import annotations

import numpy as np

from lorascope.diagnosis.causes.evidence import Case, Finding, Found

STILL = 1e-4  # of |W|: below float16's and bfloat16's resolution, 5e-4 and 4e-3, so merging rounds it away
WORSE = 1.0  # nats: batches differ by less, and a loss that ends this far above its start has lost the task


def find_unused(case: Case) -> Found:
    """A training that passed the adapters by."""
    method, steps = case.meta["method"], int(case.losses.index.max() if len(case.losses) else 0)
    # Of PEFT's ways, prompts and prefixes adapt no module: those that do name them.
    promised = (method.get("name") == "peft" and method.get("target_modules")) or len(case.adapted)
    if not case.history or not case.meta["states"] or len(case.unchanged_adapters) < len(case.adapted) or not promised:
        return
    if case.meta.get("left_out"):  # what it trained there is in no update
        return
    told = f"all {len(case.adapted)} adapters are as they began" if len(case.adapted) else "no adapter was active"
    yield Finding(
        "unused",
        f"{told} after {steps} steps: they are off, frozen, or on modules that the model does not run through",
        {"modules": len(case.adapted), "update_norm": 0.0, "steps": steps},
        "train with the adapter active (set_adapter, no disable_adapter), on modules of the forward pass",
    )


def find_rate_small(case: Case) -> Found:
    """Everything moved, and hardly."""
    looked = case.adapted if len(case.adapted) else case.modules[case.modules["role"] != "head"]
    known = looked[["moved", "weight_norm"]].dropna()
    norm = float(np.sqrt((known["weight_norm"] ** 2).sum()))
    share = float(np.sqrt((known["moved"] ** 2).sum())) / norm if norm else np.nan
    if not 0 < share < STILL:
        return
    rate = case.meta["settings"].get("lr")
    told = f" at a rate of {rate:.3g}" if rate else ""
    yield Finding(
        "rate-small",
        f"training changed {share:.1e} of |W|, less than {STILL:g}{told}: as good as nothing",
        {"moved": share, "threshold": STILL, "lr": rate},
        "raise the rate tenfold or more (each method has its own: FourierFT needs far more than LoRA), or train longer",
    )


def find_diverged(case: Case) -> Found:
    """A loss that ended far above its start, or was no number."""
    mend = "lower the rate (by ten), warm up longer, clip gradients"
    rate, error = case.meta["settings"].get("lr"), str(case.meta.get("error") or "")
    if "became" in error:
        yield Finding("diverged", f"training broke off: {error.partition(':')[0]}", {"error": error, "lr": rate}, mend)
        return
    losses = case.losses.to_numpy()
    if len(losses) < 2:
        return
    start, end = float(losses[0]), float(losses[-max(1, len(losses) // 5) :].mean())
    if not end - start < WORSE:
        yield Finding(
            "diverged",
            f"the loss went from {start:.3g} to {end:.3g} (mean of the last fifth), at a rate of {rate:.3g}",
            {"start": start, "end": end, "threshold": WORSE, "lr": rate},
            mend,
        )


def find_leaked(case: Case) -> Found:
    """Evaluation on rows that training saw."""
    share = case.meta.get("eval_overlap") or 0.0
    if share > 0:
        yield Finding(
            "leak",
            f"{100 * share:.3g} % of the evaluation rows are training rows: they say nothing of new text",
            {"share": share, "threshold": 0.0},
            "give eval_dataset rows of their own, such as those of train_test_split",
        )
