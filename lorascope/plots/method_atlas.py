"""The figure of all methods at once: every one has an update, so every one can be asked the same questions of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pandas as pd

from lorascope.analysis import initial_update
from lorascope.analysis import leading_directions as analysis
from lorascope.analysis.seed_intervals import band
from lorascope.analysis.spectra import added_values
from lorascope.charts.chart import Axis, Chart, Heat, Mark, Panels, Text, set_side_by_side, stack_vertically
from lorascope.plots.norms import update_norm
from lorascope.plots.registry import SPECTRA, figure
from lorascope.plots.run_groups import Cohort, Group, Runs, define, gather, lines
from lorascope.runs.run import Run

_NOT_KEPT, _APART = "not kept", "none shared"


@figure(
    needs=("learned_norm", SPECTRA),
    runs=2,
    reads="Three answers of every method to one question, what its update is: how many directions it uses and how "
    "evenly, in which layers it lies, and whether two methods move the same directions. An angle tells something only "
    "where it lies well below the one by chance, in brackets; on the diagonal, seeds of one recipe are compared.",
    misleads="Heights of spectra and norms follow the learning rates, which differ between methods: compare shapes. "
    "A small angle between runs of one seed may be a start they share, and FourierFT's frequencies are the same in all "
    "its runs. A mixture has no single update; it is shown at the gates that the caption names.",
)
def atlas(runs: Runs, control: Runs | None = None, module: str | None = None, k: int = 8) -> Panels:
    """Spectra, norms by layer, and angles between the updates of all methods that were run on one task.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs of one model on one task.
    module : str, optional
        Whose spectrum to draw; by default all modules of the blocks are pooled whose spectrum every run holds, or where
        there are none, those of each run for itself.
    k : int
        Leading directions that are compared.

    Raises
    ------
    ValueError
        There are not two runs, or they differ in task or model.
    """
    cohort = gather("atlas", runs, control)
    cohort.require("learned_norm", SPECTRA)
    _check_cohort(cohort, k)
    spectrum, modules = _spectrum(cohort, module)
    heat, told = _angles(cohort, k)
    caption = cohort.caption(
        f"Singular values of what training added: {modules}. {define('learned_norm')} Angles: mean over outputs and "
        "inputs, over the modules that both runs hold and over pairs of runs of the principal angles between the first "
        f"{k} directions, fewer where an update has fewer; in brackets that of as many random directions.",
        *told,
        *cohort.missing_initial_updates(),
    )
    norms = update_norm(runs, control, "learned_norm")
    norms = replace(norms, title="What training added", y=replace(norms.y, log=True), meta=cohort.meta)
    top = set_side_by_side(*(replace(chart, caption=caption) for chart in (spectrum, norms)))
    return stack_vertically(top, replace(heat, caption=caption))


def _check_cohort(cohort: Cohort, k: int) -> None:
    if k < 1:
        raise ValueError(f"atlas: k = {k} directions are none to compare: give 1 or more")
    if len(cohort.runs) < 2:
        raise ValueError(f"atlas takes two runs or more, got {len(cohort.runs)}")
    cohort.require_same("task", "model")


def _spectrum(cohort: Cohort, module: str | None) -> tuple[Chart, str]:
    """Singular values of one module or of several pooled, and which these are in words."""
    held = {run.id: added_values(run) for run in cohort.runs}
    chosen, which = _pools(cohort, held, module)
    values = pd.concat(analysis.pool_spectra(found, chosen[run]).assign(run=run) for run, found in held.items())
    cells = band(cohort.label(values), ["recipe", "kind", "component"])
    chart = Chart(
        cells,
        lines(cells, "component", points=False),
        title=f"Spectrum of {module}" if module else "Spectrum",
        x=Axis(label="component", log=True),
        y=Axis(label="singular value", log=True),
        colors=cohort.labels,
        meta=cohort.meta,
    )
    return chart, which


def _pools(
    cohort: Cohort, spectra: Mapping[str, Mapping[str, Any]], module: str | None
) -> tuple[Mapping[str, Sequence[str]], str]:
    """Modules of each run whose spectra are pooled, and which these are in words."""
    common = [name for name in spectra[cohort.runs[0].id] if all(name in found for found in spectra.values())]
    if module is not None:
        if module not in common:
            some = ", ".join(common[:5]) or "none in common"
            raise ValueError(f"atlas: not all runs hold {module}; they hold {some}")
        return {run: [module] for run in spectra}, module
    blocks = {run.id: set(run.modules["module"][run.modules["layer"].notna()]) for run in cohort.runs}
    own = {run: [name for name in found if name in blocks[run]] for run, found in spectra.items()}
    if shared := [name for name in common if all(name in names for names in own.values())]:
        which = f"{len(shared)} modules of the blocks" if len(shared) > 1 else shared[0]
        return dict.fromkeys(spectra, shared), f"root mean square over the {which} that all runs hold"
    lacking = next((run for run, names in own.items() if not names), None)
    if lacking is not None:
        raise ValueError(f"atlas: run {lacking} holds the spectrum of no module in a block")
    return own, "root mean square over each run's own modules of the blocks, as none is in all"


def _angles(cohort: Cohort, k: int) -> tuple[Chart, list[str]]:
    """Angles between every two recipes, and which recipes kept no directions."""
    found = {run.id: _leading_directions(run, k) for run in cohort.runs}
    rows = []
    for one, other in product(cohort.groups, repeat=2):
        if pairs := _run_pairs(one, other):
            mean, chance = analysis.angles([(found[first.id], found[second.id]) for first, second in pairs])
            kept = all(found[run.id] for pair in pairs for run in pair)
            blank = _APART if kept else _NOT_KEPT
            words = blank if pd.isna(mean) else f"{mean:.0f}° ({chance:.0f}°)"
            rows.append({"row": one.label, "column": other.label, "value": mean, "chance": chance, "words": words})
    table = pd.DataFrame(rows)
    empty = table[table["value"].isna()]
    marks: list[Mark] = [Heat("column", "row", "value", "mean angle (°)", ".0f", limits=(0, 90), words="words")]
    marks += [Text("column", "row", "words", data=empty)] if len(empty) else []
    chart = Chart(
        table,
        marks,
        title="Angles between updates",
        x=Axis(order=cohort.labels),
        y=Axis(order=cohort.labels),
        meta=cohort.meta,
    )
    lacking = [group.label for group in cohort.groups if not any(found[run.id] for run in group.runs)]
    return chart, [f"Kept without directions, as singular values alone: {', '.join(lacking)}."] if lacking else []


def _leading_directions(run: Run, k: int) -> Mapping[str, analysis.Directions]:
    return {
        module: analysis.leading_singular_vectors(update, k)
        for module, update in initial_update.learned_updates(run).items()
    }


def _run_pairs(one: Group, other: Group) -> Sequence[tuple[Run, Run]]:
    """Every run of one with every run of the other; within one recipe, its seeds."""
    return list(combinations(one.runs, 2) if one is other else product(one.runs, other.runs))
