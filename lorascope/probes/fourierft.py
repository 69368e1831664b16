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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.charts.chart import Chart
from lorascope.evidence.statistics import autolora
from lorascope.methods import FourierFT, LoRA
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.plots.builders import add_printed
from lorascope.probes.base import Arm, EvidenceFigure, Probe, encoder_settings, factor_settings, own_labels
from lorascope.probes.printed_numbers import printed
from lorascope.runs.run import Run

# For minilm's 384 x 384 query and value weights, 1536 coefficients have the parameters of LoRA of rank 2, 6144 of rank
# 8.
METHOD = FourierFT()
DEFAULT, FEW, MANY = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients", "FourierFT, 6144 coefficients"
RANDOM, ORTHOGONAL, ZEROS = f"{DEFAULT}, random basis", f"{DEFAULT}, orthogonal basis", f"{DEFAULT}, from zero"
BANDS = {f"{DEFAULT}, band around {center}": center for center in (0, 100, 240)}
BAND_WIDTH = 100
EQUAL, LARGE = "LoRA, rank 2, q and v", "LoRA, rank 8, q and v"
# Short names for figures with little room.


def arms() -> list[Arm]:
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


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="FourierFT", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin(["LoRA", "FourierFT"])]
    return add_printed(plots.accuracy_by_parameters(runs), numbers, "parameters", "FourierFT, table 2, SST-2")


def _draw_bases(runs: Mapping[str, Sequence[Any]]) -> Chart:
    models = ("RoBERTa-base", "RoBERTa-large")
    numbers = pd.concat(
        printed(paper="FourierFT", table="Table 6", model=model, data="RTE").assign(source=f"printed: {model}")
        for model in models
    )
    numbers = numbers.assign(basis=numbers["method"].str.removesuffix(" basis"))
    return add_printed(plots.basis_ablation(runs), numbers, "basis", "FourierFT, table 6, RTE")


def evidence_figures() -> list[EvidenceFigure]:
    """Return the figures of accuracy by size, basis and band, of spectra, and of one update."""
    sizes = own_labels(FEW, DEFAULT, MANY, EQUAL, LARGE)
    return [
        EvidenceFigure(
            name="quality",
            alt="Accuracy by trained parameters: FourierFT, LoRA, and printed numbers",
            arms=sizes,
            draw=_draw_sizes,
            seeds=None,
        ),
        EvidenceFigure(
            name="basis-ablation",
            alt="Accuracy by basis, and printed numbers",
            arms={"Fourier": DEFAULT, "random": RANDOM, "orthogonal": ORTHOGONAL},
            draw=_draw_bases,
            seeds=None,
            scores_only=True,
        ),
        EvidenceFigure(
            name="bias-curve",
            alt="Accuracy by frequency band",
            arms={"uniform": DEFAULT} | {f"around {center}": label for label, center in BANDS.items()},
            draw=plots.bias_curve,
            seeds=None,
        ),
        EvidenceFigure(
            name="fourier-spectrum",
            alt="Fourier coefficients in the spectrum, and their size by radius",
            arms={"48 coefficients": FEW, "1536 coefficients": DEFAULT, "1536, from zero": ZEROS},
            draw=plots.fourier_spectrum,
            seeds=1,
        ),
        EvidenceFigure(
            name="update-image",
            alt="A corner of the update of one module: FourierFT and LoRA with as many parameters",
            arms=own_labels(DEFAULT, EQUAL),
            draw=partial(plots.update_image, added=True),
            seeds=1,
        ),
        EvidenceFigure(
            name="atlas",
            alt="Spectra, norms and angles of FourierFT, LoRA and AutoLoRA on the same matrices",
            arms={"FourierFT": DEFAULT, "LoRA": LARGE, "AutoLoRA": autolora.ADAPTED},
            draw=plots.atlas,
        ),
    ]


PROBE = Probe(
    name="fourierft",
    title="FourierFT: a few coefficients compared with low rank",
    source="Gao et al., FourierFT, arXiv 2405.03003",
    question="Is FourierFT as accurate as LoRA, do more coefficients help, and does the Fourier basis matter?",
    arms=arms,
    figures=figures,
    evidence_figures=evidence_figures,
)
