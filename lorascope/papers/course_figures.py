"""Figures of the papers over steps, neurons or components, from the kept tables of arms that no claim reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from lorascope.analysis.neuron_utilization import average_shifts, compute_rank_shift, count_shifts
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.charts.chart import Chart, Drawable, set_side_by_side, stack_vertically
from lorascope.charts.geometry import drawn_number
from lorascope.charts.marks import Axis, Line, Point, Rule
from lorascope.papers import adalora, fourierft, lisa, neft, variants
from lorascope.papers.figures.study_marks import SMALL
from lorascope.papers.figures.variant_gaps import (
    PUBLISHED,
    common_seeds,
    describe_differences,
    numbered,
    printed_by_fraction,
    printed_curves,
    published,
)
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.variant_figures import VariantFigure, of_truth
from lorascope.plots.builders import curves, dots, ticks_at
from lorascope.plots.run_groups import INTERVAL

_PRINTED_DISTANCE = 0.001  # of AdaLoRA's figure 4, as read off it
WINDOW = 10  # steps, of which a batch's loss is the mean
_LOSS_NAMES = {"losses": "training", "validation": "validation"}
FEW, ALL_BLOCKS = truth_names.FEW_NEURONS, truth_names.ALL_BLOCKS


def loss_by_step(evidence: StudyEvidence, table: str, arm: str, seed: int) -> pd.Series:
    """Return a loss of a run by step, of ten steps each if it is the training loss.

    Parameters
    ----------
    evidence : StudyEvidence
        Kept runs.
    table : {"losses", "validation"}
        Kept table.
    arm : str
        Label of the arm.
    seed : int
        Seed of the run.
    """
    rows = evidence.table(table, arm, seed).astype({"loss": "float64"})
    if table == "losses":  # of the last phase; a loss of single batches is noisy
        rows = rows[rows["phase"] == ""]
        rows = rows.assign(step=(rows["step"] - rows["step"].min()) // WINDOW * WINDOW + WINDOW / 2)
    return rows.groupby("step")["loss"].mean()


def loss_course(
    evidence: StudyEvidence,
    table: str,
    arms: Mapping[str, str],
    title: str,
    caption: str,
    by_seed: bool = False,
    is_gray: bool = False,
) -> Chart | None:
    """Draw a loss of arms over the steps, mean over the seeds that all have; None if an arm has no runs.

    Parameters
    ----------
    evidence, table
        See ``loss_by_step``.
    arms : mapping name -> label
        Arms by their names in the legend.
    title, caption : str
        Text of the figure.
    by_seed : bool
        Whether every seed has a line.
    is_gray : bool
        Whether lines are gray, such as lines that coincide, which a legend would not distinguish.
    """
    tables = []
    # Arms of claims have more seeds, which would make their lines smoother.
    seeds = common_seeds(evidence, arms.values(), table)
    for seed in seeds:
        for name, arm in arms.items():
            by_step = loss_by_step(evidence, table, arm, seed).reset_index()
            tables.append(by_step.assign(recipe=f"seed {seed}" if by_seed else name))
    if not tables:
        return None
    cells = pd.concat(tables).groupby(["recipe", "step"], sort=False)["loss"].mean().rename("value").reset_index()
    line = Line("step", "value", "recipe")
    if is_gray:
        line = Line("step", "value", stretch="recipe", muted=True)
    return Chart(
        cells,
        [line],
        title=title,
        x=Axis(label="step"),
        y=Axis(label=f"{_LOSS_NAMES[table]} loss (nats)"),
        caption=f"Lines: mean of {len(seeds)} seeds. {caption}",
        colors=dict.fromkeys(cells["recipe"]),
    )


def last_differences(
    evidence: StudyEvidence, table: str, pairs: Mapping[str, tuple[str, str]], minus: str
) -> Chart | None:
    """Draw how far the last loss of one arm is above that of another, paired by seed; None if an arm has no runs.

    Parameters
    ----------
    evidence, table
        See ``loss_by_step``.
    pairs : mapping name -> two labels
        Arms of the rows; the second one is subtracted.
    minus : str
        Name of the second arm, for the axis.
    """
    rows = []
    for name, arms in pairs.items():
        for seed in common_seeds(evidence, arms, table):
            first, second = (loss_by_step(evidence, table, arm, seed).iloc[-1] for arm in arms)
            rows.append((name, first - second))
    differences = pd.DataFrame(rows, columns=["name", "value"])
    if differences["name"].nunique() < len(pairs):
        return None
    cells = seed_cells(differences, ["name"])
    return Chart(
        cells,
        [Rule(x=0), *dots(cells, "value", "name")],
        title="Last loss, paired by seed",
        x=Axis(label=f"minus {minus} (nats)"),
        y=Axis(order=pairs),
    )


def describe_losses(paired: Chart) -> dict[str, str]:
    """Return the differences of ``last_differences`` by row: ``0.051 [0.049, 0.053] nats above``."""
    return describe_differences(paired, digits=".3f", words=("nats below", "nats above"))


def in_row(*charts: Chart | None, title: str = "") -> Drawable | None:
    """Set charts side by side below a title, with the caption of the first one; None if one is missing."""
    panels: list[Chart] = []
    for chart in charts:
        if chart is None:
            return None
        panels.append(chart)
    # Panels of one figure have one caption.
    return set_side_by_side(*(replace(panel, caption=panels[0].caption) for panel in panels), title=title)


def draw_lisa_losses(evidence: StudyEvidence) -> Drawable | None:
    """Draw LISA's figures 8, 9 and 10: training loss by number of blocks, by steps between draws, and by seed."""
    full = {"γ = 8 (full)": f"{neft.FULL}, {ALL_BLOCKS}"}
    by_number = numbered(f"LISA, {{}} of 8 blocks, {ALL_BLOCKS}", variants.BLOCKS, "γ = {}")
    by_interval = numbered(f"{lisa.SAMPLED}, {{}} steps, {ALL_BLOCKS}", variants.INTERVALS, "K = {}")
    sampled = f"{lisa.SAMPLED}, {ALL_BLOCKS}"  # the arm of a claim
    by_interval["K = 10"] = sampled
    caption = (
        "Small decoders, trained on the text of planted teachers that change all eight blocks; mean of 10 steps. Above "
        "and lower left: K = 10 steps between draws if γ varies, and γ = 2 blocks if K varies; K = 400 is a single "
        f"draw; bars: {INTERVAL}. Lower right: one teacher, so that only data order and draws differ. The paper's "
        "lines end at about the same loss for all K and all seeds, and lowest for the largest γ."
    )
    pairs = {}
    for name, arm in (by_number | full | by_interval).items():
        if arm != sampled:
            pairs[name] = arm, sampled
    spacings = ", ".join(map(str, variants.INTERVALS))
    upper = in_row(
        loss_course(evidence, "losses", by_number | full, "Blocks that train at a time (γ)", caption),
        loss_course(evidence, "losses", by_interval, f"A line per K = {spacings} steps", caption, is_gray=True),
    )
    one_teacher = of_truth(ALL_BLOCKS, variants.ON_ONE[-1])
    lower = in_row(
        last_differences(evidence, "losses", pairs, "γ = 2, K = 10"),
        loss_course(evidence, "losses", one_teacher, "A line per seed", caption, by_seed=True, is_gray=True),
    )
    if upper is None or lower is None:
        return None
    paired = lower.panels[0]
    words, values = describe_losses(paired), paired.data.set_index("name")["value"]
    of_spacing = values[values.index.str.startswith("K")].abs().max()
    title = (
        f"Against LISA with γ = 2 blocks, training loss ends {words['γ = 0']} with γ = 0, {words['γ = 8 (full)']} with "
        f"all 8; steps between draws change it by up to {of_spacing:.3f}"
    )
    return replace(stack_vertically(upper, lower), title=title)


