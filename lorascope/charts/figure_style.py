"""Style of all figures that are drawn next: theme and colors of categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from lorascope.charts.theme import Theme, channels, theme

Palette = Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class FigureStyle:
    """Style in use: ``theme`` is a name, and ``palette`` has colors in order or by label."""

    theme: str | None = None
    palette: Palette | None = None


_style = FigureStyle()


def set_style(theme: str | None = None, palette: Palette | None = None) -> AbstractContextManager[Any]:
    """Set the style of the figures that are drawn next; in a ``with`` statement, only of those in its block.

    What is left out remains as it is; ``set_style()`` resets both. Set fonts and line widths by ``matplotlib.rcParams``
    or ``plt.style``, which figures respect.

    Parameters
    ----------
    theme : {"light", "dark", "paper"}, optional
        Theme of figures that are drawn without one.
    palette : sequence or mapping, optional
        Colors ``#rrggbb`` of categories: in the order of the legend, or by label, such as ``{"LoRA": "#d55e00"}``.
        Labels that a mapping does not have keep their colors.

    Returns
    -------
    context manager
        It restores the previous style at its end.

    Examples
    --------
    >>> lorascope.set_style("dark")  # doctest: +SKIP
    >>> with lorascope.set_style("paper", {"LoRA": "#d55e00", "full": "#000000"}):  # doctest: +SKIP
    ...     chart.save("norms.pdf", width="icml")
    """
    global _style
    previous = _style
    new_style = FigureStyle()
    if theme is not None or palette is not None:
        new_style = FigureStyle(theme or previous.theme, previous.palette if palette is None else palette)
    figure_theme(None, "light", new_style.palette, new_style)
    _style = new_style
    block = ExitStack()
    block.callback(_restore_style, previous)
    return block


def _restore_style(previous: FigureStyle) -> None:
    """Set the style that was in use before a block."""
    global _style
    _style = previous


def figure_theme(
    name: str | None, default: str, palette: Palette | None = None, style: FigureStyle | None = None
) -> Theme:
    """Return the theme of a figure: ``name``, else that of the style in use, else ``default``, with its colors."""
    style = style or _style
    look = theme(name or style.theme or default)
    colors = style.palette if palette is None else palette
    if colors is None:
        return look
    listed_colors = list(colors.values()) if isinstance(colors, Mapping) else list(colors)
    for color in listed_colors:
        _require_color(color)
    if isinstance(colors, Mapping):
        return replace(look, by_label=dict(colors))
    if not listed_colors:
        raise ValueError("palette must have at least one color, got none")
    return replace(look, palette=listed_colors)


def _require_color(color: str) -> None:
    """Raise ValueError if a color is not written as in a theme."""
    try:
        is_color = len(color) == len("#rrggbb") and color.startswith("#") and len(channels(color)) == 3
    except ValueError:
        is_color = False
    if not is_color:
        raise ValueError(f"colors of a palette must be written as '#rrggbb', got {color!r}")
