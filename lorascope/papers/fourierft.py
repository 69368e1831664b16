"""FourierFT: accuracy at its size, number of coefficients, basis, frequencies and start; and its expressiveness.

Probe of FourierFT: accuracy compared with LoRA, by number of coefficients, basis, frequency band and initialization.

Source: FourierFT (arXiv 2405.03003), table 2 (accuracy compared with LoRA), figure 4 (number of coefficients and rank),
figure 5 (frequency bias), table 6 (other bases).

Departs:

- A small encoder on one task.
- One alpha for all sizes; the paper tunes it per size.
- Other bases are scaled to the expected norm of a Fourier update; the paper does not state its scaling.
- Three frequency bands, because the paper does not state the number in figure 5. Their centers (0, 100, 240) and width
  (100) at dimension 384 correspond to about 0, 200, 480 and 200 at dimension 768.

Figures of FourierFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.analysis import fourier
from lorascope.analysis.seed_intervals import band
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Line, Point
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.papers import autolora
from lorascope.papers.figures.gallery_figure import GalleryFigure, add_printed_sizes, own_labels
from lorascope.papers.figures.printed_numbers import printed
from lorascope.papers.judging.kept_runs import Evidence
from lorascope.papers.judging.statistics import COURSE, Accuracy, Combined, MeanOverRows, OfRun, Statistic
from lorascope.papers.probe import Arm, Probe, encoder_settings, factor_settings
from lorascope.plots.builders import add_printed, ends
from lorascope.plots.component_ablations import metric_by_band
from lorascope.plots.run_groups import INTERVAL, gather
from lorascope.runs.run import Run

DEFAULT, FEW, MANY = "FourierFT, 1536 coefficients", "FourierFT, 48 coefficients", "FourierFT, 6144 coefficients"
RANDOM, ORTHOGONAL, ZEROS = f"{DEFAULT}, random basis", f"{DEFAULT}, orthogonal basis", f"{DEFAULT}, from zero"
BANDS = tuple(f"{DEFAULT}, band around {center}" for center in (0, 100, 240))
EQUAL, LARGE = "LoRA, rank 2, q and v", "LoRA, rank 8, q and v"
MEDIUM, SMALL = "FourierFT, 192 coefficients", "LoRA, rank 1, q and v"  # only a figure shows these
POINTS, POINTS_RANDOM = "FourierFT", "random basis"
POINTS_SLOW, POINTS_FAST = "LoRA, rank 1, lr 0.01", "LoRA, rank 1, lr 0.1"


@dataclass(frozen=True)
class BestElsewhere(Statistic):
    """For each seed, the accuracy of the arm with the best mean on the other seeds: (seed,)."""

    choices: Sequence[str]

    def arms(self) -> set[str]:
        return set(self.choices)

    def reads(self) -> dict[tuple[str, str], tuple[str, ...]]:
        return {("margin", arm): () for arm in self.choices}

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        reached = np.stack([MeanOverRows(Accuracy(arm))(evidence, seeds) for arm in self.choices])
        others = reached.sum(axis=1, keepdims=True) - reached
        return np.take_along_axis(reached, others.argmax(axis=0)[None], axis=0)[0]


def best_accuracy(table: pd.DataFrame) -> float:
    """Return the best training accuracy of a course."""
    return float(table["best_accuracy"].item())


def log_epochs(table: pd.DataFrame) -> float:
    """Return log10 of the epochs until all points were classified correctly, or of all epochs."""
    return float(np.log10(table["epochs"].item()))


CLAIMS = {
    "fourierft.parity": (Accuracy(DEFAULT), Accuracy(LARGE)),
    "fourierft.equal": (Accuracy(DEFAULT), Accuracy(EQUAL)),
    "fourierft.more": (Accuracy(DEFAULT), Accuracy(FEW)),
    "fourierft.enough": (Accuracy(MANY), Accuracy(DEFAULT)),
    "fourierft.random": (Accuracy(DEFAULT), Accuracy(RANDOM)),
    "fourierft.orthogonal": (Accuracy(DEFAULT), Accuracy(ORTHOGONAL)),
    "fourierft.band": (BestElsewhere(BANDS), MeanOverRows(Accuracy(DEFAULT))),
    "fourierft.start": (Accuracy(DEFAULT), Accuracy(ZEROS)),
    "expressiveness.more": (
        OfRun(best_accuracy, COURSE, POINTS),
        Combined(np.maximum, (OfRun(best_accuracy, COURSE, POINTS_SLOW), OfRun(best_accuracy, COURSE, POINTS_FAST))),
    ),
    "expressiveness.frequencies": (-OfRun(log_epochs, COURSE, POINTS), -OfRun(log_epochs, COURSE, POINTS_RANDOM)),
}


BAND_CENTERS = (0, 100, 240)
BAND_WIDTH = 100


def arms() -> list[Arm]:
    """Return the registered arms: FourierFT in three sizes and its variants, and LoRA on the same modules.

    A further size of each is for a figure.
    """
    from lorascope.methods import FourierFT, LoRA

    # For minilm's 384 x 384 query and value weights, 1536 coefficients have the parameters of LoRA of rank 2, 6144 of
    # rank 8.
    plain = FourierFT()
    bands = {
        label: replace(plain, center=center, width=BAND_WIDTH)
        for label, center in zip(BANDS, BAND_CENTERS, strict=True)
    }
    drawn = {
        DEFAULT: plain,
        FEW: replace(plain, coefficients=48),
        MANY: replace(plain, coefficients=6144),
        RANDOM: replace(plain, basis="random"),
        ORTHOGONAL: replace(plain, basis="orthogonal"),
        ZEROS: replace(plain, init="zeros"),
        **bands,
        MEDIUM: replace(plain, coefficients=192),
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


HEADING = "FourierFT"
_FIRST_EPOCH = 10  # of the toy task's axis; no seed fits all points before it


def _draw_sizes(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="FourierFT", table="Table 2", model="RoBERTa-base", data="SST-2")
    numbers = numbers[numbers["method"].isin(["LoRA", "FourierFT"])]
    return add_printed_sizes(plots.accuracy_by_parameters(runs), numbers, "FourierFT, table 2, SST-2")


def _draw_bases(runs: Mapping[str, Sequence[Any]]) -> Chart:
    models = ("RoBERTa-base", "RoBERTa-large")
    numbers = pd.concat(
        printed(paper="FourierFT", table="Table 6", model=model, data="RTE").assign(source=f"printed: {model}")
        for model in models
    )
    numbers = numbers.assign(basis=numbers["method"].str.removesuffix(" basis"))
    return add_printed(plots.basis_ablation(runs), numbers, "basis", "FourierFT, table 6, RTE")


def _draw_bands(runs: Mapping[str, Sequence[Any]]) -> Chart:
    highest = fourier.corner((384, 384))  # of minilm's query and value weights
    return metric_by_band(gather("bias_curve", runs), highest)


def _draw_toy_task(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    """Plot the kept tables ``course``: the fraction of seeds that fit all points by epoch, and the best accuracy."""
    rows = pd.concat(run.tables[COURSE].assign(recipe=label, run=run.id) for label, of in runs.items() for run in of)
    epochs = np.append(_FIRST_EPOCH, np.unique(rows["epochs"]))
    fractions = []
    for label, own in rows.groupby("recipe", sort=False):
        fitted = own.loc[own["best_accuracy"] == 1, "epochs"].to_numpy()
        share = (fitted <= epochs[:, None]).sum(1) / len(own)
        # Every value holds until the next epoch, at which the line rises vertically.
        steps = {"epoch": np.repeat(epochs, 2)[1:], "value": np.repeat(share, 2)[:-1]}
        fractions.append(pd.DataFrame(steps).assign(recipe=label))
    best = band(rows.assign(value=rows["best_accuracy"]), ["recipe"])
    caption = (
        "Eight classes of points, learned by a network whose hidden layer has an adapter of 128 parameters; "
        f"{len(rows) // len(runs)} seeds. The paper does not state its points. Right: mean; bars: {INTERVAL}."
    )
    return set_side_by_side(
        Chart(
            pd.concat(fractions),
            [Line("epoch", "value", "recipe")],
            title="Seeds that fit all points",
            x=Axis(label="epoch", log=True),
            y=Axis(label="fraction of seeds", limits=(0, 1.02)),
            caption=caption,
        ),
        Chart(
            best,
            [Point("recipe", "value", "recipe", **ends(best))],
            title="Best accuracy",
            x=Axis(order=list(runs)),
            y=Axis(label="training accuracy"),
            caption=caption,
        ),
    )


_SIZES = own_labels(FEW, MEDIUM, DEFAULT, MANY, SMALL, EQUAL, LARGE)

FIGURES = [
    GalleryFigure(
        name="quality",
        alt="Accuracy by trained parameters: FourierFT, LoRA, and printed numbers",
        arms=_SIZES,
        draw=_draw_sizes,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="basis-ablation",
        alt="Accuracy by basis, and printed numbers",
        arms={"Fourier": DEFAULT, "random": RANDOM, "orthogonal": ORTHOGONAL},
        draw=_draw_bases,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="bias-curve",
        alt="Accuracy by frequency band",
        arms={"uniform": DEFAULT} | {label.removeprefix(f"{DEFAULT}, band "): label for label in BANDS},
        draw=_draw_bands,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="toy-task",
        alt="Toy task: seeds that fit all points by epoch, and best accuracy, with 128 parameters",
        arms={
            "Fourier": POINTS,
            "random basis": POINTS_RANDOM,
            "LoRA, lr 0.01": POINTS_SLOW,
            "LoRA, lr 0.1": POINTS_FAST,
        },
        draw=_draw_toy_task,
        seeds=None,
        scores_only=True,
        table=COURSE,
    ),
    GalleryFigure(
        name="fourier-spectrum",
        alt="Fourier coefficients in the spectrum, and their size by radius",
        arms={"48 coefficients": FEW, "1536 coefficients": DEFAULT, "1536, from zero": ZEROS},
        draw=plots.fourier_spectrum,
        seeds=1,
        quantities=("update_norm",),
        arrays=(
            "coefficients",
            "entries",
            "shape",
        ),
    ),
    GalleryFigure(
        name="update-image",
        alt="A corner of the update of one module: FourierFT and LoRA with as many parameters",
        arms=own_labels(DEFAULT, EQUAL),
        draw=partial(plots.update_image, added=True),
        seeds=1,
        quantities=("update_norm",),
        arrays=(
            "A",
            "B",
            "coefficients",
            "entries",
            "shape",
        ),
    ),
    GalleryFigure(
        name="atlas",
        alt="Spectra, norms and angles of FourierFT, LoRA and AutoLoRA on the same matrices",
        arms={"FourierFT": DEFAULT, "LoRA": LARGE, "AutoLoRA": autolora.ADAPTED},
        draw=plots.atlas,
    ),
]
