"""AdaLoRA: rank allocation by importance, and its motivation.

Do feed-forward modules and upper layers get more rank, do seeds and tasks agree on it, and does accuracy improve? The
motivation is tested with LoRA on one weight type or one group of layers at a time, with exactly equal parameters.

Source: AdaLoRA (arXiv 2303.10512), figure 1 (motivation), figure 3 and section 4.4 (rank allocation), table 1
(accuracy).

Departs:

- A small encoder instead of DeBERTaV3-base, and hundreds of training steps.
- Three groups of two layers; the paper does not state its groups.

The authors' parameter counts allow less rank in feed-forward modules than the text of the paper states. The claim may
therefore fail in the paper's setting as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pandas as pd

from lorascope import plots
from lorascope.analysis.baseline_ranks import equal_parameters
from lorascope.charts.chart import Chart
from lorascope.charts.marks import Axis, Line, Point
from lorascope.papers import alora
from lorascope.papers.figures.gallery_figure import GalleryFigure, accuracy_by_rank, own_labels, printed
from lorascope.papers.judging.statistics import Accuracy, Constant, OfPairs, OfRun, average
from lorascope.papers.judging.study_statistics import pair
from lorascope.papers.lora import LORA_RATES, LOW, LOWER
from lorascope.papers.paper_study import PaperStudy
from lorascope.papers.planted_pairs import Student, planted_arms
from lorascope.papers.probe import Arm, Probe, encoder_settings
from lorascope.papers.rank_tables import (
    ALLOCATION,
    FEED_FORWARD,
    ORACLE,
    RANKS,
    UNIFORM_STUDENT,
    allocation_figures,
    allocation_tables,
    keep_ranks,
    of_roles,
    rank_agreement,
    residual_tau,
    top_fraction,
)
from lorascope.plots.builders import add_printed
from lorascope.plots.run_groups import gather
from lorascope.schema import module_table

ADAPTED = "AdaLoRA, from rank 12 to 8"
DOMAINS, UNIFORM = f"{ADAPTED}, domains", "AdaLoRA, from rank 8 to 8"
FREE, RAW = f"{ADAPTED}, no penalty", f"{ADAPTED}, sensitivity only"
ATTENTION_TYPES, FEED_FORWARD_TYPES = ("W_q", "W_k", "W_v", "W_o"), ("W_f1", "W_f2")
BOTTOM, TOP = "layers 0, 1", "layers 4, 5"

# Only figures show these.
SMALLER = {1: "AdaLoRA, from rank 2 to 1", 2: "AdaLoRA, from rank 4 to 2", 4: "AdaLoRA, from rank 6 to 4"}


def arms() -> list[Arm]:
    """Return the registered arms of the AdaLoRA paper: on sentiment, on its domains, and with rank 8 throughout.

    Smaller budgets, and AdaLoRA without one of its parts, are for figures.
    """
    from lorascope.methods import AdaLoRA

    adapted = AdaLoRA(init_rank=12, target_rank=8)
    # The scale is alpha / init_rank, the same for all.
    uniform = replace(adapted, init_rank=8, alpha=adapted.alpha * 8 / 12)
    smaller = {}
    for (target, label), init in zip(SMALLER.items(), (2, 4, 6), strict=True):  # the paper's initial ranks
        smaller[label] = replace(adapted, init_rank=init, target_rank=target, alpha=adapted.alpha * init / 12)
    settings = encoder_settings()
    return [
        Arm(label=ADAPTED, method=adapted, settings=settings),
        Arm(label=DOMAINS, method=adapted, settings=settings, task="sentiment/domains"),
        Arm(label=UNIFORM, method=uniform, settings=settings),
        Arm(label=FREE, method=replace(adapted, gamma=0.0), settings=settings),
        Arm(label=RAW, method=replace(adapted, importance="sensitivity"), settings=settings),
        *(Arm(label=label, method=method, settings=settings) for label, method in smaller.items()),
    ]


ALLOCATED = "AdaLoRA, rank 4 to 2"


def study_arms() -> list[Arm]:
    """Return the arms of AdaLoRA's pair, and those with which all allocators are compared.

    AdaLoRA from rank 2 to 2 has its form and penalty, but no allocation; LoRA of rank 6 has more rank than it starts
    with.
    """
    from lorascope.methods import AdaLoRA, LoRA
    from lorascope.papers.setups.planted_truths import uneven_ranks

    everywhere: Any = {"targets": "all-linear"}
    allocated = AdaLoRA(init_rank=4, target_rank=2, alpha=64.0, **everywhere)
    students = {
        ALLOCATED: allocated,
        "AdaLoRA, rank 2 to 2": replace(allocated, init_rank=2, alpha=32.0),
        UNIFORM_STUDENT: LoRA(rank=2, alpha=8.0, **everywhere),
        "LoRA, rank 6": LoRA(rank=6, alpha=24.0, **everywhere),
    }
    # With one alpha, a component of a module with few has the larger scale, as in AutoLoRA's retraining.
    oracle = Student(lambda base, seed: LoRA(rank=uneven_ranks(base, seed), alpha=16.0))
    return planted_arms(students, ALLOCATION) + planted_arms({ORACLE: oracle}, ALLOCATION[:1])


JUDGED = {"pair.adalora": pair(ALLOCATED, UNIFORM_STUDENT, ORACLE, truths=ALLOCATION)}
KEPT_TABLES = allocation_tables(ALLOCATED)


TYPES = {"W_q": "q", "W_k": "k", "W_v": "v", "W_o": "o", "W_f1": "ffn_in", "W_f2": "ffn_out"}
MIDDLE = "layers 2, 3"
GROUPS = {BOTTOM: (0, 1), MIDDLE: (2, 3), TOP: (4, 5)}


@cache
def _minilm_modules() -> pd.DataFrame:
    from lorascope.inputs import models

    return module_table.describe(models.load("minilm"))


def targets() -> dict[str, tuple[str, ...]]:
    """Return the targets of arms on AdaLoRA's motivation: one role in all layers, or all six roles in two layers."""
    modules = _minilm_modules()
    linear = modules[modules["role"].isin(list(TYPES.values()))]
    by_type = {label: (role,) for label, role in TYPES.items()}
    return by_type | {label: tuple(linear["module"][linear["layer"].isin(group)]) for label, group in GROUPS.items()}


