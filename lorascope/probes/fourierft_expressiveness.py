"""Expressiveness: what can a matrix in the middle of a network learn with 128 parameters?

Eight clusters of points on a circle go through a small network of which all but one layer is frozen at random. That
layer, 64 x 64, is adapted: by LoRA of rank 1, or by FourierFT with 128 coefficients, which is as many parameters. If a
frequency basis says more with the same number, its network tells all points apart where LoRA's does not. Other bases
with as many coefficients tell whether that is the frequencies' doing, or that of an update whose rank is not 1.

Source: FourierFT (arXiv 2405.03003), appendix C.2 with figure 7.

Departs: the paper states neither the points nor what else trains, nor rates. Here centres lie on a circle of radius 5,
30 points each with deviation 0.5; the first and the last layer are frozen, and the layer in the middle keeps the random
weight that it begins with, as in fine-tuning. LoRA is given two rates, and the better one of each seed is judged. There
are half of the figure's 2000 epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.adapters.delta import Delta, attach
from lorascope.analysis.seed_intervals import band, t_interval
from lorascope.charts.chart import Axis, Chart, Drawable, Heat, Point, set_side_by_side
from lorascope.methods.fourierft import BasisDelta, FourierDelta, bases
from lorascope.methods.lora import LoRADelta
from lorascope.plots.run_groups import INTERVAL, lines
from lorascope.probes.base import Exhibit, Findings, Probe, register
from lorascope.probes.claims import Claim
from lorascope.runs.run import Run
from lorascope.updates import fourier

CLASSES, POINTS, CENTER, NOISE = 8, 30, 5.0, 0.5
WIDTH, COEFFICIENTS = 64, 128
EPOCHS, SEEDS = 1000, range(5)
_ALPHA, _ENTRY_SEED, _MIDDLE = 300.0, 777, "2"
_CELL, _REACH = 0.25, 28  # of the plane that is drawn: the side of a cell, and how many lie on each side of zero
_EVERY = 20  # epochs between two points of a curve

FOURIER, RANDOM = "FourierFT", "random basis"
SLOW, FAST = "LoRA, rank 1, rate 0.01", "LoRA, rank 1, rate 0.1"

EXPRESSIVE = Claim(
    sentence="With 128 parameters, FourierFT tells apart what LoRA of rank 1 does not.",
    statistic="best accuracy of FourierFT on the points that it trains on",
    control="the same of LoRA of rank 1, which has as many parameters, at the better of two rates",
    margin=0.05,
    source="appendix C.2, figure 7",
)
FREQUENCIES = Claim(
    sentence="That is the frequencies' doing: coefficients of a random basis take longer.",
    statistic="log10 of the epochs until every point is told right, its sign turned; all epochs where that is never",
    control="the same with two random matrices in place of the Fourier basis, as many coefficients at the same places",
    margin=0.15,
    source="table 6, on these points",
)


class Points(NamedTuple):
    """Points of the plane and their classes."""

    x: Float[Tensor, "points 2"]
    y: Int[Tensor, "points"]


class Course(NamedTuple):
    """Accuracy after each epoch, from before the first on, and the network in the end."""

    accuracy: list[float]
    network: nn.Sequential


def points(seed: int) -> Points:
    """Clusters with centres on a circle."""
    angle = 2 * torch.pi * torch.arange(CLASSES) / CLASSES
    centers = CENTER * torch.stack([angle.cos(), angle.sin()], dim=1)
    noise = NOISE * torch.randn(CLASSES, POINTS, 2, generator=torch.Generator().manual_seed(seed))
    return Points((centers[:, None] + noise).flatten(0, 1), torch.arange(CLASSES).repeat_interleave(POINTS))


def network(seed: int) -> nn.Sequential:
    """Three frozen layers at random, the one in the middle without a bias."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = nn.Linear(WIDTH, WIDTH, bias=False)
        model = nn.Sequential(nn.Linear(2, WIDTH), nn.ReLU(), middle, nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    return model.requires_grad_(False)


def _new_lora_delta(seed: int) -> Delta:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoRADelta(nn.Linear(WIDTH, WIDTH), rank=1)


def _new_fourier_delta(seed: int) -> Delta:
    return FourierDelta(*_coefficients(seed), (WIDTH, WIDTH), _ALPHA)


def _new_random_basis_delta(seed: int) -> Delta:
    return BasisDelta(*_coefficients(seed), *bases((WIDTH, WIDTH), seed, "random"), _ALPHA)


def _coefficients(seed: int) -> tuple[Float[Tensor, "n"], Int[Tensor, "2 n"]]:
    places = torch.from_numpy(fourier.entries((WIDTH, WIDTH), COEFFICIENTS, _ENTRY_SEED))
    return torch.randn(COEFFICIENTS, generator=torch.Generator().manual_seed(seed)), places


ADAPTERS: dict[str, tuple[Callable[[int], Delta], float]] = {
    FOURIER: (_new_fourier_delta, 1e-2),
    RANDOM: (_new_random_basis_delta, 1e-2),
    SLOW: (_new_lora_delta, 1e-2),
    FAST: (_new_lora_delta, 1e-1),
}
"""What adapts the layer, with the rate that it trains at."""


def learn(label: str, seed: int, epochs: int = EPOCHS) -> Course:
    """Train one adapter on all points at once, by Adam, until every point is told right or the epochs are over."""
    make, rate = ADAPTERS[label]
    model, (x, y) = network(seed), points(seed)
    delta = make(seed)
    attach(model, {_MIDDLE: delta})
    optimizer = torch.optim.Adam(delta.parameters(), lr=rate)
    accuracy: list[float] = []
    while True:
        logits = model(x)
        accuracy.append(float((logits.argmax(dim=1) == y).float().mean()))
        if accuracy[-1] == 1.0 or len(accuracy) > epochs:
            return Course(accuracy, model)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits, y).backward()
        optimizer.step()


