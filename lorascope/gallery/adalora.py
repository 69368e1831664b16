"""Figures of AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Line, Point
from lorascope.evidence.statistics import adalora as statistics
from lorascope.evidence.statistics import alora
from lorascope.evidence.statistics.lora import LOW, LOWER
from lorascope.gallery.base import GalleryFigure, accuracy_by_rank, own_labels
from lorascope.gallery.lora import LORA_RATES
from lorascope.gallery.printed_numbers import printed
from lorascope.plots.builders import add_printed
from lorascope.plots.run_groups import gather

HEADING = "AdaLoRA"


def _draw_accuracy(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="AdaLoRA", table="Table 1", data="SST-2")
    numbers = numbers.assign(recipe=numbers["method"].map({"AdaLoRA, budget 576": "AdaLoRA", LOW: LOW}))
    numbers = numbers.dropna(subset="recipe").assign(source="printed")
    chart = replace(plots.ablations(runs, start=0.5), title="AdaLoRA compared with uniform ranks")
    return add_printed(chart, numbers, "recipe", "AdaLoRA, table 1, SST-2")


def _draw_parts(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = pd.concat(printed(paper="AdaLoRA", table=table, data="SST-2") for table in ("Table 4", "Table 5"))
    names = {"AdaLoRA": "AdaLoRA", "without the penalty": "no penalty", "sensitivity": "sensitivity only"}
    found = numbers["method"].str.extract("(^AdaLoRA$|without the penalty|sensitivity)")[0]
    numbers = numbers.assign(recipe=found.map(names), source="printed")
    numbers = numbers[numbers["size"] == "0.65 %"].dropna(subset="recipe").drop_duplicates("recipe")
    # Seeds instead of a mean: without the penalty, some fail and others do not.
    cohort = gather("accuracy", runs)
    chart = Chart(
        cohort.scores().assign(source="measured, one dot per seed"),
        [Point("recipe", "value", "source")],
        title="AdaLoRA without one of its parts",
        x=Axis(order=cohort.labels),
        y=Axis(label=cohort.metric),
        caption=f"{cohort.sample_sentence} All have the learning rate that was tuned for AdaLoRA.",
    )
    return add_printed(chart, numbers, "recipe", "AdaLoRA, tables 4 and 5, SST-2, 0.65% of the parameters")


def _draw_penalty(runs: Mapping[str, Sequence[Any]]) -> Chart:
    cohort = gather("penalty", runs)
    seeds = {run.id: f"seed {run.meta.seed}" for run in cohort.runs}
    penalties = cohort.select("penalty").reset_index(drop=True)
    return Chart(
        penalties.assign(seed=penalties["run"].astype("str").map(seeds)),
        [Line("step", "value", "recipe", "seed")],
        title="Distance of P and Q from orthogonality",
        x=Axis(label="step"),
        y=Axis(label="penalty", log=True),
        caption="Mean of the Frobenius norms of PᵀP − I and QQᵀ − I over all P and Q (Eq. 4). The variant scored by "
        f"the sensitivity only trains with the penalty. {cohort.sample_sentence}",
    )


def _draw_types(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 5", data="MNLI-m")
    numbers = numbers.assign(recipe=numbers["method"].str.removesuffix(", rank 8"), source="printed")
    return add_printed(_by_place(runs), numbers[numbers["recipe"].isin(list(runs))], "recipe", "LoRA, table 5, MNLI-m")


def _draw_budgets(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="AdaLoRA", table="Table 5", data="SST-2")
    numbers = numbers[numbers["method"].isin(["AdaLoRA", "LoRA"])]
    numbers = numbers.assign(rank=numbers["size"].map({"0.08 %": 1, "0.16 %": 2, "0.32 %": 4, "0.65 %": 8}))
    ranks = {label: rank for arms in (_BUDGETS, _UNIFORM) for rank, label in arms.items()}
    rates = f"All budgets of AdaLoRA have one learning rate. {LORA_RATES}"
    chart = accuracy_by_rank(runs, ranks, "Accuracy by budget", rates)
    return add_printed(chart, numbers, "rank", "AdaLoRA, table 5, SST-2, budgets as percentages of parameters")


_BUDGETS = {**statistics.SMALLER, 8: statistics.ADAPTED}
_UNIFORM = {**LOWER, 4: alora.UNIFORM, 8: LOW}
_ADAPTED = own_labels(statistics.ADAPTED)
_by_place = partial(plots.adapted_types, start=0.5)  # the chance level

FIGURES = [
    GalleryFigure(
        name="rank-allocation",
        alt="Final ranks of AdaLoRA by layer and role, and a random allocation of the same budget",
        arms=_ADAPTED,
        draw=partial(plots.rank_allocation, chance=True),
        quantities=("rank",),
    ),
    GalleryFigure(
        name="rank-domains",
        alt="Final ranks of AdaLoRA on sentiment and on its domains",
        arms={"sentiment": statistics.ADAPTED, "domains": statistics.DOMAINS},
        draw=plots.rank_allocation,
        quantities=("rank",),
    ),
    GalleryFigure(
        name="rank-replay",
        alt="Ranks of AdaLoRA over the steps, next to the budget",
        arms=_ADAPTED,
        draw=plots.rank_replay,
        seeds=1,
        quantities=("rank", "budget"),
    ),
    GalleryFigure(
        name="importance",
        alt="Importance of retained and dropped components over the steps",
        arms=_ADAPTED,
        draw=plots.importance,
        quantities=("importance", "rank"),
    ),
    GalleryFigure(
        name="accuracy-adalora",
        alt="Accuracy of AdaLoRA, of its parametrization with uniform ranks, of LoRA, and printed numbers",
        arms={"AdaLoRA": statistics.ADAPTED, "AdaLoRA, uniform ranks": statistics.UNIFORM, LOW: LOW},
        draw=_draw_accuracy,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="budgets",
        alt="Accuracy of AdaLoRA and LoRA by budget, and printed numbers",
        arms=own_labels(*_BUDGETS.values(), *_UNIFORM.values()),
        draw=_draw_budgets,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="left-out-adalora",
        alt="Accuracy of AdaLoRA without its penalty, and with the sensitivity only, and printed numbers",
        arms={"AdaLoRA": statistics.ADAPTED, "no penalty": statistics.FREE, "sensitivity only": statistics.RAW},
        draw=_draw_parts,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="penalty",
        alt="Orthogonality penalty of two variants of AdaLoRA over the steps, with and without its gradient",
        arms={"sensitivity only": statistics.RAW, "no penalty": statistics.FREE},
        draw=_draw_penalty,
        seeds=3,
        quantities=("penalty",),
    ),
    GalleryFigure(
        name="adapted-types",
        alt="Accuracy of LoRA on one type of weight at a time, with equal parameters, and printed numbers",
        arms=own_labels(*statistics.ATTENTION_TYPES, *statistics.FEED_FORWARD_TYPES),
        draw=_draw_types,
        seeds=None,
        scores_only=True,
    ),
    GalleryFigure(
        name="adapted-layers",
        alt="Accuracy of LoRA on the first two and on the last two layers, with equal parameters",
        arms=own_labels(statistics.BOTTOM, statistics.TOP),
        draw=_by_place,
        seeds=None,
        scores_only=True,
    ),
]
