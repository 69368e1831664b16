"""Measurements in the folder of a run on its report card, only if they belong to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_export import trained
from test_price import METHODS, task  # noqa: F401  # a fixture

import lorascope as ls
from lorascope.analysis.stored_measurements import DIAL, PRICE, stored_measurements
from lorascope.cli.main import main
from lorascope.inputs.tasks import Task
from lorascope.pages.report_card import verify_card


@pytest.fixture(scope="module")
def measured(bert: str, task: Task, tmp_path_factory: pytest.TempPathFactory) -> ls.Run:  # noqa: F811
    run = trained(bert, task, METHODS["lora"], tmp_path_factory.mktemp("stored") / "run", steps=4)[1]
    assert run.path is not None
    file = run.path.parent / "task.csv"
    task.table.drop(columns=["draw", "cluster"], errors="ignore").to_csv(file, index=False)
    words = [str(run.path), "--model", bert, "--task", str(file)]
    assert main(["dial", *words, "--by", "layer", "--rows", "40", "-o", str(run.path / DIAL)]) == 0
    assert main(["price", *words, "--ranks", "1", "-o", str(run.path / PRICE)]) == 0
    return ls.load(str(run.path))


def test_the_card_has_the_numbers_of_the_instruments(measured: ls.Run, bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    tables = {item.file: item.table for item in stored_measurements(measured)}
    assert list(tables) == [DIAL, PRICE]
    priced = ls.price(measured, bert, task, (1,), progress=False)
    np.testing.assert_allclose(tables[PRICE]["cut"], priced.table["cut"], rtol=1e-12)
    page = ls.report(measured, tmp_path / "card.html")
    text = page.read_text(encoding="utf-8")
    assert "What each part buys" in text
    assert "Price of rank" in text
    assert verify_card(page) == []


def test_files_of_another_run_are_not_shown(measured: ls.Run, bert: str, task: Task, tmp_path: Path) -> None:  # noqa: F811
    other = trained(bert, task, METHODS["lora"], tmp_path / "other", steps=4, seed=1)[1]
    assert other.path is not None
    assert measured.path is not None
    for name in (DIAL, PRICE):
        (other.path / name).write_bytes((measured.path / name).read_bytes())
    assert list(stored_measurements(other)) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [(DIAL, "a,b\n1,2\n", "must be the table of a dial"), (PRICE, "{}", "it has no receipt"), (PRICE, "[", PRICE)],
)
def test_other_files_with_these_names_get_one_line(
    name: str, text: str, message: str, measured: ls.Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert measured.path is not None
    folder.mkdir()
    for file in measured.path.iterdir():
        if file.is_file() and file.name not in (DIAL, PRICE):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(stored_measurements(ls.load(str(folder))))


def test_a_reading_is_a_table_of_words(measured: ls.Run) -> None:
    assert measured.path is not None
    card = {"module": "a", "component": 1, "total": {"mean": 0.5}, "uses": ["good", "bad"]}
    document = {"cards": [card, card | {"uses": []}], "receipt": {"run": measured.id}}
    file = measured.path / "reading.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    (table,) = [item.table for item in stored_measurements(measured) if item.file == "reading.json"]
    file.unlink()
    assert table["words"].tolist() == ["good, bad", "no word above random components"]
