"""Figures of the study, in the order of the pages: a function of its results or of a kept table, and a row, each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.papers import adalora, alora, autolora, hydralora_factors, lisa, neft
from lorascope.papers.figures.first_edition import stored_figures
from lorascope.papers.figures.forest import forest
from lorascope.papers.figures.neuron_hits import neuron_hits
from lorascope.papers.figures.pair_gaps import pair_gaps
from lorascope.papers.figures.planted_allocations import planted_allocations
from lorascope.papers.figures.study_images import StudyFigure
from lorascope.papers.judging import beliefs, first_edition, kept_study, registered_study
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.words import NOT_RUN
from lorascope.papers.rank_tables import ALLOCATION

ALL_METHODS, ALLOCATORS = "Study", "Planted ranks"
"""Headings of figures that compare methods: all of them, and those that allocate ranks."""


class StudyData(NamedTuple):
    """Data of the figures: registration, kept runs, ``results.csv``, and estimates of the first edition."""

    registration: StudyRegistration
    evidence: StudyEvidence
    results: pd.DataFrame
    earlier: pd.DataFrame


class FigureRow(NamedTuple):
    """Name of an image, heading, what the figure shows, and the function that draws it, or None without runs."""

    name: str
    heading: str
    alt: str
    draw: Callable[[StudyData], Drawable | None]


def of_table(name: str, draw: Callable[[pd.DataFrame], Drawable]) -> Callable[[StudyData], Drawable | None]:
    """Return the function that draws a kept table of the judged runs, once it has rows."""

    def draw_table(data: StudyData) -> Drawable | None:
        runs, table = data.evidence.runs, data.evidence.tables.get(name, pd.DataFrame())
        if table.empty:
            return None
        return draw(table[table["run"].isin(runs.loc[runs["role"] == "judged", "run"])])

    return draw_table


def draw_forest(data: StudyData) -> Drawable | None:
    """Draw the forest plot, once there is an effect of a method."""
    if (data.results["word"] == NOT_RUN).all() and data.earlier.empty:
        return None
    return forest(data.results, data.registration, data.earlier)


def draw_pairs(data: StudyData) -> Drawable | None:
    """Draw the gaps of all pairs, once a pair has runs."""
    pairs = [claim for claim in data.registration.claims.values() if claim.id.startswith("pair.")]
    if not any(data.evidence.seeds(arm) for claim in pairs for arm in claim.for_arms):
        return None
    return pair_gaps(data.registration, data.evidence)


def draw_allocations(table: pd.DataFrame) -> Drawable:
    """Draw the final ranks of the allocators by planted rank."""
    labels = {"AdaLoRA": adalora.ALLOCATED, "AutoLoRA": autolora.SEARCHED, "ALoRA": alora.MOVED}
    return planted_allocations(table, {name: f"{arm}, {ALLOCATION[0]}" for name, arm in labels.items()}, 2.0)


def draw_hits(table: pd.DataFrame) -> Drawable:
    """Draw the hit rates of the neurons' scores."""
    return neuron_hits(table, neft.hit_rate, neft.AT_RANDOM.value)


ROWS = [
    FigureRow(
        "forest", ALL_METHODS, "Effects of the nine methods on text, and where the truth is known, with 95% intervals",
        draw_forest,
    ),
    FigureRow("pairs", ALL_METHODS, "Gap that every arm closes at both planted truths, one dot per seed", draw_pairs),
    FigureRow(
        "norms", "LISA", "Norms by layer of full fine-tuning, LoRA and LISA: weight, update, factors, learned factors",
        of_table("norms", lisa.norms_figure),
    ),
    FigureRow(
        "factors", "HydraLoRA", "A's and B's of LoRAs on several tasks by t-SNE, with separate and shared initial A's",
        of_table("nearest", hydralora_factors.factors_figure),
    ),
    FigureRow(
        "hits", "NeFT", "Changed neurons that each score finds, one dot per seed", of_table("neurons", draw_hits)
    ),
    FigureRow("allocations", ALLOCATORS, "Final rank by planted rank", of_table("ranks", draw_allocations)),
]  # fmt: skip


def read_figures(data: Path) -> dict[str, StudyFigure]:
    """Return the figures of both editions whose runs are kept by name, from a folder ``data``."""
    folder = data / "evidence-2"
    registration, evidence = registered_study.read(data / "registered-2.toml"), kept_study.read(folder)
    earlier = first_edition.text_estimates(data / "edition-1")
    contents = StudyData(registration, evidence, beliefs.read_results(folder), earlier)
    figures = {}
    for row in ROWS:
        if (chart := row.draw(contents)) is not None:
            figures[row.name] = StudyFigure(row.heading, row.alt, chart)
    return figures | stored_figures(data / "edition-1" / "figures")