def draw_lisa_validation(evidence: StudyEvidence) -> Drawable | None:
    """Draw LISA's figure 11: validation loss."""
    arms = of_truth(
        ALL_BLOCKS,
        **dict(zip(("full fine-tuning", "LoRA, rank 8", "LISA, 2 of 8 blocks"), variants.ON_ONE, strict=True)),
    )
    full, factored, sampled = arms.values()
    caption = (
        "Small decoders, trained on the text of one planted teacher, whose update changes all blocks; seeds differ in "
        f"data order and initial values. Right: bars are a {INTERVAL}. The paper shows no sign of overfitting by LISA."
    )
    chart = loss_course(evidence, "validation", arms, "By step", caption)
    pairs = {"LoRA, rank 8": (factored, full), "LISA, 2 of 8 blocks": (sampled, full)}
    paired = last_differences(evidence, "validation", pairs, "full fine-tuning")
    if paired is None:
        return None
    factored, sampled = describe_losses(paired).values()
    title = f"LISA's validation loss ends {sampled} that of full fine-tuning, LoRA's {factored}"
    return in_row(chart, paired, title=title)


def draw_neft_validation(evidence: StudyEvidence) -> Drawable | None:
    """Draw NeFT's figures 6 and 7: validation loss, also at equal numbers of parameters."""
    full = f"{neft.FULL}, evaluated"
    fewer, more = of_truth(FEW, variants.few_neurons(), variants.few_neurons(72)).values()
    full, small, large = of_truth(FEW, full, *variants.FACTORED_NEURONS).values()
    logs = pd.read_csv(PUBLISHED / "neft_dev_loss.csv")
    # Their last steps are after the best one, where full fine-tuning overfits more.
    best = logs.pivot(index="pair", columns="method", values="best_loss")
    gains = " and ".join(drawn_number(gain, ".2f") for gain in best["full fine-tuning"] - best["NeFT"])
    caption = (
        "Small decoders whose planted teacher changes 108 of 1,152 neurons. NeFT trains neurons that rotate most in a "
        "full fine-tuning of 400 steps, which precede the drawn ones. LoRA has as many parameters: rank 3 as 108 "
        f"neurons, rank 1 as 36. Right: bars are a {INTERVAL}. At the best step of the authors' logs, full fine-tuning "
        f"is {gains} above NeFT in two language pairs."
    )
    pairs = {
        "NeFT, 108 − full fine-tuning": (more, full),
        "NeFT, 108 − LoRA, rank 3": (more, large),
        "NeFT, 36 − LoRA, rank 1": (fewer, small),
    }
    paired = last_differences(evidence, "validation", pairs, "")
    if paired is None:
        return None
    of_full, of_large, _ = describe_losses(paired).values()
    first = paired.data.iloc[0]
    if first["low"] < 0 < first["high"]:
        of_full = f"no difference from full fine-tuning is seen ({of_full})"
    else:
        of_full = f"{of_full} full fine-tuning"
    arms = {"full fine-tuning": full, "NeFT, 108": more, "LoRA, rank 3": large}
    return in_row(
        loss_course(evidence, "validation", arms, "108 neurons (9%)", caption),
        loss_course(evidence, "validation", {"NeFT, 36": fewer, "LoRA, rank 1": small}, "36 neurons (3%)", caption),
        replace(paired, x=Axis(label="difference (nats)")),
        title=f"With 108 neurons, validation loss of NeFT ends {of_large} LoRA of equal size; {of_full}",
    )


