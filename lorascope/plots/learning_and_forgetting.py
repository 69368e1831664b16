"""Figures of a dial: what parts of an update buy and cost, and both over their scale."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lorascope.analysis.dial import KEEP, TASK, WHOLE, Dial
from lorascope.charts.chart import Chart, Drawable, set_side_by_side
from lorascope.charts.marks import Axis, Band, Line, Mark, Point, Rule
from lorascope.plots.figure_registry import document_result

_ROWS = "95% intervals over rows; they do not cover the seed of the training"
_LEARN, _FORGET = "learn (nats of task loss)", "forget"
_MARGINS, _PROPORTION, _INTRUDER = "even share", "whole update", "intruder dimension"
_PARTS = 8  # curves that are distinguished by color


@document_result
def learn_forget(dial: Dial) -> Chart:
    """Plot what each part of an update buys on the task against what it costs elsewhere.

    Parts to the right lower the task loss, and parts further up move the model away from its base. Parts in the gray
    box have neither effect beyond the even share of a part. Intruder dimensions have a ring.

    Parameters
    ----------
    dial : Dial
        Result of ``ls.dial``. Parts that were not removed are not drawn.

    Examples
    --------
    ``dialed`` is ``ls.dial(run, model, task, keep)``.

    >>> ls.plots.learn_forget(dialed)
    """
    removed = dial.parts[dial.parts["exact"]]
    parts = removed[removed["part"] != WHOLE]
    whole = removed.iloc[0]
    color = "role" if parts["role"].notna().all() else "verdict"
    unit = dial.unit
    box = pd.DataFrame({"learn": [-dial.learn_margin, dial.learn_margin]})
    box = box.assign(low=-dial.forget_margin, high=dial.forget_margin, color=_MARGINS)
    marks: list[Mark] = [Band("learn", "low", "high", "color", data=box, muted=True)]
    intruders = parts[~parts["control"]].assign(ring=1.0)
    if dial.receipt.call.get("by") == "intruder" and len(intruders):
        # Rings are as large as the largest dots, and filled, so that dots and intervals are drawn after them.
        marks.append(
            Point("learn", "forget", size="ring", symbol="circle-open", label=_INTRUDER, muted=True, data=intruders)
        )
    marks += [
        Line("learn", "forget", color, dash="line", stretch="part", data=_crosses(parts)),
        # Roles and the box may take all colors of the palette, whose first one would come again.
        Line("learn", "forget", dash="line", muted=True, data=_proportion(parts, whole)),
        Point("learn", "forget", color, data=parts[~parts["control"]]),
    ]
    if parts["control"].any():
        marks.append(Point("learn", "forget", color, data=parts[parts["control"]], hollow=True))
    sentences = [f"Each dot is a part of the update of {dial.label}; effects of removing it, {_ROWS}."]
    sentences.append("Dashed: forgetting per learning of the whole update.")
    if parts["control"].any():
        sentences.append("Hollow: controls, of the same or the closest size.")
    outside = (parts["learn"].abs() > dial.learn_margin) | (parts["forget"].abs() > dial.forget_margin)
    if not outside.any():
        sentences.append("No part is outside the margins.")
    return Chart(
        parts,
        marks,
        title="Learning against forgetting by part",
        x=Axis(label=_LEARN),
        y=Axis(label=f"{_FORGET} ({unit} from the base)"),
        colors=[*dict.fromkeys(parts[color]), _MARGINS],
        caption=" ".join(sentences),
        meta={"figure": "learn_forget", "receipt": dial.receipt.to_json()},
    )


def _crosses(parts: pd.DataFrame) -> pd.DataFrame:
    """Return the intervals of every part as two lines, one on either axis."""
    arms = []
    for direction, other in (("learn", "forget"), ("forget", "learn")):
        for end in ("low", "high"):
            arm = parts[["part", "role", "verdict", other]].assign(**{direction: parts[f"{direction}_{end}"]})
            arms.append(arm.assign(part=parts["part"] + f" {direction}"))
    return pd.concat(arms, ignore_index=True).assign(line="95% interval")


def _proportion(parts: pd.DataFrame, whole: pd.Series) -> pd.DataFrame:
    """Return the line on which parts forget as much per learning as the whole update does."""
    reach = min(parts["learn_high"].max(), parts["forget_high"].max() * whole["learn"] / whole["forget"])
    ends = pd.Series([0.0, max(reach, 0.0)])
    table = pd.DataFrame({"learn": ends, "forget": ends * whole["forget"] / whole["learn"]})
    return table.assign(line=_PROPORTION)


@document_result
def dial(dial: Dial, parts: Sequence[str] = (WHOLE,)) -> Drawable:
    """Plot task loss and distance from the base over the scale of parts of an update.

    At scale 1 is the trained model, at 0 the model without the part. The diamond is the best scale of a part, if it
    forgets less than scale 1 by an interval that excludes 0.

    Parameters
    ----------
    dial : Dial
        Result of ``ls.dial``.
    parts : sequence of str
        Parts with curves, such as ``dial.top(4)``, by default the whole update.

    Raises
    ------
    ValueError
        A part is unknown or has no curve, or there are more than 8.

    Examples
    --------
    ``dialed`` is ``ls.dial(run, model, task, keep)``.

    >>> ls.plots.dial(dialed, ["whole", *dialed.top(2)])
    """
    if not 1 <= len(parts) <= _PARTS:
        raise ValueError(f"parts must be 1 to {_PARTS} parts with curves, got {len(parts)}")
    curves = pd.concat([dial.curve(part) for part in parts])
    best = dial.best()
    panels = []
    for axis, label in ((TASK, "change of the task loss (nats)"), (KEEP, f"change of the distance ({dial.unit})")):
        curve = curves[curves["axis"] == axis]
        marks: list[Mark] = [
            Band("scale", "low", "high", "part"),
            Line("scale", "change", "part"),
            Rule(x=0),
            Rule(x=1),
        ]
        # Only scales that are shown to forget less than scale 1.
        is_best = (curves["axis"] == KEEP) & (curves["scale"] == curves["part"].map(best)) & (curves["high"] < 0)
        best_points = curve.merge(curves.loc[is_best, ["part", "scale"]])
        if len(best_points):
            marks.append(Point("scale", "change", "part", data=best_points, symbol="diamond"))
        panels.append(
            Chart(
                curve,
                marks,
                title="Task" if axis == TASK else "Other text",
                x=Axis(label="scale (0 without, 1 as trained)"),
                y=Axis(label=label),
                caption=f"{dial.label}; change from scale 1, paired by row; bands: {_ROWS}. Diamond: best scale.",
                meta={"figure": "dial", "receipt": dial.receipt.to_json()},
            )
        )
    return set_side_by_side(*panels, title="Effect of the scale of an update")
