"""FourierFT: a few coefficients compared with low rank.

Is FourierFT as accurate as LoRA, do more coefficients help, and do the Fourier basis, the frequencies and the initial
coefficients matter?

Source: FourierFT (arXiv 2405.03003), table 2 (accuracy compared with LoRA), figure 4 (number of coefficients and rank),
figure 5 (frequency bias), table 6 (other bases).

Departs:

- A small encoder on one task.
- One alpha for all sizes; the paper tunes it per size.
- Other bases are scaled to the expected norm of a Fourier update; the paper does not state its scaling.
- Three frequency bands, because the paper does not state the number in figure 5. Their centers (0, 100, 240) and width
  (100) at dimension 384 correspond to about 0, 200, 480 and 200 at dimension 768.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorascope.papers.judging import truth_names
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.statistics import Accuracy, MeanOverRows, Reads, Statistic
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings, factor_settings
from lorascope.schema.module_roles import ATTENTION

DEFAULT, FEW, MANY = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients", "FourierFT, 6144 coefficients"
RANDOM, ORTHOGONAL, ZEROS = f"{DEFAULT}, random basis", f"{DEFAULT}, orthogonal basis", f"{DEFAULT}, from zero"
BANDS = {f"{DEFAULT}, band around {center}": center for center in (0, 100, 240)}
EQUAL, LARGE = "LoRA, rank 2, q and v", "LoRA, rank 8, q and v"
MEDIUM, SMALL = "FourierFT, 192 coefficients", "LoRA, rank 1, q and v"  # only a figure shows these
BAND_WIDTH = 100


def arms() -> list[Arm]:
    """Return the registered arms of the FourierFT paper: three sizes and its variants, and LoRA on the same modules.

    A further size of each is for a figure.
    """
    from lorascope.methods import FourierFT, LoRA

    # For minilm's 384 x 384 query and value weights, 1536 coefficients have the parameters of LoRA of rank 2, 6144 of
    # rank 8.
    plain = FourierFT()
    drawn = {
        DEFAULT: plain,
        FEW: replace(plain, coefficients=48),
        MANY: replace(plain, coefficients=6144),
        RANDOM: replace(plain, basis="random"),
        ORTHOGONAL: replace(plain, basis="orthogonal"),
        ZEROS: replace(plain, init="zeros"),
        **{label: replace(plain, center=center, width=BAND_WIDTH) for label, center in BANDS.items()},
        MEDIUM: replace(plain, coefficients=192),
    }
    factored = {EQUAL: LoRA(rank=2, alpha=2.0), LARGE: LoRA(rank=8, alpha=8.0), SMALL: LoRA(rank=1, alpha=1.0)}
    settings = encoder_settings()
    # The initial coefficients, which figures subtract. On other bases the factors include the bases, which are large.
    recorded = dict.fromkeys((DEFAULT, FEW, ZEROS, *BANDS), factor_settings())
    sparse = [
        Arm(label=label, method=method, settings=recorded.get(label, settings), vary=_with_entries)
        for label, method in drawn.items()
    ]
    return sparse + [Arm(label=label, method=method, settings=settings) for label, method in factored.items()]


SUFFICIENT = (truth_names.OWN_ENTRIES, truth_names.ATTENTION_RANK_2)
"""Truths of FourierFT's pair: its coefficients suffice, or LoRA's rank does."""
BASIS = (truth_names.OWN_ENTRIES, truth_names.OTHER_ENTRIES)
"""Truths of the pair on its basis: the update has coefficients at its entries, or at others."""
SPARSE, ROTATED = "FourierFT, 192 coefficients from zero", "FourierFT, 192 coefficients, random basis"
SMALL_STUDENT, LARGE_STUDENT = "LoRA, rank 2, attention", "LoRA, rank 8, attention"


def study_arms() -> list[Arm]:
    """Return the arms of FourierFT's pairs: the seed of a run draws its entries, and LoRA of rank 2 has equal size."""
    from lorascope.methods import FourierFT, LoRA

    sparse = FourierFT(coefficients=192, init="zeros", alpha=10.0, targets=ATTENTION)

    small = LoRA(rank=2, alpha=8.0, targets=ATTENTION)
    of_seed = Student(lambda base, seed: replace(sparse, entry_seed=seed))
    # The seed of the entries draws the random basis as well.
    rotated = Student(lambda base, seed: replace(sparse, basis="random", entry_seed=seed))
    factored = {SMALL_STUDENT: small, LARGE_STUDENT: replace(small, rank=8, alpha=32.0)}
    return [
        *planted_arms({SPARSE: of_seed}, dict.fromkeys(SUFFICIENT + BASIS)),
        *planted_arms({ROTATED: rotated}, BASIS),
        *planted_arms(factored, SUFFICIENT),
    ]


JUDGED = {
    "pair.fourierft": pair(SPARSE, SMALL_STUDENT, LARGE_STUDENT, truths=SUFFICIENT),
    "pair.basis": pair(SPARSE, ROTATED, truths=BASIS),  # pair.fourierft shows its headroom
}


def _with_entries(arm: Arm, seed: int) -> Arm:
    """Return the arm with entries and bases that the seed draws."""
    method: Any = arm.method
    return replace(arm, method=replace(method, entry_seed=seed))


@dataclass(frozen=True)
class BestElsewhere(Statistic):
    """Accuracy, in FourierFT's claims, of the arm with the best mean on the other seeds, for each seed: (seed,)."""

    choices: Sequence[str]

    def reads(self) -> Reads:
        return {("margin", arm): () for arm in self.choices}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        accuracies = np.stack([MeanOverRows(Accuracy(arm))(evidence, seeds) for arm in self.choices])
        # A choice on the seed itself would favor the best of several by chance. Sums order arms as means do.
        on_other_seeds = accuracies.sum(axis=1, keepdims=True) - accuracies
        return np.take_along_axis(accuracies, on_other_seeds.argmax(axis=0)[None], axis=0)[0]


CLAIMS = {
    "fourierft.parity": (Accuracy(DEFAULT), Accuracy(LARGE)),
    "fourierft.equal": (Accuracy(DEFAULT), Accuracy(EQUAL)),
    "fourierft.more": (Accuracy(DEFAULT), Accuracy(FEW)),
    "fourierft.enough": (Accuracy(MANY), Accuracy(DEFAULT)),
    "fourierft.random": (Accuracy(DEFAULT), Accuracy(RANDOM)),
    "fourierft.orthogonal": (Accuracy(DEFAULT), Accuracy(ORTHOGONAL)),
    "fourierft.band": (BestElsewhere(tuple(BANDS)), MeanOverRows(Accuracy(DEFAULT))),
    "fourierft.start": (Accuracy(DEFAULT), Accuracy(ZEROS)),
}


PROBE = Probe(
    name="fourierft",
    title="FourierFT: a few coefficients compared with low rank",
    source="Gao et al., FourierFT, arXiv 2405.03003",
    question="Is FourierFT as accurate as LoRA, do more coefficients help, and does the Fourier basis matter?",
    arms=arms,
)

PAPER = PaperStudy(
    name="FourierFT",
    authors="Gao et al.",
    question="Does FourierFT beat LoRA of equal size where its entries suffice, and does its basis matter?",
)
run = PAPER.run
