"""Images of the study's figures: one that is missing, damaged or shows other data is named and drawn again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorascope.charts.chart import Chart
from lorascope.charts.marks import Point
from lorascope.charts.save import data_hash
from lorascope.papers.figures.study_images import StudyFigure, draw_images, hash_in, image_differences


def figure(x: float) -> StudyFigure:
    return StudyFigure("LoRA", "A point", Chart(pd.DataFrame({"x": [x], "y": [2.0]}), [Point("x", "y")]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_images({"point": figure(1.0)}, tmp_path)
    return tmp_path


def paint_black(image: Path) -> None:
    with Image.open(image) as opened:
        size, provenance = opened.size, opened.info["lorascope"]
    text = PngInfo()
    text.add_text("lorascope", provenance)
    Image.new("RGB", size).save(image, "PNG", pnginfo=text)


def test_drawn_image_contains_the_hash_of_its_data(folder: Path) -> None:
    chart = figure(1.0).chart
    assert hash_in(folder / "point.png") == data_hash(chart)
    assert list(image_differences({"point": figure(1.0)}, folder)) == []
    # The last digits of a number depend on the machine.
    assert list(image_differences({"point": figure(1.0 + 1e-12)}, folder)) == []


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda image: image.write_bytes(b"x"),
        lambda image: image.write_bytes(image.read_bytes()[:60]),
        lambda image: Image.new("RGB", (2, 2)).save(image),
    ],
)
def test_missing_or_damaged_image_is_named_and_drawn_again(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / "point.png")
    (line,) = image_differences({"point": figure(1.0)}, folder)
    assert line.startswith("figures/point.png: data_sha256: kept none, recomputed ")
    draw_images({"point": figure(1.0)}, folder)
    assert list(image_differences({"point": figure(1.0)}, folder)) == []


def test_image_of_other_data_is_named_and_drawn_again_and_others_stay(folder: Path) -> None:
    draw_images({"other": figure(5.0)}, folder)
    before = (folder / "other.png").stat().st_mtime_ns
    figures = {"point": figure(1.1), "other": figure(5.0)}
    (line,) = image_differences(figures, folder)
    assert line.startswith(f"figures/point.png: data_sha256: kept {data_hash(figure(1.0).chart)[:12]}, recomputed ")
    draw_images(figures, folder)
    assert list(image_differences(figures, folder)) == []
    assert (folder / "other.png").stat().st_mtime_ns == before


def test_pixels_have_no_signature(folder: Path) -> None:
    """Only the data that an image shows are compared."""
    paint_black(folder / "point.png")
    assert list(image_differences({"point": figure(1.0)}, folder)) == []
