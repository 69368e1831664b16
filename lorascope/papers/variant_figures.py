"""Figures of the papers by variant or number, from arms that no claim reads: one function of the kept runs each.

Students of planted teachers replace the papers' models, so quantities and axes equal the paper's, and levels do not.
Numbers that a paper prints are in a separate panel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.geometry import drawn_number
from lorascope.charts.marks import Axis, Line, Point, Rule
from lorascope.papers import adalora, alora, autolora, fourierft, hydralora, neft, variants
from lorascope.papers.figures.study_marks import GAP
from lorascope.papers.figures.variant_gaps import (
    CLOSED,
    GROUND,
    beside_differences,
    beside_printed,
    common_seeds,
    describe_differences,
    describe_seen,
    gaps_by_number,
    gaps_by_variant,
    number_above,
    numbered,
    paired_gaps,
    printed,
    printed_by_fraction,
    printed_curves,
    sort_rows,
    variant_gap_table,
    write_missing,
)
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.rank_tables import ORACLE, UNIFORM_STUDENT
from lorascope.plots.builders import dots, ticks_at
from lorascope.plots.run_groups import INTERVAL

UNEVEN, EVEN = truth_names.UNEVEN, truth_names.RANK_2
SHARED_A, ONE_UPDATE = truth_names.SHARED_A, truth_names.ONE_UPDATE
FULL = neft.FULL
_SHARED_SIZE = 192
"""Parameters per matrix that suffice for either of FourierFT's truths."""
_NEURONS = 1152  # of the decoder


class VariantFigure(NamedTuple):
    """Heading of a figure, what it shows, and ``draw(evidence)``, which returns None if an arm has no runs."""

    heading: str
    alt: str
    draw: Callable[[StudyEvidence], Drawable | None]


def of_truth(truth: str, *names: str, **by_name: str) -> dict[str, str]:
    """Return arms that learn one truth by their names in a figure; keywords give them another name."""
    arms = dict(zip(names, names, strict=True)) | by_name
    return {name: f"{arm}, {truth}" for name, arm in arms.items()}


def draw_budgets(evidence: StudyEvidence) -> Drawable | None:
    """Draw ALoRA's figure 2: ALoRA and LoRA by budget, and their difference."""
    series = {name: numbered(f"{name}, rank {{}}, {UNEVEN}", variants.BUDGETS) for name in ("ALoRA", "LoRA")}
    chart = gaps_by_number(
        evidence,
        series,
        "budget: ranks per module",
        "ALoRA and LoRA by budget",
        "Modules need ranks of 0, 1, 3 and 4. Left, dashed line: LoRA with the planted ranks, 2 per module. The "
        "paper finds ALoRA above LoRA at every budget",
        # A label would cover bars, as in the figure of experts.
        {"": f"{ORACLE}, {UNEVEN}"},
    )
    if chart is None:
        return None
    above = number_above(chart.data, "ALoRA", "LoRA")
    paired = paired_gaps(
        evidence, {n: (arm, series["LoRA"][n]) for n, arm in series["ALoRA"].items()}, ("ALoRA", "LoRA")
    )
    caption = f"{chart.caption}; here its mean is at {above}."
    return set_side_by_side(
        replace(chart, title="By budget (dashed: planted ranks)", caption=caption),
        replace(paired, x=chart.x),
        title=f"ALoRA closes, against LoRA, {describe_seen(paired, 'budget')} (paper: more at every budget)",
    )


