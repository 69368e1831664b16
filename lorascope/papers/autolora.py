"""AutoLoRA: learned ranks compared with noise.

Do learned ranks differ between layers and between tasks by more than noise, and do they improve accuracy? A threshold
at the mean turns any logits, including random ones, into ranks that differ between layers. With k = 8 components, it
keeps 4 on average for small random logits and 2.9 for standard normal ones. The controls are therefore random logits
and a second seed.

Source: AutoLoRA (arXiv 2403.09113), section 5.4 and figure 3 (ranks differ between layers, projections and tasks),
section 5.2 (accuracy).

Departs:

- A small encoder.
- Two tasks on the same sentences, sentiment and domain, instead of different datasets.
- A shorter search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lorascope import plots
from lorascope.charts.chart import Chart, Drawable, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Heat
from lorascope.pages.report_figure import ReportFigure, draw
from lorascope.papers.figures.gallery_figure import GalleryFigure, own_labels
from lorascope.papers.judging import registration
from lorascope.papers.judging.statistics import Accuracy, OfRun, Simulated, average
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.papers.rank_tables import (
    ALLOCATION,
    ORACLE,
    RANKS,
    UNIFORM_STUDENT,
    allocation_tables,
    keep_ranks,
    rank_agreement,
)
from lorascope.runs.run import Run
from lorascope.schema import module_table

ADAPTED, DOMAINS = "AutoLoRA", "AutoLoRA, search only, domains"
UNIFORM, RANDOM = "LoRA, rank 4, q and v", "LoRA, ranks from random logits, q and v"


def arms() -> list[Arm]:
    """Return the registered arms of the AutoLoRA paper: its search, also on domains; LoRA of rank 4 or random ranks."""
    from lorascope.methods import AutoLoRA, LoRA

    method = AutoLoRA(rank=8, alpha=16.0, selection_lr=1e-2, search_steps=100)
    lora, settings = LoRA(rank=4, alpha=16.0), encoder_settings()
    return [
        Arm(label=ADAPTED, method=method, settings=settings),
        # Its ranks come from the search, so one step of retraining is enough.
        Arm(label=DOMAINS, method=method, settings=encoder_settings(1), task="sentiment/domains"),
        Arm(label=UNIFORM, method=lora, settings=settings),
        Arm(label=RANDOM, method=lora, settings=settings, vary=_with_random_ranks),
    ]


def _with_random_ranks(arm: Arm, seed: int) -> Arm:
    """Return the arm with the ranks that small random logits give: on average half of 8 components."""
    from lorascope.inputs import models

    names = module_table.match(module_table.describe(models.load("minilm")), ("q", "v"))
    logits = np.random.default_rng(seed).standard_normal((len(names), 8))
    # The softmax of small logits is at least its mean where they are.
    ranks = (logits >= logits.mean(axis=1, keepdims=True)).sum(axis=1).tolist()
    method: Any = arm.method
    return replace(arm, method=replace(method, rank=dict(zip(names, ranks, strict=True))))


SEARCHED = "AutoLoRA, from rank 4"


def study_arms() -> list[Arm]:
    """Return the arms of AutoLoRA's pair; its search is scored like its retraining."""
    from lorascope.methods import AutoLoRA

    method = AutoLoRA(rank=4, alpha=16.0, targets="all-linear", selection_lr=1e-2)
    return planted_arms({SEARCHED: method}, ALLOCATION)


JUDGED = {"pair.autolora": pair(SEARCHED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(SEARCHED)


def spread(table: pd.DataFrame) -> float:
    """Compute, for a claim on AutoLoRA, the standard deviation of the final ranks over modules."""
    return float(table["value"].std(ddof=1))


CLAIMS = {
    # Deviation over 12 modules that keep the components with at least the mean of 8 logits, which are small and normal.
    "autolora.spread": (OfRun(spread, RANKS, ADAPTED), Simulated(0.8316, draws=1_000_000, error=0.0002)),
    "autolora.tasks": (average([rank_agreement(ADAPTED), rank_agreement(DOMAINS)]), rank_agreement(ADAPTED, DOMAINS)),
    "autolora.better": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
    "autolora.over_random": (Accuracy(ADAPTED), Accuracy(RANDOM)),
}


def figures(runs: Mapping[str, Run]) -> list[ReportFigure]:
    """Draw the figures of the AutoLoRA paper: the allocation, and the search."""
    label, run = ADAPTED, runs[ADAPTED]  # its parent is the search
    return [draw("rank_allocation", {label: run}), draw("importance", {label: run.parents[0]}, quantity="alpha")]


def _draw_ranks(runs: Mapping[str, Sequence[Any]]) -> Panels:
    """Plot the found ranks, and below them those of the authors' lists."""
    published = registration.FILE.parent / "published"
    ranks, chance = (pd.read_csv(published / f"autolora_{name}.csv") for name in ("ranks", "chance"))
    count = ranks["list"].nunique()
    cells = ranks.groupby(["projection", "layer"])["rank"].mean().rename("value").reset_index()
    # Within a list, because the mean over lists has less variation than any of them.
    deviation = ranks.groupby("list")["rank"].std().mean()
    measured = plots.rank_allocation(runs).charts()
    caption = (
        f"{measured[0].caption} Authors' lists: mean of {count} lists of RoBERTa-base with starting rank 8; standard "
        f"deviation of the ranks of one list: {deviation:.2f}, by random logits: {chance['expected_sd_of_24'][0]:.2f}."
    )
    authors = Chart(
        cells,
        [Heat("layer", "projection", "value", "rank", ".1f", limits=(0.0, float(cells["value"].max())))],
        title="authors' lists",
        x=Axis(label="layer", order=sorted(cells["layer"].unique())),
        y=Axis(order=["q", "v"]),
        caption=caption,
    )
    return stack_vertically(set_side_by_side(*(replace(chart, caption=caption) for chart in measured)), authors)


def _draw_selection(runs: Mapping[str, Sequence[Any]]) -> Drawable:
    return plots.importance({ADAPTED: [run.parents[0] for run in runs[ADAPTED]]}, quantity="alpha")


HEADING = "AutoLoRA"
FIGURES = [
    GalleryFigure(
        name="rank-by-task",
        alt="Ranks that AutoLoRA finds for two tasks, ranks from random logits, and those of the authors' lists",
        arms={"sentiment": ADAPTED, "domains": DOMAINS, "random logits": RANDOM},
        draw=_draw_ranks,
        quantities=("rank",),
    ),
    GalleryFigure(
        name="selection-weights",
        alt="Selection weights of retained and dropped components in AutoLoRA's search",
        arms=own_labels(ADAPTED),
        draw=_draw_selection,
        quantities=("alpha", "rank"),
    ),
]

PROBE = Probe(
    name="autolora",
    title="AutoLoRA: learned ranks compared with noise",
    source="Zhang et al., AutoLoRA, arXiv 2403.09113",
    question="Do ranks differ between layers more than random ones do, and between tasks more than between seeds?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (ADAPTED, DOMAINS)},
    figures=figures,
    notes=(
        "AutoLoRA has no rank budget: its total rank is a result. Even random logits keep about half of the initial "
        "rank if they are small, and less if they are large.",
    ),
)

PAPER = PaperStudy(
    name="AutoLoRA",
    authors="Zhang et al.",
    question="Do AutoLoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
