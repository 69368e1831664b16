"""Figures of updates stored at several steps: where layers settled, how subspaces rotate, where the path turned."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from lorascope.analysis import norms
from lorascope.analysis.adapter_similarity import DIRECTIONS
from lorascope.analysis.seed_intervals import seed_cells
from lorascope.analysis.settling import THRESHOLD, settling_steps
from lorascope.analysis.subspace_rotation import AGAINST, SPACES, rotations
from lorascope.analysis.turning_points import Turns, find_turns
from lorascope.charts.chart import Chart, Panels, set_side_by_side, stack_vertically
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Rule
from lorascope.plots.builders import curves, mean_over_modules, profile
from lorascope.plots.figure_registry import figure, gather_runs
from lorascope.plots.requirements import MANY_STEPS, STEPS
from lorascope.plots.run_groups import Cohort, Runs, require_choices, require_counts

_RANDOM = "random subspaces"


@figure(
    topic="updates",
    needs=(STEPS,),
    reads="Each point is the first stored step from which on the update of a layer stays near its last one. Low layers "
    "settled early; a layer at the last step still moved by more than the threshold just before it.",
    misleads="A decaying learning rate settles every layer, and nothing is known between two stored steps. Compare "
    "layers of one training, and trainings only if they have the same length and schedule.",
)
def settling(runs: Runs, control: Runs | None = None, threshold: float = THRESHOLD) -> Chart:
    """Plot the course of updates: the step at which each layer settled, one line per recipe.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    threshold : float
        Largest distance of a settled update to the last one, relative to the norm of the last one; 0.1 by default.

    Raises
    ------
    ValueError
        The threshold is not positive.

    Examples
    --------
    ``schedules`` are runs of ``ls.LoRA`` with ``observe=[ls.observe.factors(...)]``, by learning rate schedule.

    >>> ls.plots.settling(schedules)
    """
    cohort = gather_runs("settling", runs, control)
    if not threshold > 0:
        raise ValueError(f"threshold must be > 0, got {threshold}")
    steps = pd.concat([settling_steps(run, threshold) for run in cohort.runs])
    steps = steps.assign(place=norms.layer_places(steps), value=steps["layer_settled"])
    layers = steps.drop_duplicates(["run", "place"])  # all modules of a layer have its value
    ends = sorted({run.update_steps()[-1] for run in cohort.runs})
    return cohort.complete(
        profile(
            cohort,
            seed_cells(cohort.label(layers), ["recipe", "kind", "place"]),
            Axis(label="settled at step"),
            *(Rule(y=end, label="last step") for end in ends),
            title="Step at which each layer settled",
            caption=cohort.caption(
                f"First stored step from which on ‖Wₜ − W‖ ≤ {threshold:.3g} ‖W − W₀‖ for all matrices of a layer "
                f"together, with W of the last step, {' or '.join(map(str, ends))}."
            ),
        )
    )


@figure(
    topic="updates",
    needs=(STEPS,),
    reads="Each point is the angle between the leading directions of the updates at a step and at the stored step "
    "before it, or at the last one. A curve near 0 means that training only rescales the directions it has found.",
    misleads="Directions with nearly equal singular values rotate into each other although the update hardly changes: "
    "compare with settling. In narrow models random subspaces are close too: compare with their line.",
)
def rotation(
    runs: Runs,
    control: Runs | None = None,
    module: str | None = None,
    space: Literal["both", "columns", "rows"] = "both",
    k: int = DIRECTIONS,
) -> Panels:
    """Plot the course of updates: mean principal angle to the previous and to the last stored step, over the steps.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs to plot, and runs to compare with.
    module : str, optional
        Module to plot; by default the mean over all modules.
    space : {"both", "columns", "rows"}
        Column space (outputs), row space (inputs), or the mean over both.
    k : int
        Number of leading directions, 8 by default.

    Raises
    ------
    ValueError
        The module has no nonzero update at two steps.

    Examples
    --------
    ``changed_task`` is a run whose task changes at half of its steps.

    >>> ls.plots.rotation({"task changes at step 100": changed_task}, k=4)
    """
    cohort = gather_runs("rotation", runs, control)
    require_counts(k=k)
    require_choices(space=(space, ("both", *SPACES)))
    modules, scope, spaces = None, "over modules", "both spaces"
    if module is not None:
        modules, scope = [module], f"in {module}"
    angles = pd.concat([rotations(run, k, modules) for run in cohort.runs])
    if space != "both":
        angles, spaces = angles[angles["space"] == space], f"the space of the {SPACES[space]}"
    if angles.empty:
        raise cohort.no_common_module(module, list(cohort.runs[0].updates()))
    rows = cohort.label(angles.rename(columns={"angle": "value"}))
    random = angles.groupby("step")["chance"].mean().rename("value").reset_index().assign(recipe=_RANDOM)
    caption = cohort.caption(
        f"Mean principal angle between the {k} leading singular directions (fewer if the rank is lower), mean over "
        f"{spaces}, {scope}. Random baseline: as many random directions, {random['value'].mean():.0f}°."
    )
    return cohort.complete(
        set_side_by_side(
            *(_angle_course(cohort, rows, random, against, caption) for against in AGAINST),
            title="Rotation of the leading directions",
        )
    )


def _angle_course(cohort: Cohort, rows: pd.DataFrame, random: pd.DataFrame, against: str, caption: str) -> Chart:
    angles = rows[rows["against"] == against]
    # The last step is not compared with itself, and axes with one label would share its end.
    steps = "step before the last" if against == "last" else "step"
    return curves(
        seed_cells(mean_over_modules(angles), ["recipe", "kind", "step"]),
        "step",
        (steps, Axis(label="angle (degrees)", limits=(0, None))),
        # The first stored step has no previous one.
        Line("step", "value", "recipe", data=random[random["step"].isin(angles["step"])]),
        title=f"To the {against} stored step",
        caption=caption,
        colors=[*cohort.labels, _RANDOM],
    )


_COSINE, _RANGE = "cosine before and after", "fall below the median that is no turn"


@figure(
    topic="updates",
    needs=(MANY_STEPS,),
    reads="Top: the cosine between the displacements before and after each stored step; a ringed point below the band "
    "is a turning point, where training left its course. Bottom: the path of the updates on two components.",
    misleads="A change of the learning rate or of the batches turns the path as well as one of the task, so this shows "
    "no phase transition by itself. The bottom path has only the variance that its axes state.",
)
def turns(runs: Runs, control: Runs | None = None) -> Panels:
    """Plot the course of updates: cosine of successive displacements with turning points, and the path of each run.

    Parameters
    ----------
    runs, control : Run, sequence of Run, or mapping label -> run or runs
        Runs or series with updates at 12 evenly spaced steps or more, and those to compare with; one column each.

    Raises
    ------
    ValueError
        There are fewer than 12 evenly spaced steps, or the stored steps have no module in common.

    Examples
    --------
    ``changed_task`` is a run whose task changes at half of its steps.

    >>> ls.plots.turns(changed_task)
    """
    cohort = gather_runs("turns", runs, control)
    columns, results = [], []
    for group in cohort.groups:
        for run in group.runs:
            title = group.run_names[run.id] if len(group.runs) > 1 else cohort.title(group.label)
            result = find_turns(run)
            cosines, path = (title, f"{title}, path") if title else ("Cosine by step", "Path of the updates")
            columns.append(stack_vertically(_cosine_course(result, cosines), _principal_path(result, path)))
            results.append(f"{title}: {_describe_turns(result)}" if title else _describe_turns(result).capitalize())
    caption = (
        "Cosine of the displacements before and after each stored step; the band ends at the drop of a turning point "
        f"below the median of the cosines around. {'; '.join(results)}. {cohort.sample_sentence}"
    )
    return cohort.complete(set_side_by_side(*columns, title="Turning points of the updates"), caption)


def _describe_turns(turns: Turns) -> str:
    steps = turns.summary()["step"].astype("str")
    if steps.empty:
        return f"no turning point in {len(turns.table)} checkpoints"
    return f"turning point at step {', '.join(steps)}, of {len(turns.table)} checkpoints"


def _cosine_course(turns: Turns, title: str) -> Chart:
    table = turns.table.dropna(subset="cosine")
    around = table["cosine"] - table["drop"]
    table = table.assign(around=around, bound=around + turns.limit, shown=_COSINE, range=_RANGE)
    band = Band("step", "bound", "around", "range")
    axes = Axis(label="step"), Axis(label="cosine of displacements")
    line, dots = Line("step", "cosine", "shown"), Point("step", "cosine", "shown")
    marks = [band, line, dots, *_rings(table, "step", "cosine")]
    return Chart(table, marks, title=title, x=axes[0], y=axes[1], colors=(_COSINE, _RANGE))


def _principal_path(turns: Turns, title: str) -> Chart:
    path = turns.path.assign(turn=turns.table["turn"])
    first, second = (Axis(label=f"component {i} ({share:.0%})") for i, share in enumerate(turns.explained, start=1))
    marks = [Point("first", "second", "step"), *_rings(path, "first", "second")]
    return Chart(path, marks, title=title, x=first, y=second)


def _rings(table: pd.DataFrame, x: str, y: str) -> list[Mark]:
    rings = table[table["turn"]]
    return [] if rings.empty else [Point(x, y, symbol="diamond", label="turning point", data=rings)]