def placement_arms() -> list[Arm]:
    """Return the registered arms on AdaLoRA's motivation: LoRA on the eight targets of claims, of equal parameters."""
    from lorascope.methods import LoRA

    by_label = targets()
    ranks = equal_parameters(_minilm_modules(), by_label)
    del by_label[MIDDLE]  # which only decides the ranks
    return [
        Arm(
            label=label,
            method=LoRA(rank=ranks[label], alpha=float(ranks[label]), targets=modules),  # the same scale for all
            settings=encoder_settings(),
        )
        for label, modules in by_label.items()
    ]


# Feed-forward modules are two of six roles and the top third has two of six layers, so ranks that do not depend on the
# module give a third to either.
CLAIMS = {
    "placement.ffn": (average(map(Accuracy, FEED_FORWARD_TYPES)), average(map(Accuracy, ATTENTION_TYPES))),
    "placement.upper": (Accuracy(TOP), Accuracy(BOTTOM)),
    "adalora.ffn": (of_roles(ADAPTED, *FEED_FORWARD), Constant(1 / 3)),
    "adalora.top": (OfRun(top_fraction, RANKS, ADAPTED), Constant(1 / 3)),
    "adalora.stable": (rank_agreement(ADAPTED), Constant(0.0)),
    "adalora.beyond": (OfPairs(residual_tau, RANKS, ADAPTED, ADAPTED), Constant(0.0)),
    "adalora.task": (average([rank_agreement(ADAPTED), rank_agreement(DOMAINS)]), rank_agreement(ADAPTED, DOMAINS)),
    "adalora.better": (Accuracy(ADAPTED), Accuracy(LOW)),
    "adalora.allocation": (Accuracy(ADAPTED), Accuracy(UNIFORM)),
}


_BUDGETS = {**SMALLER, 8: ADAPTED}
_UNIFORM = {**LOWER, 4: alora.UNIFORM, 8: LOW}
_ADAPTED = own_labels(ADAPTED)
_by_place = partial(plots.adapted_types, start=0.5)  # the chance level


def _draw_accuracy(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="AdaLoRA", table="Table 1", data="SST-2")
    numbers = numbers.assign(recipe=numbers["method"].map({"AdaLoRA, budget 576": "AdaLoRA", LOW: LOW}))
    numbers = numbers.dropna(subset="recipe").assign(source="printed")
    chart = replace(plots.ablations(runs, start=0.5), title="AdaLoRA compared with uniform ranks")
    return add_printed(chart, numbers, "recipe", "AdaLoRA, table 1, SST-2")