def draw_alora_scores(evidence: StudyEvidence) -> Drawable | None:
    """Draw ALoRA's table 6: its scores and others."""
    arms = {
        "ALoRA": f"{alora.MOVED}, {UNEVEN}",
        "sensitivity": f"{alora.MOVED}, sensitivity, {UNEVEN}",
        "random scores": f"{alora.MOVED}, random scores, {UNEVEN}",
        "LoRA, no rounds": f"{UNIFORM_STUDENT}, {UNEVEN}",
        "planted ranks": f"{ORACLE}, {UNEVEN}",
    }
    names = {"ALoRA": "ALoRA", "ALoRA, sensitivity score": "sensitivity", "ALoRA, gates learnt (DNAS)": "learned gates"}
    numbers = printed("ALoRA", "Table 6", names)
    # The table of scores does not repeat LoRA.
    numbers = pd.concat([numbers, printed("ALoRA", "Table 1", {"LoRA": "LoRA, no rounds"})])
    numbers = numbers[numbers["data"].isin(["BoolQ", "ReCoRD", "SQuAD"])]
    title = (
        "Random scores close {random scores} than ALoRA's, LoRA without rounds {LoRA, no rounds}, and the planted "
        "ranks {planted ranks}"
    )
    caption = "Modules need ranks of 0, 1, 3 and 4. A score helps only if it is above random scores."
    texts = title, "ALoRA by score", caption
    return beside_printed(evidence, arms, texts, (numbers, "Printed, ALoRA's tables 6 and 1"))


def draw_heterogeneity(evidence: StudyEvidence) -> Drawable | None:
    """Draw HydraLoRA's figure 2: full fine-tuning and LoRA by heterogeneity of the tasks."""
    truths = {"one update": ONE_UPDATE, "shared A": SHARED_A, "unrelated": truth_names.UNRELATED}
    names = {"full fine-tuning": FULL, "HydraLoRA": hydralora.EXPERTS, "LoRA": hydralora.EQUAL}
    tables = []
    for updates, truth in truths.items():
        tables.append(variant_gap_table(evidence, of_truth(truth, **names)).assign(updates=updates))
    table = pd.concat(tables, ignore_index=True)
    if table["updates"].nunique() < len(truths):
        return None
    means = table.groupby(["updates", "name"], sort=False)["value"].mean().reset_index()
    pairs = {updates: (f"{FULL}, {truth}", f"{hydralora.EQUAL}, {truth}") for updates, truth in truths.items()}
    paired = paired_gaps(evidence, pairs, ("full fine-tuning", "LoRA"))
    words = describe_differences(paired, "number")
    x = Axis(label="updates of the tasks", order=truths)
    chart = Chart(
        table,
        [Line("updates", "value", "name", data=means), Point("updates", "value", "name")],
        title="By heterogeneity",
        x=x,
        y=Axis(label=CLOSED),
        caption=f"{GROUND}, one dot per seed; four tasks. {GAP} LoRA of rank 12 and HydraLoRA have equal size. Right: "
        f"bars are a {INTERVAL}. The paper's drawing has no numbers; its gap between full fine-tuning and LoRA "
        "increases to the right.",
        colors=names,
    )
    title = (
        f"Full fine-tuning closes {words['one update']} than LoRA with one update for all tasks, {words['shared A']} "
        f"if tasks share A, {words['unrelated']} if unrelated"
    )
    return set_side_by_side(chart, replace(paired, x=x), title=title)


def draw_hydralora_parts(evidence: StudyEvidence) -> Drawable | None:
    """Draw HydraLoRA's figure 6: the method without each of its parts."""
    arms = {
        "HydraLoRA": f"{hydralora.EXPERTS}, {SHARED_A}",
        "separate A's": f"{hydralora.SEPARATE[3]}, {SHARED_A}",
        "uniform gates": f"{hydralora.EXPERTS}, uniform gates, {SHARED_A}",
        "LoRA": f"{hydralora.EQUAL}, {SHARED_A}",
    }
    names = {
        "HydraLoRA": "HydraLoRA",
        "separate A's (LoRA-Split)": "separate A's",
        "even gates": "uniform gates",
        "without mixture (LoRA, rank 8)": "LoRA",
    }
    caption = "Four tasks whose updates share A; all have about the same number of parameters."
    title = (
        "HydraLoRA closes {uniform gates} with uniform gates, and {separate A's} with separate A's; one LoRA closes "
        "{LoRA}"
    )
    numbers = printed("HydraLoRA", "Figure 6", names), "Printed, HydraLoRA's figure 6"
    return beside_printed(evidence, arms, (title, "HydraLoRA without its parts", caption), numbers)