def draw_fourier_losses(evidence: StudyEvidence) -> Drawable | None:
    """Draw FourierFT's figure 6: training loss of FourierFT and of LoRA of equal size."""
    teachers = "FourierFT's entries", "rank 2"
    caption = (
        "Small decoders, trained on the text of planted teachers; mean of 10 steps. FourierFT and LoRA of rank 2 have "
        f"192 parameters per matrix; a teacher of FourierFT's entries changes those 192. Right: bars "
        f"are a {INTERVAL}. {SMALL} The paper compares LoRA of rank 1 with 1,536 coefficients, on MRPC."
    )
    charts, pairs = [], {}
    # A claim compares both arms, so their rates are tuned.
    for truth, title in zip(fourierft.SUFFICIENT, teachers, strict=True):
        arms = of_truth(truth, **{"FourierFT": fourierft.SPARSE, "LoRA": fourierft.SMALL_STUDENT})
        charts.append(loss_course(evidence, "losses", arms, f"Teacher: {title}", caption))
        sparse, factored = arms.values()
        pairs[title] = sparse, factored
    paired = last_differences(evidence, "losses", pairs, "LoRA")
    if paired is None:
        return None
    entries, rank = describe_losses(paired).values()
    title = (
        f"At equal size, FourierFT's training loss ends {entries} LoRA's if the teacher changes its entries, {rank} if "
        "the teacher has rank 2"
    )
    return in_row(*charts, replace(paired, x=Axis(label="FourierFT − LoRA (nats)")), title=title)


