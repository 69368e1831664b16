"""Figure that compares every pair of adapters."""

from __future__ import annotations

from lorascope.analysis import adapter_similarity as pairs
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Mark, Point, Rule
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.run_groups import Runs


@figure(
    topic="updates",
    needs=("update_norm",),
    runs=2,
    reads="The panels compare every pair of adapters: norm ratio, cosine of the updates, angle between leading "
    "singular vectors, and fraction of rank in different modules. Only angles well below those of random directions "
    "show shared directions.",
    misleads="Cosines near zero are normal even between seeds, and runs of one seed share the initial A, which lowers "
    "their angles: compare different seeds. Norm ratios mostly reflect learning rates and numbers of steps.",
)
def adapter_pairs(runs: Runs, control: Runs | None = None, spectra: bool = False) -> Panels:
    """Plot the similarity of all pairs of adapters or runs: norm ratio, cosine, angle, difference in rank allocation.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        At least two runs on one model, of any methods and ranks.
    spectra : bool
        Decompose dense updates of any size; by default only those whose smaller side is at most 1024.

    Raises
    ------
    ValueError
        There are fewer than two runs, or they have different models.

    Examples
    --------
    >>> runs = {"LoRA": ls.example("adapter"), "other seed": ls.example("adapter_seed_1")}
    >>> runs |= {"AdaLoRA": ls.example("adalora"), "ALoRA": ls.example("alora")}
    >>> ls.plots.adapter_pairs(runs)
    """
    cohort = gather_runs("adapter_pairs", runs, control, check=False)
    cohort.require_runs(2)
    cohort.require("update_norm")
    labeled = {}
    for group in cohort.groups:
        for run in group.runs:
            label = group.label if len(group.runs) == 1 else group.run_names[run.id]
            labeled[label] = run
    table = pairs.compare_adapters(labeled, pairs.compare_modules(labeled, spectra))
    order = list(labeled)
    table = table[table["one"].map(order.index) < table["other"].map(order.index)]
    table = table.assign(pair=table["one"] + " / " + table["other"])
    caption = (
        "Norms and cosines cover all modules; a module without an adapter counts as zero. Angles: principal angles "
        f"between the first {pairs.DIRECTIONS} singular vectors (fewer if an update has fewer), averaged over outputs, "
        "inputs and shared modules. Rank elsewhere: fraction "
        "of the rank that would have to move to make the allocations equal. "
        f"{cohort.sample_sentence}"
    )

    def dots(title: str, value: str, x: Axis, *references: Mark) -> Chart:
        marks = [*references, Point(value, "pair", symbol="circle", label="two adapters")]
        return Chart(table, marks, title=title, x=x, y=Axis(compact=True), caption=caption)

    random = Point("chance", "pair", symbol="line-ns-open", label="random directions")
    # On a logarithmic axis, twice and half the norm are equally far from equality.
    norm = dots("Ratio of ‖W − W₀‖", "norm_ratio", Axis(label="first / second", log=True), Rule(x=1.0))
    cosine = dots("Cosine of W − W₀", "cosine", Axis(label="cosine"), Rule(x=0.0))
    angle = dots("Principal angle", "angle", Axis(label="angle (degrees)"), random)
    rank = dots("Rank elsewhere", "rank_moved", Axis(label="fraction of rank"), Rule(x=0.0))
    rows = set_side_by_side(norm, cosine), set_side_by_side(angle, rank)
    return cohort.complete(stack_vertically(*rows, title="Similarity of adapters"))