def draw_experts(evidence: StudyEvidence) -> Drawable | None:
    """Draw HydraLoRA's figure 8: number of experts."""
    series = {}
    for truth in (SHARED_A, ONE_UPDATE):
        series[truth] = {number: f"{variants.experts_of_rank_4(number)}, {truth}" for number in variants.EXPERTS}
    chart = gaps_by_number(
        evidence,
        series,
        "number of experts of rank 4",
        "HydraLoRA by number of experts",
        "Four tasks, with different updates that share A, or with one update, where experts help only by their "
        "parameters. Left, dashed line: LoRA of rank 12 if tasks share A, which has as many parameters as 4 experts. "
        "Right: paired by seed. The paper finds 4 experts best, and 3 lower by 0.42%.",
        {"": f"{hydralora.EQUAL}, {SHARED_A}"},
    )
    if chart is None:
        return None
    words, tables = {}, []
    for truth, (first, *further) in zip(series, map(dict.values, series.values()), strict=True):
        pairs = {number: (arm, first) for number, arm in zip(variants.EXPERTS[1:], further, strict=True)}
        paired = paired_gaps(evidence, pairs, ("HydraLoRA", "1 expert"))
        words[truth] = describe_differences(paired, "number")[variants.EXPERTS[-1]]
        tables.append(paired.data.assign(recipe=truth))
    cells = pd.concat(tables, ignore_index=True)
    title = (
        f"{variants.EXPERTS[-1]} experts of rank 4 close {words[SHARED_A]} than 1 if tasks share A, "
        f"{words[ONE_UPDATE]} with one update for all tasks"
    )
    more = replace(
        paired, data=cells, marks=[Rule(y=0), *dots(cells, "number", color="recipe")], x=chart.x, colors=chart.colors
    )
    return set_side_by_side(replace(chart, title="By number (dashed: LoRA of rank 12)"), more, title=title)


def draw_splits(evidence: StudyEvidence) -> Drawable | None:
    """Draw HydraLoRA's table 1: one LoRA, and several with the same total rank."""
    # The first arm, with which others are compared, has the total rank of the split ones.
    arms = numbered(f"LoRA, rank {{}}, {SHARED_A}", (16, 8, 4), "1 of rank {}") | {
        "2 of rank 8": f"HydraLoRA, 2 separate A's of rank 8, {SHARED_A}",
        "4 of rank 4": f"{hydralora.SEPARATE[4]}, {SHARED_A}",
        "8 of rank 2": f"HydraLoRA, 8 separate A's of rank 2, {SHARED_A}",
    }
    names = {"LoRA, rank 8": "1 of rank 4", "LoRA, rank 16": "1 of rank 8", "LoRA, rank 32": "1 of rank 16"}
    for number in (2, 4, 8):
        names[f"LoRA-Split, {number} of rank {32 // number}"] = f"{number} of rank {16 // number}"
    caption = (
        "Four tasks whose updates share A. Except for 1 of ranks 4 and 8, rows have a total rank of 16; several LoRAs "
        "have routers. Printed ranks are twice as large as the labels."
    )
    title = (
        "8 LoRAs of rank 2 close {8 of rank 2} than one of rank 16, and 2 of rank 8 close {2 of rank 8} (best printed: "
        "{printed})"
    )
    numbers = printed("HydraLoRA", "Table 1", names), "Printed, HydraLoRA's table 1"
    return beside_printed(evidence, arms, (title, "LoRAs by rank and number", caption), numbers)


