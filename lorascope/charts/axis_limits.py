"""Axis limits of a figure: every frame fits, and panels with the same axis label share their limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lorascope.charts.chart import Bar
from lorascope.charts.geometry import Area, Bars, Curve, Dots, Panel, Ruler, Shade, Shape, Words
from lorascope.charts.scales import Scale

PAD = 0.04  # fraction of the range left free at each end of a numeric axis

Limits = tuple[float, float]


def ranges(panels: Sequence[Panel], frames: Sequence[Any]) -> list[tuple[Limits, Limits]]:
    """Return the limits of x and y of every panel, left or bottom end first.

    Limits are values on a numeric axis and positions on a categorical one. A categorical y axis runs downwards. Numeric
    axes with the same label and scale share their limits, unless ``Axis.limits`` sets them.
    """
    reaches = [_reach(panel, frames) for panel in panels]
    sides = [
        [_axis_ends(panel, letter, panels, [reach[side] for reach in reaches]) for panel in panels]
        for side, letter in enumerate("xy")
    ]
    return list(zip(*sides, strict=True))


def _axis_ends(panel: Panel, letter: str, panels: Sequence[Panel], reaches: Sequence[Float[np.ndarray, "_"]]) -> Limits:
    """Return the limits of one axis of one panel."""
    scale: Scale = getattr(panel, letter)
    if scale.categories is not None:
        # An axis without categories still needs a length.
        last = max(len(scale.categories), 1) - 0.5
        return (-0.5, last) if letter == "x" else (last, -0.5)
    kin = [
        index for index, other in enumerate(panels) if other is panel or _is_same_axis(scale, getattr(other, letter))
    ]
    anchored = any(isinstance(mark, Bar) for index in kin for mark in panels[index].chart.marks)
    low, high = _pad_ends(np.concatenate([reaches[index] for index in kin]), scale.log, anchored)
    start, stop = scale.axis.limits or (None, None)
    return (low if start is None else float(start), high if stop is None else float(stop))


def _is_same_axis(one: Scale, other: Scale) -> bool:
    """Return whether two numeric axes have the same label and scale."""
    labelled = one.axis.label != "" and one.axis.label == other.axis.label
    return labelled and other.categories is None and one.log == other.log


def _pad_ends(reach: Float[np.ndarray, "n"], log: bool, anchored: bool) -> Limits:
    """Return limits around numbers; on an axis with bars, a limit at zero is not padded."""
    numbers = reach[reach > 0] if log else reach[np.isfinite(reach)]
    if not numbers.size:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = float(numbers.min()), float(numbers.max())
    if log:
        # At most a factor of 1000, even if the values are hundreds of decades apart.
        pad = min(high**PAD / low**PAD, 1e3) if high > low else 2.0
        return max(low / pad, np.finfo(float).tiny), high * pad
    pad = PAD * ((high - low) or abs(high) or 1.0)
    return low if anchored and low == 0 < high else low - pad, high if anchored and high == 0 > low else high + pad


def _reach(panel: Panel, frames: Sequence[Any]) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"]]:
    """Return all x and y positions that a panel must show, in any frame."""
    corners = [_corners(shape) for frame in frames or [None] for shape in panel.shapes(frame)]
    x, y = (
        np.concatenate([np.empty(0), *(np.ravel(part) for pair in corners for part in pair[side])]) for side in (0, 1)
    )
    return x, y


def _corners(shape: Shape) -> tuple[list[Any], list[Any]]:
    """Return the outermost positions of a shape on x and on y, as numbers and arrays."""
    match shape:
        case Curve() | Words():
            return [shape.x], [shape.y]
        case Area():
            return [shape.x], [shape.low, shape.high]
        case Dots():
            return (
                _swap_if_lying([shape.x], [shape.y], shape)
                if not shape.lying
                else _swap_if_lying([shape.y], [shape.x], shape)
            )
        case Bars():
            sides = [shape.place - shape.width / 2, shape.place + shape.width / 2]
            return _swap_if_lying(sides, [shape.base, shape.top], shape)
        case Ruler():
            return _drop_none(shape.x), _drop_none(shape.y)
        case Shade():
            return [shape.x0, shape.x1], []
    return [], []


def _swap_if_lying(across: list[Any], along: list[Any], shape: Dots | Bars) -> tuple[list[Any], list[Any]]:
    """Return positions across and along the bars, including error bars, as positions on x and y."""
    along = along + _drop_none(shape.low, shape.high)
    return (along, across) if shape.lying else (across, along)


def _drop_none(*positions: Any) -> list[Any]:
    return [position for position in positions if position is not None]
