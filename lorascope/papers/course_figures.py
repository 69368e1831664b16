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
from lorascope.charts.marks import Axis, Line, Mark, Point
from lorascope.papers import adalora, fourierft, lisa, neft, variants
from lorascope.papers.figures.variant_gaps import PUBLISHED, common_seeds, number_above, numbered, published
from lorascope.papers.judging import truth_names
from lorascope.papers.judging.kept_study import StudyEvidence
from lorascope.papers.variant_figures import VariantFigure, of_truth, printed_by_fraction, printed_curves
from lorascope.plots.builders import curves, ticks_at
from lorascope.plots.run_groups import INTERVAL

WINDOW = 10  # steps, of which a batch's loss is the mean
_APART = 0.015  # of the axis: horizontal distance of bars
FEW, ALL_BLOCKS = truth_names.FEW_NEURONS, truth_names.ALL_BLOCKS


def loss_course(
    evidence: StudyEvidence,
    table: str,
    arms: Mapping[str, str],
    y: str,
    title: str,
    caption: str,
    by_seed: bool = False,
) -> Chart | None:
    """Draw a loss of arms over the steps, mean and range over the seeds that all have; None if an arm has no runs.

    Parameters
    ----------
    evidence : StudyEvidence
        Kept runs.
    table : {"losses", "validation"}
        Kept table.
    arms : mapping name -> label
        Arms by their names in the legend.
    y, title, caption : str
        Label of the axis, and text of the figure.
    by_seed : bool
        Whether every seed has a line.
    """
    tables = []
    # Arms of claims have more seeds, which would make their lines smoother.
    seeds = common_seeds(evidence, arms.values(), table)
    for seed in seeds:
        for name, arm in arms.items():
            rows = evidence.table(table, arm, seed).astype({"loss": "float64"})
            if table == "losses":  # of the last phase; a loss of single batches is noisy
                rows = rows[rows["phase"] == ""]
                rows = rows.assign(step=(rows["step"] - rows["step"].min()) // WINDOW * WINDOW + WINDOW / 2)
            by_step = rows.groupby("step")["loss"].mean().reset_index()
            tables.append(by_step.assign(recipe=f"seed {seed}" if by_seed else name))
    if not tables:
        return None
    losses = pd.concat(tables, ignore_index=True)
    cells = (
        losses.groupby(["recipe", "step"], sort=False)["loss"].agg(value="mean", low="min", high="max").reset_index()
    )
    marks: list[Mark] = [Line("step", "value", "recipe")]
    # A seed has no range, and bands of several arms would cover each other.
    if not by_seed:
        last = cells[cells["step"] == cells.groupby("recipe")["step"].transform("max")]
        # Side by side, because ranges of several arms overlap.
        apart = _APART * cells["step"].max() * (1 + pd.Series(pd.factorize(last["recipe"])[0], index=last.index))
        ends = last.assign(step=last["step"] + apart)
        marks.append(Point("step", "value", "recipe", low="low", high="high", data=ends))
        caption = f"Lines: mean of {len(seeds)} seeds; bars at the right: mean and range at the last step. {caption}"
    return Chart(
        cells,
        marks,
        title=title,
        x=Axis(label="step"),
        y=Axis(label=y),
        caption=caption,
        colors=dict.fromkeys(cells["recipe"]),
    )


def last_losses(chart: Chart) -> pd.Series:
    """Return the mean loss of every line at the last step, by name, the lowest first."""
    at_end = chart.data[chart.data["step"] == chart.data["step"].max()]
    return at_end.set_index("recipe")["value"].sort_values()


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
    by_interval["K = 10"] = f"{lisa.SAMPLED}, {ALL_BLOCKS}"  # the arm of a claim
    caption = (
        "Planted teachers change all eight blocks of a small decoder. Left: K = 10 steps between draws. Center: γ = "
        "2 blocks; K = 400 is a single draw. Right: one teacher, so that only data order and draws differ. The "
        "paper's lines end at about the same loss for all K and all seeds, and lowest for the largest γ."
    )
    label, on_one = "training loss (nats)", of_truth(ALL_BLOCKS, variants.ON_ONE[-1])
    left = loss_course(evidence, "losses", by_number | full, label, "Number of blocks", caption)
    center = loss_course(evidence, "losses", by_interval, label, "Steps between draws", caption)
    right = loss_course(evidence, "losses", on_one, label, "Seeds", caption, by_seed=True)
    if left is None or center is None:
        return None
    # Bars of seeds overlap, so the title has the spread of the means.
    by_blocks, by_steps = map(last_losses, (left, center))
    title = (
        f"Last losses differ by {by_blocks.max() - by_blocks.min():.2f} nats over γ, by "
        f"{by_steps.max() - by_steps.min():.2f} over K"
    )
    return in_row(left, center, right, title=f"{title}; lowest: {by_blocks.index[0]}")


def draw_lisa_validation(evidence: StudyEvidence) -> Drawable | None:
    """Draw LISA's figure 11: validation loss."""
    arms = dict(zip(("full fine-tuning", "LoRA, rank 8", "LISA, 2 of 8 blocks"), variants.ON_ONE, strict=True))
    caption = (
        "All seeds learn the text of one planted teacher, a small decoder. The paper shows no sign of overfitting by "
        "LISA."
    )
    chart = loss_course(evidence, "validation", of_truth(ALL_BLOCKS, **arms), "validation loss (nats)", "", caption)
    if chart is None:
        return None
    return replace(chart, title=f"Last validation loss: {_above_lowest(last_losses(chart))}")


def _above_lowest(losses: pd.Series) -> str:
    """Return the name of the lowest loss, and by how much the others are above it."""
    differences = [f"{name}: {loss - losses.iloc[0]:+.3f}" for name, loss in losses.iloc[1:].items()]
    return f"{losses.index[0]} is lowest; {'; '.join(differences)} nats"


def draw_neft_validation(evidence: StudyEvidence) -> Drawable | None:
    """Draw NeFT's figures 6 and 7: validation loss, also at equal numbers of parameters."""
    few, many = variants.few_neurons(), variants.few_neurons(72)
    small, large = variants.FACTORED_NEURONS
    full = {"full fine-tuning": f"{neft.FULL}, evaluated"}
    logs = pd.read_csv(PUBLISHED / "neft_dev_loss.csv")
    # Their last steps are after the best one, where full fine-tuning overfits more.
    best = logs.pivot(index="pair", columns="method", values="best_loss")
    gains = ", ".join(drawn_number(gain, ".2f") for gain in best["full fine-tuning"] - best["NeFT"])
    caption = (
        "The planted teacher changes 108 of the 1,152 neurons of a small decoder. NeFT starts again after a full "
        "fine-tuning of 400 steps, which is not drawn. LoRA has as many parameters: rank 3 as 108 neurons, rank 1 as "
        f"36. The authors' logs have full fine-tuning {gains} above NeFT at the best step of two language pairs."
    )
    label = "validation loss (nats)"
    all_arms = of_truth(FEW, **full, **{"NeFT, 108": many, "LoRA, rank 3": large})
    first = loss_course(evidence, "validation", all_arms, label, "Against full fine-tuning", caption)
    if first is None:
        return None
    return in_row(
        first,
        loss_course(evidence, "validation", of_truth(FEW, **{"NeFT, 108": many, "LoRA, rank 3": large}), label,
               "As many as 108 neurons", caption),
        loss_course(evidence, "validation", of_truth(FEW, **{"NeFT, 36": few, "LoRA, rank 1": small}), label,
               "As many as 36 neurons", caption),
        title=f"Last validation loss: {_above_lowest(last_losses(first))}",
    )  # fmt: skip


def draw_fourier_losses(evidence: StudyEvidence) -> Drawable | None:
    """Draw FourierFT's figure 6: training loss of FourierFT and of LoRA of equal size."""
    charts, lower = [], []
    truths = "Truth: 192 coefficients suffice", "Truth: rank 2 suffices"
    # A claim compares both arms, so their rates are tuned.
    for truth, title in zip(fourierft.SUFFICIENT, truths, strict=True):
        arms = of_truth(truth, **{"FourierFT": fourierft.SPARSE, "LoRA": fourierft.SMALL_STUDENT})
        caption = (
            "Seeds that an arm has not finished are left out. Both have 192 parameters per matrix, LoRA rank 2. Left: "
            "the teacher changes the 192 entries that FourierFT trains. The paper compares LoRA of rank 1 with 1,536 "
            "coefficients, on MRPC."
        )
        chart = loss_course(evidence, "losses", arms, "training loss (nats)", title, caption)
        if chart is not None:
            lower.append(last_losses(chart).index[0])
            chart = replace(chart, title=f"{title}: {lower[-1]} is lower")
        charts.append(chart)
    # A missing chart has no title either.
    title = "Training loss at equal size: {} lower if 192 coefficients suffice, {} if rank 2 does"
    return in_row(*charts, title=title.format(*lower, "", ""))


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
        f"{len(tables) // len(arms)} seeds, from before the first step on. The paper's distance falls to about 1e-3 "
        f"during the warm-up and stays there, with γ = 0.1 as here; here it ends between {ends.min():.2g} and "
        f"{ends.max():.2g}. The control has γ = 0."
    )
    charts = []
    for role, module in (("o", "W_o"), ("ffn_out", "W_f2")):
        for factor, formula in (("P", "‖PᵀP − I‖²"), ("Q", "‖QQᵀ − I‖²")):
            rows = cells[(cells["role"] == role) & (cells["factor"] == factor)]
            chart = curves(
                rows, "step", ("step", Axis(label="distance", log=True)), points=False, title=f"{formula}, {module}",
                caption=caption, colors=names,
            )  # fmt: skip
            charts.append(chart)
    title = f"With the penalty, factors end {ratio.min():.0f} to {ratio.max():.0f} times closer to orthogonal ones"
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
    above = number_above(cells[cells["panel"] == "a"], "reversed", "next")
    caption = (
        f"{_UTILIZATION} Mean shift of a neuron's utilization rank in its role, in percent of the ranks; bars: "
        f"{INTERVAL}. (a) from NeFT with 3% of the neurons, (b) from the largest number of the same kind. Right: "
        f"printed numbers, divided by {_MODEL_RANKS:,} ranks. There, reversed neurons shift the ranks more in (a); "
        f"here at {above}."
    )
    shift, printed_shift = Axis(label="mean shift (% of ranks)"), Axis(label="printed shift (% of ranks)")
    charts = []
    for panel in "ab":
        measured = cells[cells["panel"] == panel]
        x = Axis(label="further neurons", ticks=ticks_at(measured["number"]))
        charts.append(curves(measured, "number", (x, shift), title=f"({panel})", caption=caption, colors=kinds))
        numbers = printed_by_fraction(f"Figure 4 ({panel})", r"and (\d+)")
        # The name of a printed arm has the further neurons, or all of them.
        total = published("NeFT", f"Figure 4 ({panel})")["method"].str.extract(r"NeFT, (\d+)")[0].astype("float64") - 3
        numbers = numbers.assign(x=numbers["x"].fillna(total), value=100 * numbers["value"] / _MODEL_RANKS)
        x = Axis(label="further neurons (%)", ticks=ticks_at(numbers["x"]))
        charts.append(printed_curves(numbers, (x, printed_shift), f"({panel}), printed", caption, kinds))
    title = f"Reversed neurons shift utilization ranks more than the next ones at {above} numbers"
    return stack_vertically(set_side_by_side(*charts[:2]), set_side_by_side(*charts[2:]), title=title)