def draw_penalties(evidence: StudyEvidence) -> Drawable | None:
    """Draw AdaLoRA's figure 4: distance of P and Q from orthogonality over the steps."""
    names = {"AdaLoRA": adalora.ALLOCATED, "no penalty": f"{adalora.ALLOCATED}, no penalty"}
    arms = of_truth(variants.UNEVEN, **names)
    tables = []
    for seed in common_seeds(evidence, arms.values(), "penalties"):
        for name, arm in arms.items():
            tables.append(evidence.table("penalties", arm, seed).assign(recipe=name))
    if not tables:
        return None
    keys = ["role", "factor", "recipe", "step"]
    cells = pd.concat(tables).groupby(keys)["value"].agg(value="mean", low="min", high="max").reset_index()
    at_end = cells[cells["step"] == cells["step"].max()].pivot(
        index=["role", "factor"], columns="recipe", values="value"
    )
    ends, ratio = at_end["AdaLoRA"], at_end["no penalty"] / at_end["AdaLoRA"]
    caption = (
        "First block of small decoders, trained on the text of planted teachers, mean and range over "
        f"{len(tables) // len(arms)} seeds, from before the first step on. W_o: attention output; W_f2: feed-forward "
        f"output. The paper's distance falls to about {_PRINTED_DISTANCE} (dashed line) during the warm-up and stays "
        "there, with γ = 0.1 as here. No penalty: γ = 0."
    )
    charts = []
    for role, module in (("o", "W_o"), ("ffn_out", "W_f2")):
        for factor, formula in (("P", "‖PᵀP − I‖²"), ("Q", "‖QQᵀ − I‖²")):
            rows = cells[(cells["role"] == role) & (cells["factor"] == factor)]
            chart = curves(
                rows, "step", ("step", Axis(label="squared distance", log=True)), Rule(y=_PRINTED_DISTANCE),
                points=False, title=f"{formula}, {module}", caption=caption, colors=names,
            )  # fmt: skip
            charts.append(chart)
    title = (
        f"With the penalty, P and Q end {ends.min():.2g} to {ends.max():.2g} from orthogonal ones (printed: "
        f"{_PRINTED_DISTANCE}), {ratio.min():.0f} to {ratio.max():.0f} times closer than without"
    )
    return stack_vertically(set_side_by_side(*charts[:2]), set_side_by_side(*charts[2:]), title=title)


def shift_table(evidence: StudyEvidence, arm: str, reference: str, seed: int) -> pd.DataFrame:
    """Compute the shift of utilization ranks of a run from those of another arm with the same seed."""
    studied, before = (evidence.table("utilization", f"{name}, {FEW}", seed) for name in (arm, reference))
    columns = ["module", "role", "neuron", "value"]
    return compute_rank_shift(studied[columns], before[columns], studied.loc[studied["trained"], ["module", "neuron"]])


_MODEL_RANKS = 352_256  # of the neurons of one projection of LLaMA-2 7B
_ROLE_RANKS = 384  # of the decoder
_NEURONS = 3 * _ROLE_RANKS
_UTILIZATION = (
    "Small decoders whose planted teacher changes 108 neurons. Utilization: largest absolute correlation of a "
    "neuron's weights with the hidden states of its block or a later one."
)


