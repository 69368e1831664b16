"""Probe of FourierFT: accuracy compared with LoRA, by number of coefficients, basis, frequency band and initialization.

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

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorascope.evidence.statistics.fourierft import (
    BANDS,
    DEFAULT,
    EQUAL,
    FEW,
    LARGE,
    MANY,
    MEDIUM,
    ORTHOGONAL,
    RANDOM,
    SMALL,
    ZEROS,
)
from lorascope.methods import FourierFT, LoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.probes.base import Arm, Probe, encoder_settings, factor_settings
from lorascope.runs.run import Run

# For minilm's 384 x 384 query and value weights, 1536 coefficients have the parameters of LoRA of rank 2, 6144 of rank
# 8.
METHOD = FourierFT()
BAND_CENTERS = (0, 100, 240)
BAND_WIDTH = 100


def arms() -> list[Arm]:
    """Return the registered arms: FourierFT in three sizes and its variants, and LoRA on the same modules.

    A further size of each is for a figure.
    """
    bands = {
        label: replace(METHOD, center=center, width=BAND_WIDTH)
        for label, center in zip(BANDS, BAND_CENTERS, strict=True)
    }
    drawn = {
        DEFAULT: METHOD,
        FEW: replace(METHOD, coefficients=48),
        MANY: replace(METHOD, coefficients=6144),
        RANDOM: replace(METHOD, basis="random"),
        ORTHOGONAL: replace(METHOD, basis="orthogonal"),
        ZEROS: replace(METHOD, init="zeros"),
        **bands,
        MEDIUM: replace(METHOD, coefficients=192),
    }
    factored = {EQUAL: LoRA(rank=2, alpha=2.0), LARGE: LoRA(rank=8, alpha=8.0), SMALL: LoRA(rank=1, alpha=1.0)}
    settings = encoder_settings()
    # The initial coefficients, which figures subtract. On other bases the factors include the bases, which are large.
    seen = dict.fromkeys((DEFAULT, FEW, ZEROS, *BANDS), factor_settings())
    return [
        *(
            Arm(label=label, method=method, settings=seen.get(label, settings), vary=_with_entries)
            for label, method in drawn.items()
        ),
        *(Arm(label=label, method=method, settings=settings) for label, method in factored.items()),
    ]


def _with_entries(arm: Arm, seed: int) -> Arm:
    """Return the arm with entries and bases that the seed draws."""
    method: Any = arm.method
    return replace(arm, method=replace(method, entry_seed=seed))


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the spectrum of the update, and one update."""
    run = {DEFAULT: runs[DEFAULT]}
    return [draw("fourier_spectrum", run), draw("update_image", run, added=True)]


PROBE = Probe(
    name="fourierft",
    title="FourierFT: a few coefficients compared with low rank",
    source="Gao et al., FourierFT, arXiv 2405.03003",
    question="Is FourierFT as accurate as LoRA, do more coefficients help, and does the Fourier basis matter?",
    arms=arms,
    figures=figures,
)