def draw_shift(evidence: StudyEvidence) -> Drawable | None:
    """Draw NeFT's figures 2 and 5: shift by percentile, and strongly, suppressed and indirectly affected neurons."""
    arms = {}
    for kind, of_kind in (("next", variants.NEXT[1:]), ("reversed", variants.REVERSED)):
        for number, arm in zip(variants.MORE_NEURONS, of_kind, strict=True):
            # As the paper names them: all neurons that train, or the reversed ones next to the first 3%.
            count = number if kind == "reversed" else number + variants.NEURONS
            arms[f"{100 * count / _NEURONS:.0f}% {kind.removeprefix('next')}".strip()] = arm
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
        f"least 28% from NeFT with 3%, if more of the next neurons train, or also reversed ones; mean of {len(seeds)} "
        "seeds. Suppressed ones are used less, indirect ones do not train."
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
    table = (
        pd.DataFrame(counts, columns=["name", "kind", "value"]).groupby(["name", "kind"], sort=False)["value"].mean()
    )
    panel = replace(
        left,
        data=table.reset_index(),
        marks=[Point("value", "name", "kind")],
        title="Affected neurons",
        x=Axis(label="neurons (%)"),
        y=Axis(label="", order=arms),
    )
    printed_counts = published("NeFT", "Figure 5")
    names = printed_counts["method"].str.replace("NeFT, ", "").str.replace("3 % and ", "").str.replace(" %", "%")
    paper = pd.DataFrame({
        "name": names, "kind": printed_counts["metric"].str.partition(":")[0],
        "value": 100 * printed_counts["value"] / (2 * _MODEL_RANKS),
    })  # fmt: skip
    right = replace(
        panel, data=paper, marks=[Point("value", "name", "kind", hollow=True)], title="Affected neurons, printed",
        x=Axis(label="printed neurons (%)"), y=Axis(label="", order=dict.fromkeys(names)),
    )  # fmt: skip
    strong = (
        "Up to {:.1f}% shift strongly with the next neurons, {:.1f}% with reversed ones (printed: {:.1f}%, {:.1f}%)"
    )
    title = strong.format(*_most_strong(table.reset_index()), *_most_strong(paper))
    return stack_vertically(set_side_by_side(left, left_printed), set_side_by_side(panel, right), title=title)


def _most_strong(counts: pd.DataFrame) -> tuple[float, float]:
    """Return the largest percentage of strongly shifted neurons, with the next and with reversed neurons."""
    # The paper adds other numbers of neurons, so only the largest percentages are comparable.
    strong = counts[counts["kind"] == "strong"]
    is_reversed = strong["name"].str.contains("reversed")
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
