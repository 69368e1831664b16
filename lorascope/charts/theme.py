"""Colors and sizes, the same for both renderers.

Categories use the hues of Okabe and Ito (Color Universal Design, 2008). The lightness of the first four differs by ten
or more, so that they are distinguished in gray, and every color has a contrast of at least 3 to the background, which
lines and dots need. Quantities use viridis. Signed quantities use ColorBrewer's RdBu,
reversed and centered at zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"]
RED_BLUE = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7"]
RED_BLUE += ["#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"]
ON_LIGHT = ["#0072b2", "#e2640b", "#006045", "#641a55", "#d3609f", "#858585", "#000000", "#8f8500"]
ON_DARK = ["#56b4e9", "#ffbc47", "#009e73", "#aa4a82", "#f0e442", "#e8641a", "#ffffff", "#9a9a9a"]

FAINT = 0.18  # opacity of bands
MUTED = 0.65  # opacity of gray text; its contrast is at least 4.5
# Inches: one column and, with "-page", the full width of a page with two columns.
WIDTHS = {
    "column": 3.3,
    "page": 6.9,
    "neurips": 5.5,  # neurips_2025.sty: textwidth=5.5in
    "iclr": 5.5,  # iclr2026_conference.sty: \textwidth 5.5 true in
    "icml": (6.75 - 0.25) / 2,  # icml2025.sty: \textwidth 6.75in, \columnsep 0.25in
    "icml-page": 6.75,
    "acl": (16 - 0.6) / 2 / 2.54,  # acl.sty: A4 with margin=2.5cm, \columnsep 0.6cm
    "acl-page": 16 / 2.54,
    "aaai": (7 - 0.375) / 2,  # aaai25.sty: \textwidth 7.0in, \columnsep 0.375in
    "aaai-page": 7.0,
    "ieee": (516 - 12) / 2 / 72.27,  # IEEEtran.cls: \textwidth 43pc, \columnsep 1pc; 12 of 72.27 points
    "ieee-page": 516 / 72.27,
    "jmlr": 6.0,  # jmlr2e.sty: \textwidth 6.0 true in
    "tmlr": 6.5,  # tmlr.sty: \textwidth 6.5 true in
    "nature": 8.9 / 2.54,  # research-figure-guide.nature.com, "Figure sizing": 89 mm and 183 mm
    "nature-page": 18.3 / 2.54,
}
MIN_WIDTH, MAX_WIDTH = 1.0, 40.0  # inches
# Dash patterns, shapes of dots and hatches of bars, by plotly's names.
STYLES = {
    "dash": ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"],
    "shape": ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"],
    "hatch": ["", "", "", "\\", "/", ".", "", "x"],  # of colors about as light as others
}


@dataclass(frozen=True)
class Theme:
    """Theme: colors as ``#rrggbb``, ``size`` of text in points, and ``reach``, the part of viridis that is visible.

    Categories in ``by_label`` have their own colors instead of those of the palette.
    """

    background: str
    ink: str
    grid: str
    missing: str
    hatch: str
    size: float
    palette: list[str] = field(default_factory=lambda: ON_LIGHT)
    reach: tuple[float, float] = (0.0, 0.59)
    by_label: Mapping[str, str] = field(default_factory=dict)

    def category(self, index: int, count: int) -> str:
        """Return the color of one of ``count`` categories: of the palette, or viridis for more than twice as many.

        Lines and dots with the same color differ in dash and marker.
        """
        if count <= 2 * len(self.palette):
            return self.palette[index % len(self.palette)]
        return self.color_at(index / (count - 1))

    def color_at(self, share: float) -> str:
        """Return the color of a line or dot at fraction ``share`` (0 to 1) of a scale, by linear interpolation."""
        start, stop = self.reach
        return mix_colors(VIRIDIS, start + share * (stop - start))

    @property
    def gray(self) -> str:
        """Color of muted lines: that of gray text."""
        return mix_colors([self.background, self.ink], MUTED)

    @property
    def ramp(self) -> list[str]:
        """Colors of a scale for lines and dots, evenly spaced from its low end to its high end."""
        return [self.color_at(step / 9) for step in range(10)]


THEMES = {
    "light": Theme("#ffffff", "#222222", "#e4e4e4", "#f7f7f7", "#c4c4c4", 8.0),
    "dark": Theme("#16181d", "#e6e6e6", "#363a43", "#1d2026", "#4a4f5a", 8.0, ON_DARK, (0.35, 1.0)),
    "paper": Theme("#ffffff", "#000000", "#e4e4e4", "#f7f7f7", "#c4c4c4", 7.5),
}
PALETTE_SIZE = len(ON_LIGHT)


def theme(name: str) -> Theme:
    """Return a theme for figures by name."""
    if name not in THEMES:
        raise ValueError(f"theme must be one of {', '.join(map(repr, THEMES))}, got {name!r}")
    return THEMES[name]


def width_in_inches(width: str | float) -> float:
    """Return the width of a figure in inches from a number of inches or a name of `WIDTHS`."""
    try:
        inches = float(WIDTHS.get(str(width).lower(), width))
    except ValueError:
        inches = math.nan
    if not MIN_WIDTH <= inches <= MAX_WIDTH:
        allowed = f"inches from {MIN_WIDTH:g} to {MAX_WIDTH:g} or one of {', '.join(map(repr, WIDTHS))}"
        raise ValueError(f"width must be {allowed}, got {width!r}")
    return inches


def mix_colors(colors: list[str], share: float) -> str:
    """Return the color at fraction ``share`` (0 to 1) of a scale of evenly spaced theme colors."""
    position = min(max(share, 0.0), 1.0) * (len(colors) - 1)
    low = min(int(position), len(colors) - 2)
    mixed = zip(channels(colors[low]), channels(colors[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (position - low) * (b - a)):02x}" for a, b in mixed)


def channels(color: str) -> tuple[int, int, int]:
    """Return red, green and blue of a theme's color ``#rrggbb``, 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def readable_ink(color: str) -> str:
    """Return white or black, the one with more contrast to a theme's color: at least 4.58 : 1 on any color."""
    if contrast("#ffffff", color) > contrast("#000000", color):
        return "#ffffff"
    return "#000000"


def contrast(color: str, other: str) -> float:
    """Return the contrast of two colors of a theme, 1 to 21.

    Source: Web Content Accessibility Guidelines 2.2, "contrast ratio" and "relative luminance".
    """
    dark, light = sorted(map(_luminance, (color, other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    linear = []
    for channel in channels(color):
        share = channel / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
