"""Settings of matplotlib for a theme, and text that matplotlib draws as it is."""

from __future__ import annotations

from typing import Any

import matplotlib.style

from lorascope.charts.theme import Theme
from lorascope.files.printable import printable_lines


def style(look: Theme) -> Any:
    """Return a context with matplotlib's own defaults and the sizes and colors of a theme."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    texts = ("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize")
    settings: dict[str, Any] = {
        **dict.fromkeys(ink, look.ink),
        **dict.fromkeys(ground, look.background),
        **dict.fromkeys((*texts, "legend.fontsize", "legend.title_fontsize"), look.size),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 0.93 * look.size),
        **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
        **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
        **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 1.5),
        **{"axes.titlelocation": "left", "axes.titlepad": 4.0, "axes.labelpad": 2.5, "figure.titleweight": "bold"},
        **{"lines.linewidth": 1.2, "hatch.linewidth": 0.5, "legend.frameon": False, "savefig.dpi": 300},
        # Embed TrueType fonts, since many journals reject type 3.
        "pdf.fonttype": 42,
        # With fixed ids, equal figures give equal bytes.
        "svg.hashsalt": "lorascope",
    }
    # Reset first, so that the caller's settings have no effect.
    return matplotlib.style.context(settings, after_reset=True)


def escape_dollar(text: str) -> str:
    """Escape text: a dollar sign does not start math, and a control character does not break an SVG."""
    return printable_lines(text).replace("$", r"\$")