def draw_use(evidence: StudyEvidence) -> Drawable | None:
    """Draw NeFT's figure 4: mean shift of utilization ranks, from the smallest and the largest number of neurons."""
    seeds = common_seeds(evidence, of_truth(FEW, *variants.NEXT, *variants.REVERSED).values(), "utilization")
    if not seeds:
        return None
    rows = []
    kinds = {"next": variants.NEXT[1:], "reversed": variants.REVERSED}
    for recipe, arms in kinds.items():
        for number, arm in zip(variants.MORE_NEURONS, arms, strict=True):
            for seed in seeds:
                # The paper's second panel compares with the largest number of the same kind.
                for panel, reference in (("a", variants.NEXT[0]), ("b", arms[-1])):
                    moved = shift_table(evidence, arm, reference, seed)["d_rank"].abs().mean()
                    rows.append((panel, recipe, number, 100 * moved / _ROLE_RANKS))
    table = pd.DataFrame(rows, columns=["panel", "recipe", "number", "value"])
    cells = seed_cells(
        table[(table["panel"] == "a") | (table["number"] < variants.MORE_NEURONS[-1])], ["panel", "recipe", "number"]
    )
    of_largest = cells[(cells["panel"] == "a") & (cells["number"] == variants.MORE_NEURONS[-1])]
    caption = (
        f"{_UTILIZATION} Mean shift of a neuron's utilization rank in its role, in percent of the ranks; mean of "
        f"{len(seeds)} seeds; bars: {INTERVAL}. NeFT trains 3% of the neurons and further ones: the next, or, "
        f"reversed, those that rotate least. Right: printed numbers, divided by {_MODEL_RANKS:,} ranks."
    )
    shift, printed_shift = Axis(label="mean shift (% of ranks)"), Axis(label="printed shift (% of ranks)")
    ticks = {number: f"{100 * number / _NEURONS:.0f}" for number in variants.MORE_NEURONS}
    charts, largest_printed = [], {}
    for panel, reference in {"a": "without further neurons", "b": "with 9% further ones"}.items():
        measured, title = cells[cells["panel"] == panel], f"From NeFT {reference}"
        x = Axis(label=f"further neurons (% of {_NEURONS:,})", ticks=ticks)
        charts.append(curves(measured, "number", (x, shift), title=title, caption=caption, colors=kinds))
        numbers = printed_by_fraction(f"Figure 4 ({panel})", r"and (\d+)")
        # The name of a printed arm has the further neurons, or all of them.
        total = published("NeFT", f"Figure 4 ({panel})")["method"].str.extract(r"NeFT, (\d+)")[0].astype("float64") - 3
        numbers = numbers.assign(x=numbers["x"].fillna(total), value=100 * numbers["value"] / _MODEL_RANKS)
        x = Axis(label="further neurons (%)", ticks=ticks_at(numbers["x"]))
        charts.append(printed_curves(numbers, (x, printed_shift), f"{title}, printed", caption, kinds))
        if panel == "a":
            largest_printed = numbers[numbers["x"] == numbers["x"].max()].set_index("recipe")["value"]
    measured_shift = of_largest.set_index("recipe")["value"]
    title = (
        f"With {ticks[variants.MORE_NEURONS[-1]]}% reversed neurons, utilization ranks shift by "
        f"{measured_shift['reversed']:.1f}%, with the next ones by {measured_shift['next']:.1f}% (printed: "
        f"{largest_printed['reversed']:.1f}%, {largest_printed['next']:.1f}%)"
    )
    return stack_vertically(set_side_by_side(*charts[:2]), set_side_by_side(*charts[2:]), title=title)


