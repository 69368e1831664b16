"""Readers of rendered figures: artists of matplotlib and traces of plotly, in one common form."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection, LineCollection, PathCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from lorascope.charts.chart import Drawable
from lorascope.charts.plotly_layout import WIDTH


def numbers(values: Any) -> list[float]:
    """Convert to rounded floats, NaN to None."""
    return [None if np.isnan(value) else round(float(value), 9) for value in np.ravel(np.asarray(values, dtype=float))]


class Mpl:
    """Reader of matplotlib figures; panels in order, without color bars."""

    def __init__(self, drawable: Drawable) -> None:
        self.figure = drawable.mpl()
        self.axes = self.panels_of(self.figure)

    @staticmethod
    def panels_of(figure: Figure) -> list[Axes]:
        """Return the axes of a figure without its color bars."""
        return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]

    def lines(self, panel: int = 0) -> list[tuple[list, list, str]]:
        drawn = [line for line in self.axes[panel].lines if line.get_transform() == self.axes[panel].transData]
        return [(numbers(line.get_xdata()), numbers(line.get_ydata()), to_hex(line.get_color())) for line in drawn]

    def styles(self, panel: int = 0) -> list[Any]:
        return [line._unscaled_dash_pattern for line in self.axes[panel].lines]

    def symbols(self, panel: int = 0) -> list[str]:
        """Return the outlines of the dots of each group."""
        drawn = [item for item in self.axes[panel].collections if isinstance(item, PathCollection)]
        return [str(item.get_paths()[0].vertices.round(3).tolist()) for item in drawn]

    def legend_styles(self) -> list[Any]:
        return [line._unscaled_dash_pattern for line in self.figure.legends[0].get_lines()]

    def bands(self, panel: int = 0) -> list[tuple[set, str]]:
        drawn = [item for item in self.axes[panel].collections if isinstance(item, FillBetweenPolyCollection)]
        return [
            (
                {tuple(map(float, corner)) for path in item.get_paths() for corner in path.vertices},
                to_hex(item.get_facecolor()[0]),
            )
            for item in drawn
        ]

    def dots(self, panel: int = 0) -> list[tuple[list, list, list[str]]]:
        drawn = [item for item in self.axes[panel].collections if isinstance(item, PathCollection)]
        return [
            (
                numbers(np.ma.filled(item.get_offsets(), np.nan)[:, 0]),
                numbers(np.ma.filled(item.get_offsets(), np.nan)[:, 1]),
                [to_hex(color) for color in item.get_facecolors()],
            )
            for item in drawn
        ]

    def diameters(self, panel: int = 0) -> list[float]:
        drawn = [item for item in self.axes[panel].collections if isinstance(item, PathCollection)]
        return numbers(np.sqrt(drawn[0].get_sizes()))

    def sizes(self) -> list[tuple[float, float]]:
        """Return width and height of the panels."""
        self.figure.draw_without_rendering()
        return [(box.width, box.height) for box in (ax.get_window_extent() for ax in self.axes)]

    def errors(self, panel: int = 0) -> list[tuple[float, float]]:
        """Return lower and upper ends, for vertical and horizontal bars."""
        drawn = [item for item in self.axes[panel].collections if isinstance(item, LineCollection)]
        ends = [np.ptp(segment, axis=0).argmax() for item in drawn for segment in item.get_segments()]
        segments = [segment for item in drawn for segment in item.get_segments()]
        return [tuple(numbers(segment[:, axis])) for axis, segment in zip(ends, segments, strict=True)]

    def bars(self, panel: int = 0) -> list[tuple[list, list, list, str]]:
        """Return (centers, bases, tops, color) of each group."""
        groups = []
        for group in (item for item in self.axes[panel].containers if isinstance(item, BarContainer)):
            boxes = [bar.get_bbox() for bar in group.patches]
            if group.orientation == "horizontal":
                sides = [
                    ((box.y0 + box.y1) / 2, bar.get_x(), bar.get_x() + bar.get_width())
                    for box, bar in zip(boxes, group.patches, strict=True)
                ]
            else:
                sides = [
                    ((box.x0 + box.x1) / 2, bar.get_y(), bar.get_y() + bar.get_height())
                    for box, bar in zip(boxes, group.patches, strict=True)
                ]
            groups.append(
                (*(numbers([side[k] for side in sides]) for k in range(3)), to_hex(group.patches[0].get_facecolor()))
            )
        return groups

    def heat(self, panel: int = 0) -> tuple[list, tuple[float, float]]:
        (image,) = self.axes[panel].findobj(lambda artist: isinstance(artist, AxesImage | QuadMesh))
        return numbers(np.ma.filled(image.get_array().astype(float), np.nan)), tuple(numbers(image.get_clim()))

    def hatched(self, panel: int = 0) -> bool:
        return any(patch.get_hatch() for patch in self.axes[panel].patches)

    def words(self, panel: int = 0) -> list[tuple[float, float, str]]:
        return [(*numbers(text.get_position()), text.get_text()) for text in self.axes[panel].texts]

    def names(self, letter: str, panel: int = 0) -> dict[float, str]:
        axis = getattr(self.axes[panel], f"{letter}axis")
        return {
            float(place): label.get_text()
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        }

    def ends(self, letter: str, panel: int = 0) -> tuple[float, float]:
        return tuple(map(float, getattr(self.axes[panel], f"get_{letter}lim")()))

    def is_log(self, letter: str, panel: int = 0) -> bool:
        return getattr(self.axes[panel], f"get_{letter}scale")() == "log"

    def legend(self) -> list[str]:
        return [text.get_text() for legend in self.figure.legends for text in legend.get_texts()]

    def color_bars(self) -> list[str]:
        return [ax.get_ylabel() for ax in self.figure.axes if ax.get_label() == "<colorbar>"]

    def title(self) -> str:
        return self.figure.get_suptitle()

    def caption(self) -> str:
        return " ".join(text.get_text() for text in self.figure.texts if text is not self.figure._suptitle)


class Plotly:
    """Reader of plotly figures."""

    def __init__(self, drawable: Drawable) -> None:
        self.figure = drawable.plotly()

    def _traces(self, kind: str, panel: int, data: Any = None) -> list[Any]:
        axis = f"x{panel + 1}" if panel else "x"
        traces = self.figure.data if data is None else data
        return [trace for trace in traces if trace.type == kind and trace.xaxis == axis]

    def _scatters(self, mode: str, panel: int, filled: bool = False) -> list[Any]:
        return [t for t in self._traces("scatter", panel) if t.mode == mode and bool(t.fill) == filled]

    def lines(self, panel: int = 0) -> list[tuple[list, list, str]]:
        return [(numbers(t.x), numbers(t.y), t.line.color) for t in self._scatters("lines", panel)]

    def styles(self, panel: int = 0) -> list[Any]:
        return [t.line.dash for t in self._scatters("lines", panel)]

    def symbols(self, panel: int = 0) -> list[str]:
        return [t.marker.symbol for t in self._scatters("markers", panel)]

    def legend_styles(self) -> list[Any]:
        return [t.line.dash for t in self.figure.data if t.showlegend]

    def bands(self, panel: int = 0) -> list[tuple[set, str]]:
        found = []
        for trace in self._scatters("lines", panel, filled=True):
            red, green, blue = (int(part) for part in trace.fillcolor.removeprefix("rgba(").split(",")[:3])
            corners = {(float(x), float(y)) for x, y in zip(trace.x, trace.y, strict=True) if np.isfinite(x)}
            found.append((corners, f"#{red:02x}{green:02x}{blue:02x}"))
        return found

    def dots(self, panel: int = 0) -> list[tuple[list, list, list[str]]]:
        return [(numbers(t.x), numbers(t.y), list(t.marker.color)) for t in self._scatters("markers", panel)]

    def diameters(self, panel: int = 0) -> list[float]:
        return numbers(self._scatters("markers", panel)[0].marker.size)

    def sizes(self) -> list[tuple[float, float]]:
        layout = self.figure.layout
        margin = layout.margin
        plot = WIDTH - margin.l - margin.r, layout.height - margin.t - margin.b
        panels = range(len(list(self.figure.select_xaxes())))
        domains = [[self._axis(letter, panel).domain for letter in "xy"] for panel in panels]
        return [tuple(side * np.ptp(ends) for side, ends in zip(plot, both, strict=True)) for both in domains]

    def errors(self, panel: int = 0) -> list[tuple[float, float]]:
        found = []
        for trace in [*self._scatters("markers", panel), *self._traces("bar", panel)]:
            lying = trace.error_x.array is not None
            error, value = (trace.error_x, trace.x) if lying else (trace.error_y, trace.y)
            if error.array is not None:
                value = np.asarray(value) + (trace.base if trace.type == "bar" else 0.0)
                found += zip(numbers(value - error.arrayminus), numbers(value + error.array), strict=True)
        return found

    def bars(self, panel: int = 0) -> list[tuple[list, list, list, str]]:
        found = []
        for trace in (t for t in self._traces("bar", panel) if t.marker.pattern.shape is None):
            place, length = (trace.y, trace.x) if trace.orientation == "h" else (trace.x, trace.y)
            tops = np.asarray(trace.base) + np.asarray(length)
            found.append((numbers(place), numbers(trace.base), numbers(tops), trace.marker.color))
        return found

    def heat(self, panel: int = 0) -> tuple[list, tuple[float, float]]:
        trace = self._traces("heatmap", panel)[0]
        axis = self.figure.layout[trace.coloraxis]
        return numbers(trace.z), tuple(numbers([axis.cmin, axis.cmax]))

    def hatched(self, panel: int = 0) -> bool:
        return any(len(t.x) for t in self._traces("bar", panel) if t.marker.pattern.shape is not None)

    def words(self, panel: int = 0) -> list[tuple[float, float, str]]:
        return [
            (*numbers(place), text)
            for t in self._scatters("text", panel)
            for *place, text in zip(t.x, t.y, t.text, strict=True)
        ]

    def _axis(self, letter: str, panel: int) -> Any:
        return self.figure.layout[f"{letter}axis{panel + 1 if panel else ''}"]

    def names(self, letter: str, panel: int = 0) -> dict[float, str]:
        axis = self._axis(letter, panel)
        return dict(zip(map(float, axis.tickvals), axis.ticktext, strict=True))

    def ends(self, letter: str, panel: int = 0) -> tuple[float, float]:
        ends = np.asarray(self._axis(letter, panel).range, dtype=float)
        return tuple(map(float, 10.0**ends if self.is_log(letter, panel) else ends))

    def is_log(self, letter: str, panel: int = 0) -> bool:
        return self._axis(letter, panel).type == "log"

    def legend(self) -> list[str]:
        return [trace.name for trace in self.figure.data if trace.showlegend]

    def color_bars(self) -> list[str]:
        keys = [key for key in self.figure.layout if key.startswith("coloraxis")]
        return [self.figure.layout[key].colorbar.title.text for key in sorted(keys)]

    def title(self) -> str:
        return self.figure.layout.title.text

    def caption(self) -> str:
        return " ".join(
            note.text.replace("<br>", " ") for note in self.figure.layout.annotations if note.yanchor == "top"
        )