def draw_searches(evidence: StudyEvidence) -> Drawable | None:
    """Draw AutoLoRA's table 4, its ablations, with the mean rank that each search finds."""
    searches = dict(zip(("first order (η = 0)", "sigmoid", "no constraint"), variants.SEARCHES, strict=True))
    arms = {"AutoLoRA": f"{autolora.SEARCHED}, {UNEVEN}"} | of_truth(UNEVEN, **searches)
    searched = list(arms.values())  # the others do not search
    arms |= {
        "ranks from random logits": f"LoRA, ranks from random logits, {UNEVEN}",
        "LoRA of rank 2": f"{UNIFORM_STUDENT}, {UNEVEN}",
        "planted ranks": f"{ORACLE}, {UNEVEN}",
    }
    caption = (
        "Modules need ranks of 0, 1, 3 and 4. Retraining with the ranks that each search finds; right: their mean. "
        "AutoLoRA weights components by a softmax; sigmoid and no constraint replace it. First order has no "
        "look-ahead step in their gradient. The paper prints only the order: AutoLoRA is best."
    )
    chart = gaps_by_variant(evidence, arms, "AutoLoRA and its ablations", caption)
    if chart is None:
        return None
    rows, ranks_found = [], list[list[float]]()
    for name, arm in zip(arms, searched, strict=False):
        ranks_found.append([])
        for seed in common_seeds(evidence, searched, "ranks"):
            ranks_found[-1] += evidence.table("ranks", arm, seed).sort_values("module")["rank"].tolist()
            rows.append((name, evidence.table("ranks", arm, seed)["rank"].mean()))
    # Otherwise, equal rows would look like an error.
    if ranks_found[0] == ranks_found[1]:
        chart = replace(chart, caption=f"{chart.caption} First order finds the same ranks as AutoLoRA.")
    ranks = pd.DataFrame(rows, columns=["name", "value"])
    panel = replace(
        chart,
        data=ranks,
        marks=[Point("value", "name"), *write_missing(arms, ranks["name"], ranks["value"], "no search")],
        title="Ranks that the search finds",
        x=Axis(label="ranks per module"),
    )
    chart, paired = beside_differences(chart, evidence, arms)
    differences = describe_differences(paired)
    title = (
        f"Rank 2 everywhere closes {differences['LoRA of rank 2']} than the ranks that AutoLoRA finds, random ranks "
        f"{differences['ranks from random logits']}, the planted ranks {differences['planted ranks']}"
    )
    return set_side_by_side(chart, paired, replace(panel, y=chart.y, caption=chart.caption), title=title)


def draw_placements(evidence: StudyEvidence) -> Drawable | None:
    """Draw AdaLoRA's figure 1: one type of weight, or one block, with equal parameters."""
    # Both panels begin with the same row, because their limits differ.
    reference = {"everywhere, rank 2": f"{UNIFORM_STUDENT}, {EVEN}"}
    types = numbered(f"LoRA, {{}} only, {EVEN}", variants.TYPES.values(), "W_{}")
    blocks = numbered(f"LoRA, block {{}} only, {EVEN}", range(4), "block {}")
    caption = (
        "LoRA with as many parameters in one type of weight (left), in one block (right), or everywhere; "
        "feed-forward types have 3% fewer. The teacher changes all modules at rank 2. AdaLoRA's figure 1 has no "
        "readable values, only the order."
    )
    left = gaps_by_variant(evidence, reference | types, "In one type of weight", caption)
    right = gaps_by_variant(evidence, reference | blocks, "In one block", caption)
    if left is None or right is None:
        return None
    best = []
    for chart in (left, right):
        # The reference is in no single place.
        means = chart.data.groupby("name")["value"].mean().drop([*reference])
        best.append(f"{means.max():.0f} ({means.idxmax()})")
    everywhere = left.data.loc[left.data["name"].isin(reference), "value"].mean()
    title = (
        f"LoRA everywhere closes {everywhere:.0f} points, in one type of weight at most {best[0]}, in one block at "
        f"most {best[1]}; best printed: feed-forward types, upper layers"
    )
    return set_side_by_side(*map(sort_rows, (left, replace(right, caption=left.caption))), title=title)