def draw_shift(evidence: StudyEvidence) -> Drawable | None:
    """Draw NeFT's figures 2 and 5: shift by percentile, and strongly, suppressed and indirectly affected neurons."""
    arms = {}
    for kind, of_kind in (("next", variants.NEXT[1:]), ("reversed", variants.REVERSED)):
        for number, arm in zip(variants.MORE_NEURONS, of_kind, strict=True):
            # As the paper names them: all neurons that train, or the reversed ones next to the first 3%.
            count = number if kind == "reversed" else number + variants.NEURONS
            arms[_trained_neurons(f"{100 * count / _NEURONS:.0f}%", kind == "reversed")] = arm
    seeds = common_seeds(evidence, of_truth(FEW, *variants.NEXT, *variants.REVERSED).values(), "utilization")
    if not seeds:
        return None
    shifts, counts = [], []
    for seed in seeds:
        by_percentile = average_shifts(shift_table(evidence, variants.NEXT[1], variants.NEXT[0], seed))
        shifts.append(by_percentile.iloc[:-1])  # the last row is the mean over all
        for name, arm in arms.items():
            numbers = count_shifts(shift_table(evidence, arm, variants.NEXT[0], seed))
            for kind in ("strong", "suppressed", "indirect"):
                counts.append((name, kind, 100 * numbers[kind] / (2 * _ROLE_RANKS)))
    caption = (
        f"{_UTILIZATION} Above: mean shift of utilization ranks of NeFT with 6% of the neurons from 3%, by percentile "
        "of utilization, and as read off the paper's figure. Below: neurons, in percent, whose rank shifts by at "
        "least 28% (strong) from NeFT with the first 3%. First: neurons that rotate most in full fine-tuning, last: "
        f"those that rotate least (reversed). Mean and range of {len(seeds)} seeds. Suppressed ones are used less, "
        "indirect ones do not train."
    )
    moved = pd.concat(shifts).assign(source="measured")
    middle = (moved["low"] + moved["high"]) / 2
    moved = moved.assign(x=100 * middle, y=100 * moved["value"] / _ROLE_RANKS)
    printed_shifts = published("NeFT", "Figure 2")
    edges = printed_shifts["method"].str.extract(r"percentiles ([\d.]+) to ([\d.]+)").astype("float64")
    paper = pd.DataFrame(
        {"x": edges.mean(axis=1), "y": 100 * printed_shifts["value"] / _MODEL_RANKS, "source": "printed"}
    )
    # The seeds have the same buckets, and the paper has one value each.
    by_bucket = moved.groupby(["source", "x"], sort=False)["y"].mean().reset_index()
    axes: dict[str, Any] = {"x": Axis(label="percentile of utilization"), "y": Axis(label="mean shift (% of ranks)")}
    left = Chart(by_bucket, [Line("x", "y"), Point("x", "y")], title="Shift by use", caption=caption, **axes)
    outlines, printed_y = [Line("x", "y"), Point("x", "y", hollow=True)], Axis(label="printed shift (% of ranks)")
    left_printed = replace(left, data=paper, marks=outlines, title="Shift by use, printed", y=printed_y)
    by_seed = pd.DataFrame(counts, columns=["name", "kind", "value"]).groupby(["name", "kind"], sort=False)["value"]
    table = by_seed.agg(value="mean", low="min", high="max").reset_index()
    panel = replace(
        left,
        data=table,
        marks=[Point("value", "name", "kind", low="low", high="high")],
        title="Affected neurons",
        x=Axis(label="neurons (%)"),
        y=Axis(label="", order=arms),
    )
    printed_counts = published("NeFT", "Figure 5")
    percent = printed_counts["method"].str.extract(r"(\d+) %(?: reversed)?$")[0] + "%"
    is_reversed = printed_counts["method"].str.contains("reversed")
    names = pd.Series([*map(_trained_neurons, percent, is_reversed)], printed_counts.index)
    paper = pd.DataFrame({
        "name": names, "kind": printed_counts["metric"].str.partition(":")[0],
        "value": 100 * printed_counts["value"] / (2 * _MODEL_RANKS),
    })  # fmt: skip
    right = replace(
        panel, data=paper, marks=[Point("value", "name", "kind", hollow=True)], title="Affected neurons, printed",
        x=Axis(label="printed neurons (%)"), y=Axis(label="", order=dict.fromkeys(names)),
    )  # fmt: skip
    strong = (
        "Use of up to {:.1f}% of neurons shifts strongly if more of those that rotate most train, of {:.1f}% if those "
        "that rotate least do (printed: {:.1f}%, {:.1f}%)"
    )
    title = strong.format(*_most_strong(table), *_most_strong(paper))
    return stack_vertically(set_side_by_side(left, left_printed), set_side_by_side(panel, right), title=title)


def _trained_neurons(percent: str, is_reversed: bool) -> str:
    """Return the name of a row: percentages of neurons that train, in the order of their rotation."""
    if is_reversed:
        return f"first 3%, last {percent}"
    return f"first {percent}"


def _most_strong(counts: pd.DataFrame) -> tuple[float, float]:
    """Return the largest percentage of strongly shifted neurons, with the next and with reversed neurons."""
    # The paper adds other numbers of neurons, so only the largest percentages are comparable.
    strong = counts[counts["kind"] == "strong"]
    is_reversed = strong["name"].str.contains("last")
    return strong.loc[~is_reversed, "value"].max(), strong.loc[is_reversed, "value"].max()


STUDY_FIGURES = {
    "losses-lisa": VariantFigure("LISA", "Training loss of LISA by blocks, draws and seed", draw_lisa_losses),
    "validation-lisa": VariantFigure("LISA", "Validation loss of LISA, LoRA, full fine-tuning", draw_lisa_validation),
    "validation-neft": VariantFigure("NeFT", "Validation loss of NeFT, LoRA, full fine-tuning", draw_neft_validation),
    "losses-fourierft": VariantFigure("FourierFT", "Training loss of FourierFT and LoRA", draw_fourier_losses),
    "penalties": VariantFigure("AdaLoRA", "Distance of P and Q from orthogonality over the steps", draw_penalties),
    "shift-by-neurons": VariantFigure("NeFT", "Mean shift in utilization rank by further neurons", draw_use),
    "affected-neurons": VariantFigure("NeFT", "Shift in utilization rank by use, and affected neurons", draw_shift),
}
