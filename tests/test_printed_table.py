"""Tests of the figure of a recipe's table: its numbers, panels and errors."""

from __future__ import annotations

import math

import pandas as pd
import pytest

import lorascope as ls


def cell(column, row, evaluation, mean, half, printed=math.nan, sd=math.nan):
    """Return a row of the table of a recipe, with the columns that the figure reads."""
    return {
        "column": column, "metric": "accuracy", "row": row, "evaluation": evaluation, "mean": mean,
        "low": mean - half, "high": mean + half, "n": 5, "seeds": 5, "printed": printed, "printed_sd": sd,
    }  # fmt: skip


@pytest.fixture
def table():
    """Return a table with two columns and rows, of which a column has no evaluation of a row."""
    return pd.DataFrame(
        [
            cell("RTE", "LoRA", "best", 86.0, 1.0, printed=85.2),
            cell("RTE", "LoRA", "last", 85.0, 1.5, printed=85.2),
            cell("RTE", "AdaLoRA", "best", 88.0, 0.5, printed=88.1, sd=0.4),
            cell("RTE", "AdaLoRA", "last", 87.0, 0.5, printed=88.1, sd=0.4),
            cell("MNLI-mm", "LoRA", "test", 90.0, 0.2, printed=90.7),
            cell("MNLI-mm", "AdaLoRA", "test", math.nan, math.nan),
            cell("CoLA", "LoRA", "best", math.nan, math.nan),
        ]
    )


def test_figure_has_scores_with_intervals_and_printed_numbers_with_standard_deviations(table):
    panels = ls.plots.printed_table(table)
    assert [chart.title for chart in panels.panels] == ["RTE, accuracy", "MNLI-mm, accuracy"]
    rte, mnli = [chart.data.set_index(["row", "evaluation"]) for chart in panels.panels]
    assert set(rte.index) == {
        (row, name) for row in ("LoRA", "AdaLoRA") for name in ("best evaluation", "last evaluation", "printed")
    }
    assert tuple(rte.loc[("AdaLoRA", "last evaluation"), ["value", "low", "high"]]) == (87.0, 86.5, 87.5)
    # The number is not repeated for each evaluation.
    printed = rte.loc[[("AdaLoRA", "printed")]]
    assert len(printed) == 1
    assert tuple(printed[["value", "low", "high"]].iloc[0]) == pytest.approx((88.1, 87.7, 88.5))
    assert rte.loc[("LoRA", "printed"), ["low", "high"]].isna().all()
    assert list(mnli.index) == [("LoRA", "printed"), ("LoRA", "test")]


def test_panels_of_a_line_have_the_same_rows_and_the_first_names_them(table):
    first, second = ls.plots.printed_table(table).panels
    assert first.y.order == second.y.order
    assert list(first.y.ticks.values()) == ["LoRA", "AdaLoRA"]
    assert set(second.y.ticks.values()) == {""}
    assert first.x.label != second.x.label


def test_four_columns_are_in_two_lines(table):
    columns = [table.iloc[:4].assign(column=name) for name in ("RTE", "MRPC", "CoLA", "STS-B")]
    panels = ls.plots.printed_table(pd.concat(columns))
    assert [len(line) for line in panels.rows()] == [3, 1]


def test_figure_is_saved(table, tmp_path):
    ls.plots.printed_table(table).save(tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_a_table_without_numbers_or_of_another_kind_is_one_line(table):
    with pytest.raises(ValueError, match="neither a score nor a printed number"):
        ls.plots.printed_table(table.iloc[-1:])
    with pytest.raises(ValueError, match=r"^table must be of ls\.recipes\.table, got one without the column printed$"):
        ls.plots.printed_table(table.drop(columns="printed"))