def draw_matrices(evidence: StudyEvidence) -> Drawable | None:
    """Draw LoRA's table 5 and AdaLoRA's table 14: some of the attention matrices, all of them, or all matrices."""
    # The other arms are compared with the first one.
    arms = {"all types": f"{UNIFORM_STUDENT}, {EVEN}"}
    arms |= numbered(f"LoRA, {{}} only, {EVEN}", [*"qkvo", *variants.SEVERAL])
    names = {"W_q and W_k, rank 4": "q and k", "W_q and W_v, rank 4": "q and v", "all four, rank 2": "attention"}
    for name in "qkvo":
        names[f"W_{name}, rank 8"] = name
    types = printed("LoRA", "Table 5", names)
    sizes = {"LoRA on two attention matrices": "q and v", "LoRA on all six matrices": "all types"}
    # Eight tasks would cover each other.
    by_size = printed("AdaLoRA", "Table 14", sizes).groupby("name")["value"].mean().reset_index()
    numbers = pd.concat([types[types["data"] == "MNLI-m"], by_size.assign(data="AdaLoRA, table 14, mean of GLUE")])
    numbers = numbers.assign(data=numbers["data"].replace("MNLI-m", "LoRA, table 5, MNLI-m"))
    caption = (
        "LoRA with as many parameters in some types of weight as in all of rank 2; several types have 6% fewer. "
        "The teacher changes all modules at rank 2."
    )
    gaps = variant_gap_table(evidence, arms).groupby("name")["value"].mean()
    if gaps.empty:
        return None
    single = gaps[[*"qkvo"]]
    title = (
        f"At equal size, LoRA in all types of weight closes {gaps['all types']:.0f} points, in attention "
        f"{gaps['attention']:.0f}, in one type of attention weight {single.min():.0f} ({single.idxmin()}) to "
        f"{single.max():.0f} ({single.idxmax()})"
    )
    # Only this row is in both tables.
    texts = title, "LoRA in some types of weight", caption
    return beside_printed(evidence, arms, texts, (numbers, "Printed"), printed_base="q and v")


def draw_adalora_scores(evidence: StudyEvidence) -> Drawable | None:
    """Draw AdaLoRA's table 4: its importance and others."""
    arms = {
        "AdaLoRA": f"{adalora.ALLOCATED}, {UNEVEN}",
        "sensitivity": f"{adalora.ALLOCATED}, sensitivity, {UNEVEN}",
        "size of λ": f"{adalora.ALLOCATED}, size of lambda, {UNEVEN}",
        "no allocation": f"AdaLoRA, rank 2 to 2, {UNEVEN}",
    }
    names = {
        "AdaLoRA": "AdaLoRA",
        "AdaLoRA, importance by sensitivity only": "sensitivity",
        "AdaLoRA, importance by size of lambda": "size of λ",
    }
    numbers = printed("AdaLoRA", "Table 4", names, "0.08 %")
    title = (
        "Allocation by sensitivity closes {sensitivity} than by AdaLoRA's score, by the size of λ {size of λ}; without "
        "allocation it is {no allocation}"
    )
    caption = (
        "Modules need ranks of 0, 1, 3 and 4. AdaLoRA's score is sensitivity (weight times gradient), smoothed, times "
        "its uncertainty. A component is a column of P, its λ and a row of Q."
    )
    texts = title, "AdaLoRA by score", caption
    return beside_printed(evidence, arms, texts, (numbers, "Printed, AdaLoRA's table 4"))


