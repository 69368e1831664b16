"""Shapes of a panel as artists of matplotlib."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle

from lorascope.array_types import Bool
from lorascope.charts.geometry import Area, Bars, Cells, Curve, Dots, Errors, Numbers, Panel, Ruler, Shape, Words
from lorascope.charts.matplotlib_style import escape_dollar, keep_math
from lorascope.charts.scales import Limits, Ramp
from lorascope.charts.theme import FAINT, MUTED, STYLES

_PATTERNS = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (8, 2)), (0, (8, 2, 1, 2, 1, 2)))
DASHES: dict[str, Any] = dict(zip(STYLES["dash"], _PATTERNS, strict=True))
MARKERS = dict(zip(STYLES["shape"], "os^DvPX", strict=True))
MARKERS |= {f"{shape}-open": marker for shape, marker in MARKERS.items()} | {"line-ns-open": "|"}
THIN = 0.5  # width in points of a line between dots
LARGEST = 11.0  # diameter in points of the largest dot, if the area shows a column
# Vector cells can be edited and have no blur, but take 0.2 kB each; more of them are an image.
MOST_CELLS = 1000
SEAM = 0.2  # points: width of the edges of cells, which hide the gaps that viewers show between them


def draw_shape(ax: Axes, shape: Shape, panel: Panel, zorder: float) -> Any:
    """Draw one shape; return its artist if a legend can list it."""
    look: dict[str, Any]
    match shape:
        case Curve():
            look = {"color": shape.color, "linestyle": DASHES[shape.dash], "zorder": zorder}
            if shape.thin:
                look["linewidth"] = THIN
            return ax.plot(shape.x, shape.y, **look)[0]
        case Area():
            look = {"color": shape.color, "alpha": FAINT, "linewidth": 0, "zorder": zorder}
            return ax.fill_between(shape.x, shape.low, shape.high, **look)
        case Errors():
            # From low to high, which need not contain the value.
            lines = ax.hlines if shape.lying else ax.vlines
            lines(shape.position, shape.low, shape.high, colors=shape.colors, linewidth=0.9, zorder=zorder)
        case Dots():
            if shape.errors:
                draw_shape(ax, shape.errors, panel, zorder)
            areas: Any = matplotlib.rcParams["lines.markersize"] ** 2
            if shape.share is not None:
                areas = LARGEST**2 * shape.share
            look = {"c": shape.colors, "edgecolors": panel.theme.background, "linewidths": 0.3}
            if shape.symbol == "line-ns-open":  # it is as high as two dots, and has no edge
                look, areas = {"c": shape.colors, "linewidths": 1.2}, 4 * areas
            elif shape.symbol.endswith("-open"):  # it covers its error bar
                look |= {"c": panel.theme.background, "edgecolors": shape.colors, "linewidths": 0.9}
            # A dot on the edge of the axes is drawn whole.
            is_inside = _are_between(shape.x, panel.x.limits) & _are_between(shape.y, panel.y.limits)
            look |= {"marker": MARKERS[shape.symbol], "zorder": zorder, "clip_on": not is_inside.all()}
            return ax.scatter(shape.x, shape.y, areas, **look)
        case Bars():
            bars, start = (ax.barh, "left") if shape.lying else (ax.bar, "bottom")
            look = {start: shape.base, **fill_settings(shape.color, shape.hatch)}
            if shape.errors:
                draw_shape(ax, shape.errors, panel, zorder)
            return bars(shape.position, shape.top - shape.base, shape.width, zorder=zorder, **look)
        case Cells() if shape.values.size:
            if np.isnan(shape.values).any():
                rows, columns = shape.values.shape
                look = {"facecolor": panel.theme.missing, "edgecolor": panel.theme.hatch, "hatch": "////////"}
                ax.add_patch(Rectangle((-0.5, -0.5), columns, rows, linewidth=0, zorder=zorder, **look))
            colors = color_scale(shape.ramp)
            look = {"cmap": colors.cmap, "norm": colors.norm, "zorder": zorder}
            if shape.values.size > MOST_CELLS:
                ax.imshow(shape.values, aspect="auto", interpolation="nearest", **look)
            else:
                rows, columns = shape.values.shape
                edges = np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5
                ax.pcolormesh(*edges, shape.values, edgecolors="face", linewidth=SEAM, **look)
        case Ruler():
            look = {"color": panel.theme.ink, "linewidth": 0.8, "linestyle": (0, (4, 2))}
            note: dict[str, Any] = {"size": text_size(ax), "zorder": 4, "textcoords": "offset points"}
            text = keep_math(shape.label)
            if shape.y is not None:
                ax.axhline(shape.y, zorder=zorder, **look)
                anchor, axis = (0.99, shape.y), ax.get_yaxis_transform()
                ax.annotate(text, anchor, (-2, 1), axis, ha="right", va="bottom", **note)
            if shape.x is not None:
                ax.axvline(shape.x, zorder=zorder, **look)
                across, shift = "left", 2
                if shape.x > np.mean(panel.x.limits):  # in the right half, the label extends to the left
                    across, shift = "right", -2
                anchor, axis = (shape.x, 0.98), ax.get_xaxis_transform()
                ax.annotate(text, anchor, (shift, -1), axis, ha=across, va="top", rotation=90, **note)
        case Words():
            for x, y, text in zip(shape.x, shape.y, shape.text, strict=True):
                if np.isfinite(x) and np.isfinite(y):
                    write_text(ax, x, y, text, size=text_size(ax), zorder=zorder, alpha=MUTED if shape.muted else 1.0)
    return None


def text_size(ax: Axes) -> float:
    """Return the font size of text inside axes, slightly smaller than that of the axis labels."""
    return 0.9 * float(ax.xaxis.label.get_fontsize())


def color_scale(ramp: Ramp) -> ScalarMappable:
    """Return the mapping of values to the colors of a color bar, transparent for missing values."""
    colors: Any = LinearSegmentedColormap.from_list(ramp.label or "ramp", ramp.colors)
    colors = colors.with_extremes(bad=(0, 0, 0, 0))
    colors.colorbar_extend = ramp.beyond
    return ScalarMappable(Normalize(*ramp.limits), colors)


def write_text(ax: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write text centered at a position."""
    ax.text(x, y, escape_dollar(text), ha="center", va="center", **style)


def fill_settings(color: str, hatch: str) -> dict[str, Any]:
    """Return the settings of a bar, whose hatch and edge distinguish it in gray from the next one of a stack."""
    edge = matplotlib.rcParams["axes.facecolor"]
    return {"facecolor": color, "edgecolor": edge, "hatch": 2 * hatch, "linewidth": 0.3}


def _are_between(values: Numbers, limits: Limits) -> Bool[np.ndarray, "n"]:
    low, high = sorted(limits)
    return np.isnan(values) | ((low <= values) & (values <= high))