@cache
def courses() -> dict[tuple[str, int], Course]:
    """Every adapter for every seed; seeds vary the points, the network, and what an adapter starts from."""
    return {(label, seed): learn(label, seed) for label in ADAPTERS for seed in SEEDS}


def epochs_needed(course: Course) -> int:
    """Epochs until every point was told right, or all there were."""
    return len(course.accuracy) - 1


def judge(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """What was learned with equal parameters, and how soon; the networks are trained here, which takes seconds."""
    found = courses()
    best = {label: {seed: max(found[label, seed].accuracy) for seed in SEEDS} for label in ADAPTERS}
    low_rank = {seed: max(best[SLOW][seed], best[FAST][seed]) for seed in SEEDS}
    soon = {label: {seed: -np.log10(epochs_needed(found[label, seed])) for seed in SEEDS} for label in ADAPTERS}
    verdicts = [EXPRESSIVE.judge(best[FOURIER], low_rank), FREQUENCIES.judge(soon[FOURIER], soon[RANDOM])]
    exhibits = [
        Exhibit(
            curves(found),
            "A line that ends at 1 told every point right, and stopped there; one that levels off below cannot with "
            "what it trains, at this rate.",
            "These are the points that are trained on: this is about what can be said, not about what carries over to "
            "others. Rates were not tuned but for LoRA's two.",
        ),
        Exhibit(
            regions({label: found[label, SEEDS[0]].network for label in (FOURIER, RANDOM, SLOW)}, points(SEEDS[0])),
            "Colours are the classes that the network gives to the plane, dots the points: a dot on another's colour "
            "is told wrong.",
            "One seed. Far from the points no region means anything.",
        ),
    ]
    notes = [
        "Held fixed: the circle of centres, entries, rates, α. Seeds vary points, network, and the adapter's start.",
        f"An update of rank 1 sends all 64 inputs through one number; the others have a rank of {ranks()}, so that "
        "equal parameters are not equal ranks.",
    ]
    return Findings(verdicts, exhibits, {"Points told right, and when": table(found)}, notes)


def ranks() -> str:
    """Rank of the updates at their start, smallest and largest over the two bases."""
    found = {np.linalg.matrix_rank(ADAPTERS[label][0](0).update().dense()) for label in (FOURIER, RANDOM)}
    return " to ".join(map(str, sorted(found)))


def table(found: Mapping[tuple[str, int], Course]) -> pd.DataFrame:
    """Best accuracy, seeds that told every point right, and the epochs until then."""
    rows = []
    for label in ADAPTERS:
        own = [course for (name, _), course in found.items() if name == label]
        best = np.array([max(course.accuracy) for course in own])
        done = [epochs_needed(course) for course, top in zip(own, best, strict=True) if top == 1.0]
        rows.append(
            {
                "": label,
                "best accuracy": t_interval(best).format(3),
                "all right": f"{len(done)} of {len(own)}",
                "epochs until then": f"{min(done)} to {max(done)}" if done else "",
            }
        )
    return pd.DataFrame(rows)


def curves(found: Mapping[tuple[str, int], Course]) -> Chart:
    """Accuracy over epochs, one line an adapter; whoever told all points right is right from then on."""
    last = max(len(course.accuracy) for course in found.values())
    parts = []
    for (label, seed), (accuracy, _) in found.items():
        held = accuracy + [accuracy[-1]] * (last - len(accuracy))
        told = {"epoch": range(0, last, _EVERY), "value": held[::_EVERY]}
        parts.append(pd.DataFrame(told | {"run": seed, "recipe": label, "kind": "run"}))
    cells = band(pd.concat(parts), ["recipe", "kind", "epoch"])
    return Chart(
        cells,
        lines(cells, "epoch", points=False),
        title=f"Eight classes with {COEFFICIENTS} parameters",
        x=Axis(label="epoch"),
        y=Axis(label="training accuracy", limits=(0, 1)),
        caption=f"Every {_EVERY}th epoch, mean of {len({seed for _, seed in found})} seeds; bands: {INTERVAL}. "
        f"{CLASSES} × {POINTS} points, a frozen network with an adapted layer of {WIDTH} × {WIDTH}, Adam on all points "
        "at once.",
        colors=list(ADAPTERS),
    )


def regions(networks: Mapping[str, nn.Module], shown: Points) -> Drawable:
    """The class that each network gives to every place of the plane, with the points on top."""
    panels = []
    for label, model in networks.items():
        with torch.no_grad():
            right = (model(shown.x).argmax(dim=1) == shown.y).numpy()
            classes = model(_plane_grid()).argmax(dim=1).numpy()
        across, up = _cell_centers(_plane_grid())
        cells = pd.DataFrame({"x": across, "y": up, "class": classes})
        places = dict(zip("xy", _cell_centers(shown.x), strict=True))
        dots = pd.DataFrame(places | {"told": np.where(right, "told right", "told wrong")})
        heat = Heat("x", "y", "class", "class", limits=(0, CLASSES - 1))
        panels.append(
            Chart(
                cells,
                [heat, Point("x", "y", "told", data=dots)],
                title=f"{label}: {right.mean():.0%} right",
                x=Axis(label="x", order=np.unique(across)),
                y=Axis(label="y", order=np.unique(up)[::-1]),
                caption="The class given to each place of the plane, and the points that were trained on; one seed.",
                colors=("told right", "told wrong"),
            )
        )
    return set_side_by_side(*panels)


def _plane_grid() -> Float[Tensor, "places 2"]:
    ticks = torch.arange(-_REACH, _REACH + 1) * _CELL
    return torch.cartesian_prod(ticks, ticks)


def _cell_centers(x: Float[Tensor, "places 2"]) -> Float[np.ndarray, "2 places"]:
    """The middle of the cell that a place lies in; what lies outside is put on the edge."""
    return (x.numpy().T / _CELL).round().clip(-_REACH, _REACH) * _CELL


PROBE = register(
    Probe(
        name="expressiveness",
        title="FourierFT: what 128 parameters can say",
        source="Gao et al., FourierFT, arXiv 2405.03003, appendix C.2",
        question="Does a sparse spectrum say more than a product of two vectors that has as many parameters?",
        quick_budget=40,
        arms=lambda quick: [],
        judge=judge,
        measure_cost=20,
    )
)