def draw_adalora_parts(evidence: StudyEvidence) -> Drawable | None:
    """Draw AdaLoRA's table 5: its form, its penalty and its allocation."""
    arms = {
        "AdaLoRA": f"{adalora.ALLOCATED}, {UNEVEN}",
        "no penalty": f"{adalora.ALLOCATED}, no penalty, {UNEVEN}",
        "no allocation": f"AdaLoRA, rank 2 to 2, {UNEVEN}",
        "neither part": f"AdaLoRA, rank 2 to 2, no penalty, {UNEVEN}",
        "LoRA": f"{UNIFORM_STUDENT}, {UNEVEN}",
    }
    names = {
        "AdaLoRA": "AdaLoRA",
        "AdaLoRA without the penalty": "no penalty",
        "SVD-LoRA, no allocation": "no allocation",
        "LoRA": "LoRA",
    }
    caption = "Modules need ranks of 0, 1, 3 and 4; the mean rank is 2 in all rows."
    title = (
        "AdaLoRA closes {no allocation} without allocation, and {no penalty} without the penalty; LoRA closes {LoRA}"
    )
    numbers = printed("AdaLoRA", "Table 5", names, "0.08 %"), "Printed, AdaLoRA's table 5"
    return beside_printed(evidence, arms, (title, "AdaLoRA without its parts", caption), numbers)


def draw_blocks(evidence: StudyEvidence) -> Drawable | None:
    """Draw LISA's figure 7: number of blocks that train at a time."""
    truth = truth_names.ALL_BLOCKS
    arms, full = numbered(f"LISA, {{}} of 8 blocks, {truth}", variants.BLOCKS), f"{FULL}, {truth}"
    chart = gaps_by_number(
        evidence,
        {"LISA": arms},
        "blocks that train at a time (γ), of 8",
        "LISA by number of blocks",
        "All blocks change at rank 2. With γ = 0, only embedding, final norm and head train. Right: all seeds that "
        "both have. The paper finds that γ = 8 of 32 equals full fine-tuning, and that γ = 16 exceeds it.",
        # LoRA closes as much, so its line would cover this one.
        {"full fine-tuning (γ = 8)": full},
        log=False,
    )
    if chart is None:
        return None
    pairs = {}
    for number, arm in arms.items():
        pairs[number] = arm, full
    paired = paired_gaps(evidence, pairs, ("LISA", "full fine-tuning"))
    words, (fewest, *_, largest) = describe_differences(paired, "number"), sorted(arms)
    title = (
        f"LISA closes {words[largest]} than full fine-tuning with {largest} of 8 blocks at a time, {words[fewest]} "
        f"with {fewest}"
    )
    return set_side_by_side(replace(chart, title="By blocks"), replace(paired, x=chart.x), title=title)


def draw_sizes(evidence: StudyEvidence) -> Drawable | None:
    """Draw FourierFT's figure 1: FourierFT and LoRA by parameters."""
    charts, pairs = [], {}
    teachers = f"Teacher changes {_SHARED_SIZE} of FourierFT's coefficients", "Teacher changes modules at rank 2"
    for truth, title in zip(fourierft.SUFFICIENT, teachers, strict=True):
        sparse = numbered(f"FourierFT, {{}} coefficients from zero, {truth}", variants.COEFFICIENTS)
        ranks = numbered(f"LoRA, rank {{}}, attention, {truth}", variants.COEFFICIENTS.values())
        # No rank is as small as the fewest coefficients.
        factored = dict([*zip(variants.COEFFICIENTS, ranks.values(), strict=True)][1:])
        chart = gaps_by_number(
            evidence,
            {"FourierFT": sparse, "LoRA": factored},
            "parameters per matrix",
            title,
            f"LoRA has ranks 1, 2, 4 and 8. Left: the teacher's coefficients are at the {_SHARED_SIZE} entries that "
            "FourierFT trains, which favors it. Title: difference, paired by all seeds that both have. The paper finds "
            "that FourierFT reaches LoRA's score with a hundredth of its parameters.",
        )
        if chart is None:
            return None
        charts.append(chart)
        pairs[title] = sparse[_SHARED_SIZE], factored[_SHARED_SIZE]
    words = describe_differences(paired_gaps(evidence, pairs, ("FourierFT", "LoRA")), "number")
    entries, rank = map(words.__getitem__, teachers)
    title = (
        f"At {_SHARED_SIZE} parameters per matrix, FourierFT closes {entries} than LoRA if the teacher changes its "
        f"coefficients, {rank} if the teacher has rank 2"
    )
    return set_side_by_side(*charts, title=title)


