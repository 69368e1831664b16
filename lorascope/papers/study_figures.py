"""Figures of the study, in the order of the pages: a function of its results or of a kept table, and a row, each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lorascope.charts.chart import Drawable
from lorascope.papers import (
    adalora,
    alora,
    autolora,
    course_figures,
    direction_figures,
    hydralora_factors,
    lisa,
    neft,
    variant_figures,
)
from lorascope.papers.figures.first_edition import stored_figures
from lorascope.papers.figures.forest import forest
from lorascope.papers.figures.neuron_hits import neuron_hits
from lorascope.papers.figures.neuron_sensitivity import sensitivity_of_changed_neurons
from lorascope.papers.figures.pair_gaps import pair_effects, pair_gaps
from lorascope.papers.figures.pair_losses import pair_losses
from lorascope.papers.figures.planted_allocations import planted_allocations
from lorascope.papers.figures.study_images import StudyFigure
from lorascope.papers.judging import beliefs, first_edition, kept_study, registered_study
from lorascope.papers.judging.data_folder import PAPERS, STUDY_RUNS
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.words import NOT_RUN
from lorascope.papers.rank_tables import ALLOCATION
from lorascope.papers.variant_figures import VariantFigure

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


def of_tables(draw: Callable[..., Drawable | None], *names: str) -> Callable[[StudyData], Drawable | None]:
    """Return the function that draws kept tables, once all of them have rows."""

    def draw_tables(data: StudyData) -> Drawable | None:
        if not set(names).issubset(data.evidence.tables):
            return None
        return draw(*(data.evidence.tables[name] for name in names))

    return draw_tables


def draw_forest(data: StudyData) -> Drawable | None:
    """Draw the forest plot, once there is an effect of a method."""
    if (data.results["word"] == NOT_RUN).all() and data.earlier.empty:
        return None
    return forest(data.results, data.registration, data.earlier)


def of_pairs(draw: Callable[[StudyData], Drawable], method: str = "") -> Callable[[StudyData], Drawable | None]:
    """Return the function that draws all pairs with runs, or those of one paper."""

    def draw_pairs(data: StudyData) -> Drawable | None:
        # The figure has a panel for each claim of the registration; one without runs would be empty.
        pairs = {}
        for id, claim in data.registration.claims.items():
            is_shown = id.startswith("pair.") and claim.paper.arxiv == PAPERS.get(method, claim.paper.arxiv)
            if is_shown and all(map(data.evidence.seeds, (*claim.for_arms, *claim.against_arms))):
                pairs[id] = claim
        if not pairs:
            return None
        return draw(data._replace(registration=replace(data.registration, claims=pairs)))

    return draw_pairs


def draw_allocations(ranks: pd.DataFrame, scores: pd.DataFrame) -> Drawable | None:
    """Draw the final ranks and the scores of the allocators by planted rank, once one of them has runs."""
    students = {"AdaLoRA": adalora.ALLOCATED, "AutoLoRA": autolora.SEARCHED, "ALoRA": alora.MOVED}
    arms = {name: f"{student}, {ALLOCATION[0]}" for name, student in students.items()}
    if not ranks["arm"].isin(arms.values()).any():
        return None
    return planted_allocations(ranks, scores, arms, 2.0)


def draw_neuron_scores(neurons: pd.DataFrame) -> Drawable:
    """Draw the sensitivity of neurons, and the stability and the hit rates of their scores."""
    return sensitivity_of_changed_neurons(neurons, neuron_hits(neurons, neft.hit_rate, neft.AT_RANDOM.value))


ROWS = [
    FigureRow(
        "forest", ALL_METHODS, "Effects of the nine methods on text, and where the truth is known, with 95% intervals",
        draw_forest,
    ),
    FigureRow(
        "pairs", ALL_METHODS, "Effects in pairs of planted teachers, at both truths, with 95% intervals",
        of_pairs(lambda data: pair_effects(data.registration, data.results)),
    ),
    FigureRow(
        "losses", ALL_METHODS, "Training loss of pairs by step, compared with that of their controls",
        of_pairs(lambda data: pair_losses(data.registration, data.evidence)),
    ),
    FigureRow(
        "norms", "LISA", "Norm of the update by layer of full fine-tuning, LoRA and LISA",
        of_tables(lisa.norms_figure, "norms"),
    ),
    FigureRow(
        "factors", "HydraLoRA", "A's and B's of LoRAs on several tasks by t-SNE, with separate and shared initial A's",
        of_tables(hydralora_factors.factors_figure, "nearest"),
    ),
    FigureRow(
        "neuron-scores", "NeFT", "Sensitivity of changed neurons by block, stability and hit rate of neurons' scores",
        of_tables(draw_neuron_scores, "neurons"),
    ),
    # After the motives, with which the pages of three papers begin.
    FigureRow(
        "factor-norms", "LISA", "Norm of LoRA's factors by layer, as they are and learned",
        of_tables(lisa.factor_norms_figure, "norms"),
    ),
    *(
        FigureRow(
            f"pairs-{method.lower()}", method, f"Gap that every arm of {method}'s pairs closes, one dot per seed",
            of_pairs(lambda data: pair_gaps(data.registration, data.evidence, data.results), method),
        )
        for method in PAPERS
    ),
    FigureRow(
        "allocations", ALLOCATORS, "Final ranks and scores of three allocators by planted rank",
        of_tables(draw_allocations, "ranks", "scores"),
    ),
]  # fmt: skip
VARIANTS = variant_figures.STUDY_FIGURES | course_figures.STUDY_FIGURES | direction_figures.STUDY_FIGURES
"""Further figures of the papers, whose arms no claim reads."""


def read_data(data: Path) -> StudyData:
    """Read the data of the figures of the second edition from a folder ``data``."""
    folder, earlier = data / STUDY_RUNS, _bounded_estimates(data / "edition-1")
    registration, evidence = registered_study.read(data / "registered-2.toml"), kept_study.read(folder)
    return StudyData(registration, evidence, beliefs.read_results(folder), earlier)


def _bounded_estimates(folder: Path) -> pd.DataFrame:
    """Return the estimates of edition 1 on text with bounds, which are negative for a tolerance, and seeds."""
    estimates = first_edition.text_estimates(folder)
    claims, bounds = first_edition.read_claims(folder / "registered.toml"), []
    for id in estimates["claim"]:
        claim = claims[id]
        bound = {"superiority": 1.0, "non-inferiority": -1.0}[claim.kind] * claim.bound
        # The estimates are in points.
        bounds.append(100 * bound if claim.unit == "accuracy" else bound)
    return estimates.assign(bound=bounds, seeds=[claims[id].seeds for id in estimates["claim"]])


def draw_rows(contents: StudyData, rows: Iterable[FigureRow] = ROWS) -> dict[str, StudyFigure]:
    """Draw the figures that there are runs for, by name.

    Raises
    ------
    ValueError
        A figure cannot be drawn, because a table is damaged.
    """
    figures = {}
    for row in rows:
        try:
            chart = row.draw(contents)
        except (LookupError, TypeError, ValueError) as error:  # any table may be damaged
            raise ValueError(f"figures/{row.name}.png: cannot be drawn: {error!r}") from error
        if chart is not None:
            figures[row.name] = StudyFigure(row.heading, row.alt, chart)
    return figures


def variant_rows() -> list[FigureRow]:
    """Return the rows of the further figures of the papers."""
    rows = []
    for name, figure in VARIANTS.items():
        rows.append(FigureRow(name, figure.heading, figure.alt, partial(_draw_variant, figure)))
    return rows


def read_figures(data: Path) -> dict[str, StudyFigure]:
    """Return the figures of both editions whose runs are kept by name, from a folder ``data``."""
    figures = draw_rows(read_data(data), [*ROWS, *variant_rows()])
    return figures | stored_figures(data / "edition-1" / "figures")


def _draw_variant(figure: VariantFigure, data: StudyData) -> Drawable | None:
    return figure.draw(data.evidence)
