"""Figure of forks: validation loss of trunks and forks over the steps, and the effect on the test loss by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lorascope.analysis.fork_effects import ForkEffects, fork_effects, independent_effects, pairs_of
from lorascope.charts.chart import Chart, Panels, set_side_by_side
from lorascope.charts.marks import Axis, Line, Mark, Point, Rule
from lorascope.plots.figure_registry import document_result
from lorascope.plots.requirements import missing_reason
from lorascope.plots.run_groups import axis_label
from lorascope.runs.manifest import Fork
from lorascope.runs.result import Result
from lorascope.runs.run import Run

TRUNK = "trunk"
_OTHER_SEEDS = "trunks of other seeds"


@document_result
def forks(forks: Result | Sequence[Result], margin: float | None = None) -> Panels:
    """Plot forks: validation loss over the steps, and the effect of each pair above that of independent seeds.

    Left, a fork that leaves its trunk after the vertical line shows the effect of the change; coinciding lines mean
    that there is none. Right, dots that are closer together than the ticks show what sharing a trunk saves. Caveat: the
    change acts from this step on, and a training with the change from the start may differ more.

    Parameters
    ----------
    forks : Run or sequence of Run
        Finished forks, whose trunks are next to them.
    margin : float, optional
        Largest effect in nats that makes no difference; see ``ls.fork_effects``.

    Raises
    ------
    ValueError
        A run is not a fork, or the validation loss was recorded at one step only.

    Examples
    --------
    ``forked`` are forks of several seeds with a lower learning rate.

    >>> ls.plots.forks(forked)
    """
    effects = fork_effects(forks, margin)
    pairs = pairs_of(forks)
    changes = list(effects.summary()["change"].unique())
    courses: list[pd.DataFrame] = []
    for fork, trunk in pairs:
        for run in (trunk, fork):
            if reason := missing_reason(run, "eval_loss", history=True):
                raise ValueError(f"forks needs {reason} (run {run.id}, {run.label})")
        courses.append(_course(trunk, TRUNK))
        course, step = _course(fork, _origin(fork).description), _origin(fork).step
        # From the last evaluation that both share, where the lines part.
        shared = course.loc[course["step"] <= step, "step"].max()
        courses.append(course[course["step"] >= shared])
    curves = pd.concat(courses, ignore_index=True).drop_duplicates(["run", "step"])
    is_trunk = curves["arm"] == TRUNK
    before = {}
    for fork, trunk in pairs:
        before[_origin(fork).description] = _values_of_trunk(trunk, _origin(fork))
    caption = _describe_effects(effects, before)
    steps = sorted(effects.table["step"].unique())
    left = Chart(
        curves,
        [
            Line("step", "value", "arm", stretch="run", muted=True, data=curves[is_trunk]),
            Line("step", "value", "arm", stretch="run", data=curves[~is_trunk]),
            *(Rule(x=step, label=f"step {step}") for step in steps if step),
        ],
        title="Validation loss",
        x=Axis(label="step"),
        y=Axis(label=axis_label("eval_loss")),
        caption=caption,
        colors=[TRUNK, *changes],
    )
    right = Chart(
        effects.table,
        _effect_marks(effects),
        title="Effect on the test loss",
        x=Axis(label="fork − trunk (nats)"),
        y=Axis(order=changes, compact=True),
        caption=caption,
        colors=[TRUNK, *changes],
    )
    return set_side_by_side(left, right, title="Forks of a training")


def _origin(fork: Run) -> Fork:
    assert fork.meta.fork is not None
    return fork.meta.fork


def _values_of_trunk(trunk: Run, origin: Fork) -> str:
    """Return the values of a trunk that its fork changes, such as "lr 0.01"; "" for changes without such a value."""
    options = trunk.meta.settings | trunk.meta.method
    values = {name: options[name] for name in origin.change if name in options}
    if not values:
        return ""
    return Fork(trunk.id, origin.step, values).description


def _course(run: Run, arm: str) -> pd.DataFrame:
    rows = run.table[run.table["quantity"] == "eval_loss"]
    return rows[["step", "value"]].assign(step=rows["step"].astype(int), run=run.id, arm=arm)


def _effect_marks(effects: ForkEffects) -> list[Mark]:
    """Return ticks of independent seeds, and above them a dot per pair; one pair has an interval over rows."""
    ticks: list[pd.DataFrame] = []
    for change, rows in effects.table.groupby("change", sort=False):
        ticks.append(pd.DataFrame({"effect": independent_effects(rows), "change": change}))
    marks: list[Mark] = [Rule(x=0)]
    independent = pd.concat(ticks)
    if len(independent):
        marks.append(Point("effect", "change", symbol="line-ns-open", label=_OTHER_SEEDS, data=independent))
    counts = effects.table.groupby("change")["effect"].transform("size")
    single, repeated = effects.table[counts == 1], effects.table[counts > 1]
    if len(single):
        marks.append(Point("effect", "change", "change", low="low", high="high", data=single))
    if len(repeated):
        marks.append(Point("effect", "change", "change", data=repeated))
    return marks


def _describe_effects(effects: ForkEffects, before: Mapping[str, str]) -> str:
    """Return the caption: what is shown, and the effect of each change; ``before`` has the values of the trunks."""
    sentences = ["Mean validation loss in nats, one line per run.", "Right: test loss of each fork minus its trunk."]
    if (effects.summary()["pairs"] > 1).any():
        sentences.append(f"Ticks: minus the {_OTHER_SEEDS}.")
    row: Any
    for row in effects.summary().itertuples():
        rows = effects.table[(effects.table["change"] == row.change) & (effects.table["step"] == row.step)]
        trunk_values = before.get(row.change) and f" (trunks {before[row.change]})"
        start = f"{row.change}{trunk_values or ''}, from step {row.step} ({100 * row.fraction:.0f}% of the training)"
        if rows["identical"].all():
            # An interval of width 0 would look like a mistake.
            sentences.append(f"{start}: effect 0, bitwise equal predictions.")
            continue
        count, over = (f"{row.pairs} pairs", "pairs") if row.pairs > 1 else ("1 pair", "test rows")
        verdict = f", {row.verdict}" if row.verdict else ""
        interval = f"{row.effect:+.3g} [{row.low:.3g}, {row.high:.3g}]"
        sentences.append(f"{start}: {interval} nats, 95% t-interval over {over}, {count}{verdict}.")
    return " ".join(sentences)
