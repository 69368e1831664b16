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

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorascope import plots
from lorascope.methods import FourierFT, HydraLoRA, LoRA
from lorascope.probes.base import Arm, Findings, Probe, ReportFigure, encoder_settings, make_report_figure, register
from lorascope.probes.claims import Claim
from lorascope.probes.rank_statistics import BySeed, accuracy
from lorascope.runs.run import Run

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

PARITY = Claim(
    sentence="FourierFT with a quarter of the parameters is non-inferior to LoRA of rank 8 (tolerance 2 points).",
    statistic="test accuracy of FourierFT, 1536 coefficients per module",
    control="test accuracy of LoRA, rank 8, on the same modules after the same number of steps, minus 2 points",
    margin=0.001,
    source="table 2",
)
BETTER = Claim(
    sentence="FourierFT outperforms LoRA with equal parameters.",
    statistic="test accuracy of FourierFT, 1536 coefficients per module",
    control="test accuracy of LoRA, rank 2, which has 1536 parameters per module",
    margin=0.002,
    source="figure 4",
)
MORE = Claim(
    sentence="FourierFT with more coefficients is more accurate.",
    statistic="test accuracy of FourierFT, 6144 coefficients per module",
    control="the same with 48 coefficients per module",
    margin=0.002,
    source="figure 4",
)
OVER_RANDOM = Claim(
    sentence="The Fourier basis outperforms a random basis.",
    statistic="test accuracy of FourierFT, 1536 coefficients per module",
    control="the same with two random bases, scaled to the same expected norm of the update",
    margin=0.002,
    source="table 6",
)
OVER_ORTHOGONAL = Claim(
    sentence="The Fourier basis outperforms a random orthogonal basis.",
    statistic="test accuracy of FourierFT, 1536 coefficients per module",
    control="the same with two random orthogonal bases, scaled to the same expected norm of the update",
    margin=0.002,
    source="table 6",
)
UNBIASED = Claim(
    sentence="Uniformly drawn entries are non-inferior to the best frequency band (tolerance 1 point).",
    statistic="test accuracy of FourierFT with entries drawn uniformly from all frequencies",
    control="the same with entries from the band that is best on the other seeds, minus 1 point",
    margin=0.001,
    source="figure 5",
)
START = Claim(
    sentence="Random initial coefficients are non-inferior to zeros (tolerance 2 points).",
    statistic="test accuracy of FourierFT with standard normal initial coefficients",
    control="the same with initial coefficients of zero, minus 2 points",
    margin=0.001,
    source="section 3.1",
)