def _draw_budgets(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="AdaLoRA", table="Table 5", data="SST-2")
    numbers = numbers[numbers["method"].isin(["AdaLoRA", "LoRA"])]
    numbers = numbers.assign(rank=numbers["size"].map({"0.08 %": 1, "0.16 %": 2, "0.32 %": 4, "0.65 %": 8}))
    ranks = {label: rank for rank, label in (*_BUDGETS.items(), *_UNIFORM.items())}
    rates = f"All budgets of AdaLoRA have one learning rate. {LORA_RATES}"
    chart = accuracy_by_rank(runs, ranks, "Accuracy by budget", rates)
    return add_printed(chart, numbers, "rank", "AdaLoRA, table 5, SST-2, budgets as percentages of parameters")


def _draw_parts(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = pd.concat(printed(paper="AdaLoRA", table=table, data="SST-2") for table in ("Table 4", "Table 5"))
    names = {"AdaLoRA": "AdaLoRA", "without the penalty": "no penalty", "sensitivity": "sensitivity only"}
    variants = numbers["method"].str.extract("(^AdaLoRA$|without the penalty|sensitivity)")[0]
    numbers = numbers.assign(recipe=variants.map(names), source="printed")
    # AdaLoRA itself is in both tables.
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
        "the sensitivity only trains with the penalty. It is recorded from the first selection on, so the warm-up is "
        f"missing, and the records of AdaLoRA with its own scores were not kept. {cohort.sample_sentence}",
    )


def _draw_types(runs: Mapping[str, Sequence[Any]]) -> Chart:
    numbers = printed(paper="LoRA", table="Table 5", data="MNLI-m")
    numbers = numbers.assign(recipe=numbers["method"].str.removesuffix(", rank 8"), source="printed")
    return add_printed(_by_place(runs), numbers[numbers["recipe"].isin(list(runs))], "recipe", "LoRA, table 5, MNLI-m")


HEADING = "AdaLoRA"
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
        arms={"sentiment": ADAPTED, "domains": DOMAINS},
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
        arms={"AdaLoRA": ADAPTED, "AdaLoRA, uniform ranks": UNIFORM, LOW: LOW},
        draw=_draw_accuracy,
    ),
    GalleryFigure(
        name="budgets",
        alt="Accuracy of AdaLoRA and LoRA by budget, and printed numbers",
        arms=own_labels(*_BUDGETS.values(), *_UNIFORM.values()),
        draw=_draw_budgets,
    ),
    GalleryFigure(
        name="left-out-adalora",
        alt="Accuracy of AdaLoRA without its penalty, and with the sensitivity only, and printed numbers",
        arms={"AdaLoRA": ADAPTED, "no penalty": FREE, "sensitivity only": RAW},
        draw=_draw_parts,
    ),
    GalleryFigure(
        name="penalty",
        alt="Orthogonality penalty of two variants of AdaLoRA over the steps, with and without its gradient",
        arms={"sensitivity only": RAW, "no penalty": FREE},
        draw=_draw_penalty,
        seeds=3,
        quantities=("penalty",),
    ),
    GalleryFigure(
        name="adapted-types",
        alt="Accuracy of LoRA on one type of weight at a time, with equal parameters, and printed numbers",
        arms=own_labels(*ATTENTION_TYPES, *FEED_FORWARD_TYPES),
        draw=_draw_types,
    ),
    GalleryFigure(
        name="adapted-layers",
        alt="Accuracy of LoRA on the first two and on the last two layers, with equal parameters",
        arms=own_labels(BOTTOM, TOP),
        draw=_by_place,
    ),
]

PROBE = Probe(
    name="adalora",
    title="AdaLoRA: rank allocation by importance",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Do feed-forward modules and upper layers get more rank for every seed, and does accuracy improve?",
    arms=arms,
    keep={(RANKS, label): keep_ranks for label in (ADAPTED, DOMAINS)},
    figures=partial(allocation_figures, label=ADAPTED),
)

PLACEMENT = Probe(
    name="placement",
    title="AdaLoRA's motivation: equal parameters in different modules",
    source="Zhang et al., AdaLoRA, arXiv 2303.10512",
    question="Does accuracy depend on which weight type or which layers are adapted, at equal parameters?",
    arms=placement_arms,
)

PAPER = PaperStudy(
    name="AdaLoRA",
    authors="Zhang et al.",
    question="Do AdaLoRA's ranks beat uniform ones where modules need different ranks?",
)
run = PAPER.run
