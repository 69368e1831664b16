"""Stored figures of the first edition: they are read whole and drawn, and a damaged file is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lorascope.papers.figures.first_edition import stored_figures

FOLDER = Path(__file__).parents[1] / "data" / "edition-1" / "figures"


def test_stored_figures_have_their_tables_heading_and_description() -> None:
    figures = stored_figures(FOLDER)
    assert figures.keys() == {file.stem for file in FOLDER.iterdir()}
    for name, figure in figures.items():
        columns = pq.read_table(FOLDER / f"{name}.parquet").num_columns
        assert sum(table.shape[1] for chart in figure.chart.panels for _, table in chart.tables()) == columns
        assert figure.heading
        assert figure.alt
        assert figure.chart.plotly().data


def test_stored_tables_end_where_they_ended() -> None:
    """The authors' lists have 12 layers of two projections; steps stay integers next to longer tables."""
    panels = stored_figures(FOLDER)["published-ranks"].chart.panels
    assert [chart.data["layer"].tolist() for chart in panels] == [[*range(12)]] * 2
    for mark_chart in stored_figures(FOLDER)["update-norm"].chart.panels:
        for _, table in mark_chart.tables():
            assert not table.isna().all(axis=1).any()


@pytest.mark.parametrize("content", [b"x", None])
def test_damaged_stored_figure_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "norms.parquet"
    if content is None:
        pd.DataFrame({"0/x": [1]}).to_parquet(file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"norms\.parquet"):
        stored_figures(tmp_path)


def test_missing_table_of_a_stored_figure_is_named(tmp_path: Path) -> None:
    table = pq.read_table(shutil.copy(FOLDER / "use-shift.parquet", tmp_path))
    file = tmp_path / "use-shift.parquet"
    pq.write_table(table.select(table.column_names[:1]), file)
    with pytest.raises(ValueError, match=r"use-shift\.parquet"):
        stored_figures(tmp_path)