def arms(quick: bool) -> list[Arm]:
    """Return the arms: FourierFT in three sizes and its variants, LoRA with equal parameters, and HydraLoRA.

    The variants are other bases, zero initialization and, in a full run, frequency bands.
    """
    settings = encoder_settings(quick) | ({"steps": 10, "eval_every": 5} if quick else {})
    bands = {label: replace(METHOD, center=center, width=BAND_WIDTH) for label, center in BANDS.items()}
    methods = {
        DEFAULT: METHOD,
        FEW: replace(METHOD, coefficients=48),
        MANY: replace(METHOD, coefficients=6144),
        RANDOM: replace(METHOD, basis="random"),
        ORTHOGONAL: replace(METHOD, basis="orthogonal"),
        ZEROS: replace(METHOD, init="zeros"),
        **({} if quick else bands),
        EQUAL: LoRA(rank=2, alpha=2.0, lr=1e-3, head_lr=1e-3),
        LARGE: LoRA(rank=8, alpha=8.0, lr=1e-3, head_lr=1e-3),
        HYDRA: HydraLoRA(rank=2, num_experts=3, alpha=2.0, targets=("q", "v"), lr=1e-3, head_lr=1e-3),
    }
    return [Arm(label=label, method=method, settings=settings, cost=0.65) for label, method in methods.items()]


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Compare the accuracy of FourierFT with LoRA, other sizes, bases, initial coefficients and frequency bands."""
    reached = {label: accuracy(found) for label, found in runs.items()}
    # Tolerances are subtracted from the control, so that non-inferiority is a positive effect.
    verdicts = [
        PARITY.judge(reached[DEFAULT], {seed: value - 0.02 for seed, value in reached[LARGE].items()}),
        BETTER.judge(reached[DEFAULT], reached[EQUAL]),
        MORE.judge(reached[MANY], reached[FEW]),
        OVER_RANDOM.judge(reached[DEFAULT], reached[RANDOM]),
        OVER_ORTHOGONAL.judge(reached[DEFAULT], reached[ORTHOGONAL]),
        START.judge(reached[DEFAULT], {seed: value - 0.02 for seed, value in reached[ZEROS].items()}),
    ]
    banded = {label: runs[label] for label in BANDS if label in runs}
    if banded:
        best = best_elsewhere([reached[label] for label in banded])
        verdicts.append(UNBIASED.judge(reached[DEFAULT], {seed: value - 0.01 for seed, value in best.items()}))
    figures = _make_figures(runs)
    if banded:
        bands = {f"around {center}": runs[label] for label, center in BANDS.items()}
        figures.append(make_report_figure("bias_curve", plots.bias_curve({"uniform": runs[DEFAULT]} | bands)))
    notes = [
        "Held fixed: model, data, splits, batch size, number of steps, entries and bases. Seeds vary the classifier "
        "head, adapter initialization, data order and dropout.",
        "Frequency bands are trained only in a full run."
        if not banded
        else "For each seed, the band compared with uniform entries is the best one on the other seeds. The best of "
        "three on the same seed would win by chance.",
        "Learning rates of adapter and head: FourierFT 5e-2 and 5e-3, LoRA and HydraLoRA 1e-3 for both.",
        "Trained parameters, including the classifier head: "
        + "; ".join(f"{label} {found[0].meta.parameters.trained:,}" for label, found in runs.items())
        + ".",
    ]
    return Findings(verdicts, figures, notes=notes)


def _make_figures(runs: Mapping[str, Sequence[Run]]) -> list[ReportFigure]:
    def only(*labels: str) -> dict[str, Sequence[Run]]:
        return {label: runs[label] for label in labels}

    bases, methods = ({name: runs[label] for name, label in of.items()} for of in (BASES, METHODS))
    return [
        make_report_figure(
            "accuracy_by_parameters", plots.accuracy_by_parameters(only(FEW, DEFAULT, MANY, EQUAL, LARGE))
        ),
        make_report_figure("training_curves", plots.training_curves(dict(runs))),
        make_report_figure("norm_over_steps", plots.norm_over_steps(dict(runs))),
        make_report_figure("fourier_spectrum", plots.fourier_spectrum(only(FEW, DEFAULT, ZEROS))),
        make_report_figure("atlas", plots.atlas(methods)),
        make_report_figure("basis_ablation", plots.basis_ablation(bases)),
        make_report_figure("spectrum", plots.spectrum(only(*BASES.values(), EQUAL), added=True)),
        make_report_figure("update_image", plots.update_image(only(DEFAULT, EQUAL), added=True)),
    ]


def best_elsewhere(arms: Sequence[BySeed]) -> BySeed:
    """Return, for each seed, the value of the arm with the best mean on the other seeds.

    With a single seed, the arm is chosen on this seed.
    """
    chosen = {}
    for seed in arms[0]:
        others = [other for other in arms[0] if other != seed] or [seed]
        chosen[seed] = max(arms, key=lambda arm: sum(arm[other] for other in others))[seed]
    return chosen


PROBE = register(
    Probe(
        name="fourierft",
        title="FourierFT: a few coefficients compared with low rank",
        source="Gao et al., FourierFT, arXiv 2405.03003",
        question="Is FourierFT as accurate as LoRA, do more coefficients help, and does the Fourier basis matter?",
        quick_budget=60,
        arms=arms,
        judge=judge,
        former_labels={"HydraLoRA, 3 heads of rank 2, q and v": HYDRA},
    )
)
