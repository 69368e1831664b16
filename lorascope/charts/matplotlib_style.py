"""Settings of matplotlib for a theme, and text that matplotlib draws as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.mathtext import MathTextParser

from lorascope.charts.math_text import replace_math
from lorascope.charts.theme import THEMES, Theme, readable_ink
from lorascope.files.printable import printable_lines

# A figure has the size that save() is called with, and its own layout.
_FIXED: dict[Any, Any] = {"savefig.bbox": None, "figure.autolayout": False, "figure.constrained_layout.use": False}
_OF_THE_PROGRAM = ("backend", "backend_fallback", "interactive", "toolbar")


def _caller_settings() -> dict[Any, Any]:
    """Return the settings of matplotlib that the caller has changed."""
    changed: dict[Any, Any] = {}
    for name, default in matplotlib.rcParamsDefault.items():
        if name not in _OF_THE_PROGRAM and matplotlib.rcParams[name] != default:
            changed[name] = matplotlib.rcParams[name]
    return changed


def caller_theme(look: Theme) -> Theme:
    """Return a theme with the colors and the font size that the caller has set in matplotlib."""
    changed = _caller_settings()
    fields: dict[str, Any] = {}
    for field, setting in (("background", "axes.facecolor"), ("ink", "text.color")):
        if setting in changed:
            fields[field] = to_hex(changed[setting])
    if "font.size" in changed:
        fields["size"] = changed["font.size"]
    if "axes.prop_cycle" in changed and look.palette in (THEMES["light"].palette, THEMES["dark"].palette):
        colors = changed["axes.prop_cycle"].by_key().get("color", look.palette)
        fields["palette"] = list(map(to_hex, colors))
    if "background" in fields and readable_ink(fields["background"]) != readable_ink(look.background):
        opposite = THEMES["dark" if readable_ink(look.background) == "#000000" else "light"]
        fields = {"missing": opposite.missing, "hatch": opposite.hatch, "reach": opposite.reach, **fields}
    return replace(look, **fields)


def style(look: Theme) -> Any:
    """Return a context with the sizes and colors of a theme; settings of the caller replace them."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    texts = ("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize")
    settings: dict[Any, Any] = {
        **dict.fromkeys(ink, look.ink),
        **dict.fromkeys(ground, look.background),
        **dict.fromkeys((*texts, "legend.fontsize", "legend.title_fontsize"), look.size),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 0.93 * look.size),
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
        **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 1.5),
        **{"axes.titlelocation": "left", "axes.titlepad": 4.0, "axes.labelpad": 2.5, "figure.titleweight": "bold"},
        **{"axes.spines.top": False, "axes.spines.right": False, "grid.color": look.grid, "grid.linewidth": 0.5},
        **{"lines.linewidth": 1.2, "lines.markersize": 4.0, "hatch.linewidth": 0.5},
        **{"legend.frameon": False, "savefig.dpi": 300},
        # Embed TrueType fonts, since many journals reject type 3.
        "pdf.fonttype": 42,
        # Text that can be searched, and edited for a paper, instead of outlines.
        "svg.fonttype": "none",
        # With fixed ids, equal figures give equal bytes.
        "svg.hashsalt": "lorascope",
    }
    return matplotlib.rc_context({**settings, **_caller_settings(), **_FIXED})


def keep_math(text: str) -> str:
    """Escape text that an author wrote: math that matplotlib can draw remains."""
    return replace_math(printable_lines(text), escape_dollar, _require_math)


def _require_math(math: str) -> str:
    """Return math with its dollar signs. Raise ValueError if matplotlib cannot draw it."""
    MathTextParser("path").parse(f"${math}$")
    return f"${math}$"


def escape_dollar(text: str) -> str:
    """Escape text: a dollar sign does not start math, and a control character does not break an SVG."""
    return printable_lines(text).replace("$", r"\$")
