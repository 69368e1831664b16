"""Page of a reading: a card per component, with its words, what it writes, and rows whose words are shaded."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from lorascope.analysis.reading import Reading
from lorascope.pages.page import Section, write
from lorascope.pages.report_figure import ReportFigure
from lorascope.plots.component_reading import MISLEADS, READS, reading

_LEAD = (
    "Words that the components of an update use, and the output that each raises where they occur. Words are contexts "
    "in these rows; intervals are over rows and do not cover the seed of the training. In the rows with the largest "
    "activations, a green word raises the margin of the label and a red one lowers it."
)
_COLUMNS = ["word", "occurrences", "contribution", "low", "high", "q", "random_p", "written", "effect", "verdict"]


def write_reading(path: str | Path, result: Reading) -> Path:
    """Write the cards of a reading as one HTML file that works offline.

    Raises
    ------
    FileExistsError
        ``path`` exists, and lorascope did not write it, or it has changed since.
    """
    sections = []
    for card in result.cards:
        sections.append(
            Section(
                f"card-{card.number}",
                card.title,
                card.description,
                tables={"Words": card.words[_COLUMNS]},
                figures=[ReportFigure(reading(result, card.number), READS, MISLEADS)],
                # Its words are escaped where the spans are made.
                passages=Markup(card.passages_html()),
            )
        )
    return write(path, f"Reading of {result.label}", _LEAD, sections, {"receipt": str(result.receipt)})
