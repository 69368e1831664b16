"""Probe of FourierFT: accuracy compared with LoRA, by number of coefficients, basis, frequency band and initialization.

Source: FourierFT (arXiv 2405.03003), table 2 (accuracy compared with LoRA), figure 4 (number of coefficients and rank),
figure 5 (frequency bias), table 6 (other bases).

Departs:

- A small encoder on one task.
- One learning rate and one alpha for all sizes; the paper tunes them per size.
- Other bases are scaled to the expected norm of a Fourier update; the paper does not state its scaling.
- Three frequency bands, because the paper does not state the number in figure 5. Their centers (0, 100, 240) and width
  (100) at dimension 384 correspond to about 0, 200, 480 and 200 at dimension 768. A quick run has no bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorascope.methods import FourierFT, HydraLoRA, LoRA
from lorascope.probes.base import (
    SEEDS_VARY,
    Arm,
    Probe,
    ReportFigure,
    draw,
    encoder_settings,
    registered_settings,
    select,
)
from lorascope.probes.seed_statistics import BySeed, EachRun, Runs, accuracy

# For minilm's 384 x 384 query and value weights, 1536 coefficients have the parameters of LoRA of rank 2, 6144 of rank
# 8.
METHOD = FourierFT()
DEFAULT, FEW, MANY = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients", "FourierFT, 6144 coefficients"
RANDOM, ORTHOGONAL, ZEROS = f"{DEFAULT}, random basis", f"{DEFAULT}, orthogonal basis", f"{DEFAULT}, from zero"
BANDS = {f"{DEFAULT}, band around {center}": center for center in (0, 100, 240)}
BAND_WIDTH = 100
EQUAL, LARGE = "LoRA, rank 2, q and v", "LoRA, rank 8, q and v"
HYDRA = "HydraLoRA, 3 experts of rank 2, q and v"  # only for the atlas, in no claim
# Short names for figures with little room.
METHODS = {"FourierFT": DEFAULT, "LoRA, rank 2": EQUAL, "LoRA, rank 8": LARGE, "HydraLoRA": HYDRA}
BASES = {"Fourier": DEFAULT, "random": RANDOM, "orthogonal": ORTHOGONAL}


def arms(quick: bool) -> list[Arm]:
    """Return the arms: FourierFT in three sizes and its variants, LoRA with equal parameters, and HydraLoRA.

    The variants are other bases, zero initialization and, in a full run, frequency bands.
    """
    settings = encoder_settings(quick) | ({"steps": 10, "eval_every": 5} if quick else {})
    bands = {label: replace(METHOD, center=center, width=BAND_WIDTH) for label, center in BANDS.items()}
    rates: dict[str, Any] = {"lr": 1e-3, "head_lr": 1e-3}
    methods = {
        DEFAULT: METHOD,
        FEW: replace(METHOD, coefficients=48),
        MANY: replace(METHOD, coefficients=6144),
        RANDOM: replace(METHOD, basis="random"),
        ORTHOGONAL: replace(METHOD, basis="orthogonal"),
        ZEROS: replace(METHOD, init="zeros"),
        **({} if quick else bands),
        EQUAL: LoRA(rank=2, alpha=2.0, **rates),
        LARGE: LoRA(rank=8, alpha=8.0, **rates),
        HYDRA: HydraLoRA(rank=2, num_experts=3, alpha=2.0, targets=("q", "v"), **rates),
    }
    return [Arm(label=label, method=method, settings=settings, cost=0.65) for label, method in methods.items()]


def registered() -> list[Arm]:
    """Return the registered arms: FourierFT in three sizes and its variants, and LoRA on the same modules."""
    bands = {label: replace(METHOD, center=center, width=BAND_WIDTH) for label, center in BANDS.items()}
    drawn = {
        DEFAULT: METHOD,
        FEW: replace(METHOD, coefficients=48),
        MANY: replace(METHOD, coefficients=6144),
        RANDOM: replace(METHOD, basis="random"),
        ORTHOGONAL: replace(METHOD, basis="orthogonal"),
        ZEROS: replace(METHOD, init="zeros"),
        **bands,
    }
    factored = {EQUAL: LoRA(rank=2, alpha=2.0), LARGE: LoRA(rank=8, alpha=8.0)}
    settings = registered_settings()
    return [
        *(Arm(label=label, method=method, settings=settings, vary=_with_entries) for label, method in drawn.items()),
        *(Arm(label=label, method=method, settings=settings) for label, method in factored.items()),
    ]


def _with_entries(arm: Arm, seed: int) -> Arm:
    """Return the arm with entries and bases that the seed draws."""
    method: Any = arm.method
    return replace(arm, method=replace(method, entry_seed=seed))


def best_elsewhere(arms: Sequence[BySeed]) -> BySeed:
    """Return, for each seed, the value of the arm with the best mean on the other seeds.

    With a single seed, the arm is chosen on this seed.
    """
    chosen = {}
    for seed in arms[0]:
        others = [other for other in arms[0] if other != seed] or [seed]
        chosen[seed] = max(arms, key=lambda arm: sum(arm[other] for other in others))[seed]
    return chosen


def best_band(runs: Runs) -> BySeed:
    """Return the accuracy of the frequency band that is best on the other seeds, minus 1 point."""
    reached = [EachRun(accuracy, label)(runs) for label in BANDS]
    return {seed: value - 0.01 for seed, value in best_elsewhere(reached).items()}


def figures(runs: Runs) -> list[ReportFigure]:
    """Draw accuracy by parameters, training, spectra, bases and, in a full run, frequency bands."""
    bases, methods = ({name: runs[label] for name, label in of.items()} for of in (BASES, METHODS))
    shown = [
        draw("accuracy_by_parameters", select(runs, FEW, DEFAULT, MANY, EQUAL, LARGE)),
        draw("training_curves", dict(runs)),
        draw("norm_over_steps", dict(runs)),
        draw("fourier_spectrum", select(runs, FEW, DEFAULT, ZEROS)),
        draw("atlas", methods),
        draw("basis_ablation", bases),
        draw("spectrum", select(runs, *BASES.values(), EQUAL), added=True),
        draw("update_image", select(runs, DEFAULT, EQUAL), added=True),
    ]
    if bands := {f"around {center}": runs[label] for label, center in BANDS.items() if label in runs}:
        shown.append(draw("bias_curve", {"uniform": runs[DEFAULT]} | bands))
    return shown


def notes(runs: Runs) -> list[str]:
    """Return the notes, with the parameters of each arm."""
    return [
        f"Held fixed: model, data, splits, batch size, number of steps, entries and bases. {SEEDS_VARY}",
        "For each seed, the band compared with uniform entries is the best one on the other seeds. The best of three "
        "on the same seed would win by chance."
        if runs.keys() & BANDS
        else "Frequency bands are trained only in a full run.",
        "Learning rates of adapter and head: FourierFT 5e-2 and 5e-3, LoRA and HydraLoRA 1e-3 for both.",
        "Trained parameters, including the classifier head: "
        + "; ".join(f"{label} {found[0].meta.parameters.trained:,}" for label, found in runs.items())
        + ".",
    ]


PROBE = Probe(
    name="fourierft",
    title="FourierFT: a few coefficients compared with low rank",
    source="Gao et al., FourierFT, arXiv 2405.03003",
    question="Is FourierFT as accurate as LoRA, do more coefficients help, and does the Fourier basis matter?",
    quick_budget=60,
    arms=arms,
    registered=registered,
    claims={
        "fourierft.parity": (EachRun(accuracy, DEFAULT), EachRun(accuracy, LARGE) - 0.02),
        "fourierft.equal": (EachRun(accuracy, DEFAULT), EachRun(accuracy, EQUAL)),
        "fourierft.more": (EachRun(accuracy, MANY), EachRun(accuracy, FEW)),
        "fourierft.random": (EachRun(accuracy, DEFAULT), EachRun(accuracy, RANDOM)),
        "fourierft.orthogonal": (EachRun(accuracy, DEFAULT), EachRun(accuracy, ORTHOGONAL)),
        "fourierft.start": (EachRun(accuracy, DEFAULT), EachRun(accuracy, ZEROS) - 0.02),
        "fourierft.band": (EachRun(accuracy, DEFAULT), best_band),
    },
    figures=figures,
    notes=notes,
    former_labels={"HydraLoRA, 3 heads of rank 2, q and v": HYDRA},
)
