"""FourierFT: a few coefficients compared with low rank.

Does FourierFT beat LoRA of equal size where its entries suffice, and gain less where rank 2 does? Does its basis beat a
random one where its entries are right, and gain less where they are not?

Source: FourierFT (arXiv 2405.03003), table 2 (accuracy compared with LoRA), table 6 (other bases).

Departs:

- A small decoder on planted teachers.
- The random basis is scaled to the expected norm of a Fourier update; the paper does not state its scaling.
"""

from __future__ import annotations

from dataclasses import replace

from lorascope.papers.arms import Arm
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.schema.module_roles import ATTENTION

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


PAPER = PaperStudy(
    name="FourierFT",
    authors="Gao et al.",
    question="Does FourierFT beat LoRA of equal size where its entries suffice, and does its basis matter?",
)
run = PAPER.run
