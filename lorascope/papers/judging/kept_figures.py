"""Kept figures: the data of charts that were drawn from runs of the evidence.

``figures/NAME.parquet`` has the data of a chart; its metadata has the heading and the description of the figure and
the runs that it shows. The image next to the pages, ``NAME.png``, contains the SHA-256 of this file and of its pixels.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from PIL import Image

from lorascope.files.parquet_tables import read_table
from lorascope.files.png_pixels import pixel_digest
from lorascope.files.printable import printable
from lorascope.files.typed_json import parse_json, to_typed, unreadable
from lorascope.files.whole_files import write_bytes

FOLDER = "figures"
"""Folder of the data in a folder of evidence, and of the images in a clone of the repository."""
_METADATA = b"lorascope"  # key of the description in the metadata of a Parquet file


@dataclass(frozen=True)
class FigureAbout:
    """Description of a kept figure: where it is listed, what it shows, and from which runs.

    Parameters
    ----------
    heading : str
        Method, or another heading under which the figure is listed.
    alt : str
        What it shows, in one line.
    runs : tuple of str
        Ids of its runs in ``runs.csv``.
    commit : str
        Commit that drew it.
    """

    heading: str
    alt: str
    runs: tuple[str, ...]
    commit: str


@dataclass(frozen=True)
class KeptFigure:
    """Kept figure: its description, and the SHA-256 of the file with its data."""

    about: FigureAbout
    digest: str


def write(folder: Path, name: str, table: pd.DataFrame, about: FigureAbout) -> KeptFigure:
    """Write a kept figure, the data of a chart, to a folder of evidence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, buffer = pa.Table.from_pandas(table, preserve_index=False), io.BytesIO()
    data = data.replace_schema_metadata({**data.schema.metadata, _METADATA: msgspec.json.encode(about)})
    pq.write_table(data, buffer, compression="zstd")
    write_bytes(folder / FOLDER / f"{name}.parquet", buffer.getvalue())
    return KeptFigure(about, hashlib.sha256(buffer.getvalue()).hexdigest())


def read(folder: Path) -> dict[str, KeptFigure]:
    """Read the kept figures of a folder of evidence: what they show, by name.

    Raises
    ------
    ValueError
        A file is damaged or has no description.
    """
    return {file.stem: _read_figure(file) for file in sorted((folder / FOLDER).glob("*.parquet"))}


def _read_figure(file: Path) -> KeptFigure:
    import pyarrow as pa
    import pyarrow.parquet as pq

    read_table(file, file)  # checks that its data can be read
    description = (pq.read_schema(pa.BufferReader(file.read_bytes())).metadata or {}).get(_METADATA)
    if description is None:
        raise unreadable(file, "it must have the description of a figure")
    about = to_typed(parse_json(description.decode(), file), FigureAbout, file)
    return KeptFigure(about, hashlib.sha256(file.read_bytes()).hexdigest())


def digest_in(image: Path) -> str:
    """Return the SHA-256 of chart data in the image of a kept figure, or "" if there is no image or it has none."""
    return str(_read_image(image)[0].get("data_sha256", ""))


def _read_image(image: Path) -> tuple[dict[str, Any], str]:
    """Return provenance and digest of the pixels of an image; empty if there is no image, or only a part."""
    try:
        with Image.open(image) as opened:
            facts = to_typed(parse_json(opened.info.get("lorascope", "{}"), image), dict[str, Any], image)
            return facts, pixel_digest(opened)
    except (OSError, SyntaxError, Image.DecompressionBombError):  # no file, no image, a truncated or a damaged one
        return {}, ""


def image_differences(figures: Mapping[str, KeptFigure], runs: Collection[str], images: Path | None) -> Iterator[str]:
    """Return one line for each run of a kept figure that is not kept, and each image with other data, runs or pixels.

    Parameters
    ----------
    figures : mapping name -> KeptFigure
        Kept figures.
    runs : collection of str
        Ids of all runs.
    images : path or None
        Folder of the images; None to check only the runs.
    """
    for name, figure in figures.items():
        for run in figure.about.runs:
            if run not in runs:
                yield f"{FOLDER}/{name}.parquet: run {printable(run)} is not in runs.csv"
        if images is None:
            continue
        facts, pixels = _read_image(images / f"{name}.png")
        if (digest := str(facts.get("data_sha256", ""))) != figure.digest:
            state = digest[:12] or "no image with chart data"
            yield f"{FOLDER}/{name}.png: data_sha256: kept {state}, recomputed {figure.digest[:12]}"
            continue  # its other facts belong to the other data
        about = figure.about
        expected = {"runs": list(about.runs), "commit": about.commit, "pixels_sha256": pixels}
        for fact, value in expected.items():
            if facts.get(fact) != value:
                yield f"{FOLDER}/{name}.png: {fact}: kept {facts.get(fact)!r}, recomputed {value!r}"
