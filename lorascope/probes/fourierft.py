"""FourierFT: do few coefficients do what a low rank does, and is it the Fourier basis that does it?

Source: FourierFT (arXiv 2405.03003), table 2 (quality against LoRA), figure 4 (coefficients against ranks), figure 5
(frequency bias), table 6 (other bases).

Departs: a small encoder on one task, all sizes at one rate and one alpha, where the paper searches for each. Other
bases are scaled to the expected norm of a Fourier update; the paper does not say how its own were. Nor does it say how
many bands figure 5 has: here are three, whose centers and width are to 384 what about 0, 200, 480 and 200 are to 768.
A quick run leaves them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorascope import plots
from lorascope.methods import FourierFT, HydraLoRA, LoRA
from lorascope.probes.base import Arm, Exhibit, Findings, Probe, encoder_settings, exhibit, register
from lorascope.probes.claims import Claim
from lorascope.probes.rank_statistics import BySeed, accuracy
from lorascope.runs.run import Run

# Of minilm's queries and values, 384 x 384: four coefficients a row, a few, and as many as LoRA of rank 8 has.
METHOD = FourierFT()
DEFAULT, FEW, MANY = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients", "FourierFT, 6144 coefficients"
RANDOM, ORTHOGONAL, ZEROS = f"{DEFAULT}, random basis", f"{DEFAULT}, orthogonal basis", f"{DEFAULT}, from zero"
BANDS = {f"{DEFAULT}, band around {center}": center for center in (0, 100, 240)}
BAND_WIDTH = 100
EQUAL, LARGE = "LoRA, rank 2, q and v", "LoRA, rank 8, q and v"
HYDRA = "HydraLoRA, 3 heads of rank 2, q and v"  # beside the others in the atlas; in no claim
# Short names, for figures that have little room for them.
METHODS = {"FourierFT": DEFAULT, "LoRA, rank 2": EQUAL, "LoRA, rank 8": LARGE, "HydraLoRA": HYDRA}
BASES = {"Fourier": DEFAULT, "random": RANDOM, "orthogonal": ORTHOGONAL}

PARITY = Claim(
    sentence="FourierFT with a quarter of the parameters does as well as LoRA of rank 8, within two points.",
    statistic="test accuracy of FourierFT, 1536 coefficients a module",
    control="test accuracy of LoRA, rank 8, on the same modules at the same steps, less two points",
    margin=0.001,
    source="table 2",
)
BETTER = Claim(
    sentence="Of as many parameters, coefficients do better than factors.",
    statistic="test accuracy of FourierFT, 1536 coefficients a module",
    control="test accuracy of LoRA, rank 2, which has as many",
    margin=0.002,
    source="figure 4",
)
MORE = Claim(
    sentence="More coefficients help.",
    statistic="test accuracy of FourierFT, 6144 coefficients a module",
    control="the same with 48",
    margin=0.002,
    source="figure 4",
)
OVER_RANDOM = Claim(
    sentence="The Fourier basis does better than a random one.",
    statistic="test accuracy of FourierFT",
    control="the same on two random bases, at the same expected norm of the update",
    margin=0.002,
    source="table 6",
)
OVER_ORTHOGONAL = Claim(
    sentence="The Fourier basis does better than another orthogonal one.",
    statistic="test accuracy of FourierFT",
    control="the same on two random orthogonal bases, at the same expected norm of the update",
    margin=0.002,
    source="table 6",
)
UNBIASED = Claim(
    sentence="No band of frequencies does better than entries drawn evenly, within one point.",
    statistic="test accuracy of FourierFT, entries drawn from all frequencies alike",
    control="the same with entries from the band that is best on the other seeds, less one point",
    margin=0.001,
    source="figure 5",
)
START = Claim(
    sentence="To start away from the pre-trained model does no harm, within two points.",
    statistic="test accuracy of FourierFT from standard normal coefficients",
    control="the same from zero, less two points",
    margin=0.001,
    source="section 3.1",
)


def arms(quick: bool) -> list[Arm]:
    """FourierFT of three sizes, on other bases, from zero and from bands; LoRA of as many parameters as two of them."""
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
    """Accuracy against LoRA, fewer coefficients, other bases and a start from zero."""
    reached = {label: accuracy(found) for label, found in runs.items()}
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
    exhibits = _exhibits(runs)
    if banded:
        bands = {f"around {center}": runs[label] for label, center in BANDS.items()}
        exhibits.append(exhibit("bias_curve", plots.bias_curve({"drawn evenly": runs[DEFAULT]} | bands)))
    notes = [
        "Held fixed: model, text, splits, batch size, number of steps, entries and bases. Seeds vary head, adapters, "
        "data order, dropout.",
        "Bands are trained in the full form alone."
        if not banded
        else "The band that stands against entries drawn evenly "
        "is chosen for each seed by the others: the best of three would win by chance.",
        "Each method has its own rates, for the head too: FourierFT 5e-2 and 5e-3, LoRA and HydraLoRA 1e-3 for both.",
        "Trained parameters, the task's head included: "
        + "; ".join(f"{label} {found[0].meta['parameters']['trained']:,}" for label, found in runs.items())
        + ".",
    ]
    return Findings(verdicts, exhibits, notes=notes)


def _exhibits(runs: Mapping[str, Sequence[Run]]) -> list[Exhibit]:
    def only(*labels: str) -> dict[str, Sequence[Run]]:
        return {label: runs[label] for label in labels}

    bases, methods = ({name: runs[label] for name, label in of.items()} for of in (BASES, METHODS))
    return [
        exhibit("accuracy_by_parameters", plots.accuracy_by_parameters(only(FEW, DEFAULT, MANY, EQUAL, LARGE))),
        exhibit("training_curves", plots.training_curves(dict(runs))),
        exhibit("norm_over_steps", plots.norm_over_steps(dict(runs))),
        exhibit("fourier_spectrum", plots.fourier_spectrum(only(FEW, DEFAULT, ZEROS))),
        exhibit("atlas", plots.atlas(methods)),
        exhibit("basis_ablation", plots.basis_ablation(bases)),
        exhibit("spectrum", plots.spectrum(only(*BASES.values(), EQUAL), added=True)),
        exhibit("update_image", plots.update_image(only(DEFAULT, EQUAL), added=True)),
    ]


def best_elsewhere(arms: Sequence[BySeed]) -> BySeed:
    """For each seed the value of the arm that is best on the other seeds; of a single seed the best there is."""
    chosen = {}
    for seed in arms[0]:
        others = [other for other in arms[0] if other != seed] or [seed]
        chosen[seed] = max(arms, key=lambda arm: sum(arm[other] for other in others))[seed]
    return chosen


PROBE = register(
    Probe(
        name="fourierft",
        title="FourierFT: few coefficients against a low rank",
        source="Gao et al., FourierFT, arXiv 2405.03003",
        question="Do few frequencies do what a low rank does, do more help, and does it take the Fourier basis?",
        quick_budget=60,
        arms=arms,
        judge=judge,
    )
)