def draw_neurons(evidence: StudyEvidence) -> Drawable | None:
    """Draw NeFT's figure 3: more neurons, the next ones or those that rotate least."""
    truth = truth_names.FEW_NEURONS
    series: dict[str, dict[float, str]] = {}
    for name, arms in (("next", variants.NEXT), ("reversed", (variants.NEXT[0], *variants.REVERSED))):
        labels = of_truth(truth, *arms).values()
        series[name] = dict(zip((0, *variants.MORE_NEURONS), labels, strict=True))
    chart = gaps_by_number(
        evidence,
        series,
        f"further neurons (% of {_NEURONS:,})",
        "NeFT with further neurons",
        f"NeFT trains the {variants.NEURONS} neurons (3%) that rotate most, and further ones: the next, or, reversed, "
        "those that rotate least. The teacher changes 108 (9%).",
        {"9%, the planted ones": f"{neft.PLANTED_NEURONS}, {truth}", "9%, random": f"{neft.RANDOM_NEURONS}, {truth}"},
        log=False,
    )
    if chart is None:
        return None
    ticks, pairs = {0: "0"}, {}
    for number in variants.MORE_NEURONS:
        ticks[number] = f"{100 * number / _NEURONS:.0f}"
        pairs[number] = series["next"][number], series["reversed"][number]
    words = describe_differences(paired_gaps(evidence, pairs, ("next", "reversed")), "number")
    numbers = printed_by_fraction("Figure 3", r"x = (\d+)")
    largest = numbers[numbers["x"] == numbers["x"].max()].set_index("recipe")["value"]
    caption = f"{chart.caption} Right: printed scores of another model, on translation."
    x = Axis(label="further neurons (% of parameters)", ticks=ticks_at(numbers["x"]))
    axes = x, Axis(label="printed COMET")
    panel = printed_curves(numbers, axes, "Printed, NeFT's figure 3", caption, ["next", "reversed"])
    title = (
        f"With {ticks[number]}% more neurons, the next close {words[number]} than those that rotate least (printed: "
        f"{drawn_number(largest['next'] - largest['reversed'], '.1f')} COMET more)"
    )
    x = replace(chart.x, ticks=ticks)
    return set_side_by_side(replace(chart, x=x, caption=caption), panel, title=title)


STUDY_FIGURES = {
    "budgets-alora": VariantFigure("ALoRA", "Gap that ALoRA and LoRA close by budget", draw_budgets),
    "scores-alora": VariantFigure("ALoRA", "Gap that ALoRA closes with its scores and random ones", draw_alora_scores),
    "heterogeneity": VariantFigure("HydraLoRA", "Gap closed by heterogeneity of four tasks", draw_heterogeneity),
    "parts-hydralora": VariantFigure("HydraLoRA", "HydraLoRA without each of its parts", draw_hydralora_parts),
    "experts": VariantFigure("HydraLoRA", "HydraLoRA by number of experts", draw_experts),
    "splits": VariantFigure("HydraLoRA", "One LoRA and several with the same total rank", draw_splits),
    "searches": VariantFigure("AutoLoRA", "AutoLoRA and its ablations, with the ranks found", draw_searches),
    "placements": VariantFigure("AdaLoRA", "LoRA in one type of weight and in one block", draw_placements),
    "matrices": VariantFigure("LoRA", "LoRA in one type of weight, in several, and in all", draw_matrices),
    "scores-adalora": VariantFigure("AdaLoRA", "AdaLoRA by importance of its components", draw_adalora_scores),
    "parts-adalora": VariantFigure("AdaLoRA", "AdaLoRA without its penalty and allocation", draw_adalora_parts),
    "blocks": VariantFigure("LISA", "LISA by number of blocks that train at a time", draw_blocks),
    "sizes-fourierft": VariantFigure("FourierFT", "FourierFT and LoRA by parameters", draw_sizes),
    "further-neurons": VariantFigure("NeFT", "NeFT with further neurons, next or reversed", draw_neurons),
}
