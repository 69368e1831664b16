"""Stored figures of the first edition: they are read whole and drawn, and a damaged file is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
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


def test_differences_of_lisa_are_from_lora_of_the_same_seed() -> None:
    runs = pd.read_csv(FOLDER.parent / "runs.csv.gz").query("role == 'judged'")
    losses = runs[runs["arm"].str.contains("whole SmolLM2")].pivot(index="seed", columns="arm", values="loss")
    arms = {
        "LISA": "LISA, 2 of 30 blocks, whole SmolLM2",
        "LISA, one draw": "LISA, 2 of 30 blocks, one draw, whole SmolLM2",
        "full fine-tuning": "full fine-tuning, whole SmolLM2",
    }
    _, panel = stored_figures(FOLDER)["training-curves-lisa"].chart.panels
    values = panel.data.set_index("recipe")["value"]
    assert set(values.index) == set(arms)
    for name, arm in arms.items():
        difference = (losses[arm] - losses["LoRA, rank 8, whole SmolLM2"]).dropna()
        assert values[name] == pytest.approx(difference.mean(), rel=1e-9)


def test_selected_fractions_of_neurons_equal_the_numbers_of_another_figure() -> None:
    _, panel = stored_figures(FOLDER)["neuron-cosine"].chart.panels
    counts = stored_figures(FOLDER)["neurons"].chart.panels[0].data
    np.testing.assert_allclose(panel.data["value"], 100 * counts["value"] / 1536, rtol=1e-12)
    (chance,) = set(panel.marks[0].data["value"])
    # Both projections of six layers have as many neurons.
    assert chance == pytest.approx(panel.data["value"].mean(), rel=1e-9)


def test_random_logits_retain_as_many_components_as_the_search() -> None:
    chart = stored_figures(FOLDER)["selection-weights"].chart
    ends = chart.marks[-1].data.set_index("fate")
    logits = 0.93 * np.random.default_rng(1).standard_normal((50_000, 8))
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for fate, of_fate in (("retained", weights[weights > 1 / 8]), ("dropped", weights[weights <= 1 / 8])):
        quantiles = np.quantile(of_fate, [0.1, 0.5, 0.9])
        np.testing.assert_allclose(ends.loc[fate, ["low", "value", "high"]].astype(float), quantiles, rtol=0.02)
    assert round(480 * (weights > 1 / 8).mean()) in range(174, 178)
    assert "176 of 480" in chart.caption
