"""Images of the study's figures: each contains the hash of the data that it shows, and is drawn again if that changes.

A figure of the second edition is one function and one row of ``papers.study_figures``; those of the first edition are
stored, see ``first_edition``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorascope.charts.chart import Drawable
from lorascope.charts.save import data_hash, save_small
from lorascope.files.typed_json import parse_json, to_typed


class StudyFigure(NamedTuple):
    """Figure of the study: the method or other heading under which pages list it, what it shows, and its chart."""

    heading: str
    alt: str
    chart: Drawable


def hash_in(image: Path) -> str:
    """Return the hash of the data that an image shows, or "" if there is no image or it has none."""
    from PIL import Image

    try:
        with Image.open(image) as opened:
            facts = to_typed(parse_json(opened.info.get("lorascope", "{}"), image), dict[str, Any], image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # no file, no image, or a damaged one
        return ""
    return str(facts.get("data_sha256", ""))


def image_differences(figures: Mapping[str, StudyFigure], folder: Path) -> Iterator[str]:
    """Return one line for each figure whose image is missing or shows other data."""
    for name, figure in figures.items():
        image_hash, chart_hash = hash_in(folder / f"{name}.png"), data_hash(figure.chart)
        if image_hash != chart_hash:
            yield f"figures/{name}.png: data_sha256: kept {image_hash[:12] or 'none'}, recomputed {chart_hash[:12]}"


def draw_images(figures: Mapping[str, StudyFigure], folder: Path) -> None:
    """Draw the images that are missing or show other data."""
    for line in image_differences(figures, folder):
        name = Path(line.partition(":")[0]).stem
        save_small(figures[name].chart, folder / f"{name}.png")
