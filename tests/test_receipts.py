"""Receipts of all instruments: seed, and a command that measures the same numbers again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_dial import METHODS
from test_export import trained
from test_fork_effects import forks  # noqa: F401  # a fixture
from test_reader import sentences
from test_turning_points import alternating, write_series

import lorascope as ls
from lorascope.cli.main import main
from lorascope.inputs import sources, tasks
from lorascope.insight.receipt_origin import origin_of
from lorascope.runs.receipt import Receipt


class Subject:
    """Run with a best state, and the names of its model and its texts."""

    def __init__(self, bert: str, other_text: tasks.Task, folder: Path) -> None:
        self.model, self.names = bert, []
        for name, table in (("task", sentences()), ("keep", other_text.table.drop(columns=["draw"]))):
            self.names.append(str(folder / f"{name} rows.csv"))
            table.to_csv(self.names[-1], index=False)
        task = ls.tasks.load(self.names[0])
        self.run = trained(bert, task, METHODS["lora"], folder / "run", steps=8, seed=3, eval_every=2)[1]
        assert {"last", "best"} <= set(self.run.meta.states)


@pytest.fixture(scope="module")
def subject(bert: str, other_text: tasks.Task, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(bert, other_text, tmp_path_factory.mktemp("receipts"))


def measured_by(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the JSON that a command of a receipt prints."""
    capsys.readouterr()
    assert main([*shlex.split(command)[1:], "--json"]) == 0, command
    return json.loads(capsys.readouterr().out)


def without_time(document: dict[str, Any]) -> dict[str, Any]:
    document["receipt"].pop("seconds")
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("state", ["last", "best"])
def test_the_command_of_a_dial_has_its_margin_and_its_state(
    subject: Subject, state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORASCOPE_MEASURE_AGAIN", "1")
    dial = ls.dial(
        subject.run, subject.model, *subject.names, by="layer", scales=(0.5,), rows=40, keep_rows=48,
        margin=0.123456789, state=state, progress=False,
    )  # fmt: skip
    assert dial.receipt.seed == 3
    assert "seed 3, " in str(dial.receipt)
    assert without_time(measured_by(dial.receipt.command, capsys)) == without_time(dial.to_json())
    # An option with its default value is omitted.
    assert ("--state" in dial.receipt.command) == (state == "best")


def test_the_command_of_a_price_has_its_budgets_its_tolerance_and_its_state(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORASCOPE_MEASURE_AGAIN", "1")
    arguments: dict[str, Any] = {"budgets": (3, 5), "tolerance": 1e-7, "state": "best", "progress": False}
    price = ls.price(subject.run, subject.model, subject.names[0], (1, 2), 128, **arguments)
    document = measured_by(price.receipt.command, capsys)
    expected = json.loads(pd.DataFrame(price.to_json()["table"]).to_json(orient="records"))
    assert len(document["table"]) == len(expected)
    for row, expected_row in zip(document["table"], expected, strict=True):
        assert row["components"] == expected_row["components"]
        assert row["cut"] == pytest.approx(expected_row["cut"], abs=1e-9)
    assert document["verdict"] == price.verdict
    assert document["receipt"]["call"]["tolerance"] == 1e-7
    assert document["receipt"]["command"] == price.receipt.command
    assert document["receipt"]["seed"] == 3


def test_the_command_of_a_reading_has_its_state(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORASCOPE_MEASURE_AGAIN", "1")
    reading = ls.read(subject.run, subject.model, subject.names[0], 2, state="best", progress=False)
    document = measured_by(reading.receipt.command, capsys)
    assert [card["total"] for card in document["cards"]] == [card["total"] for card in reading.to_json()["cards"]]
    assert document["receipt"]["seed"] == reading.receipt.seed == 3


def test_the_command_of_forks_compares_them_again(
    forks: list[ls.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    effects = ls.fork_effects(forks, margin=1 / 3)
    assert effects.receipt.seed == (0, 1, 2, 3, 4)
    assert "seeds 0 1 2 3 4, " in str(effects.receipt)
    assert without_time(measured_by(effects.receipt.command, capsys)) == without_time(effects.to_json())
    # One fork has one seed.
    assert ls.fork_effects(forks[2]).receipt.seed == 1
    assert main(["fork", *(str(fork.path) for fork in forks[:2]), "--step", "2"]) == 2
    assert "--step forks one run, got 2" in capsys.readouterr().err
    # A trunk that is elsewhere would not be found.
    moved = ls.load(shutil.copytree(forks[0].path, tmp_path / "elsewhere" / "fork"))
    vars(moved)["trunk"] = forks[0].trunk
    assert ls.fork_effects(moved).receipt.command == ""


@pytest.mark.parametrize("kind", ["series", "run"])
def test_the_command_of_turns_writes_every_cosine(
    kind: str, subject: Subject, bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result: Any = write_series(tmp_path / "out", alternating(90.0))
    if kind == "run":
        task = ls.tasks.load(subject.names[0])
        observers = [ls.observe.factors(every=1)]
        result = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=14, seed=3, observe=observers)[1]
    turns = ls.turns(result)
    assert turns.receipt.seed == (3 if kind == "run" else None)
    assert main(shlex.split(turns.receipt.command)[1:]) == 0
    written = pd.read_csv(tmp_path / "turns.csv")
    numbers = written.select_dtypes("number").to_numpy().round(9)
    for cosine in turns.table["cosine"].dropna():
        assert round(cosine, 9) in numbers


def test_a_text_without_a_name_that_loads_it_has_no_command(subject: Subject, reviews: tasks.Task) -> None:
    loaded = ls.tasks.load(subject.names[0])
    named = origin_of("price", subject.run, "m", loaded)["command"]
    assert shlex.split(named)[-2:] == ["--task", subject.names[0]]
    assert origin_of("price", subject.run, "m", reviews) == {"seed": 3, "command": ""}
    split = ls.tasks.load(subject.names[0], splits="hash")
    assert origin_of("price", subject.run, "m", split)["command"] == ""
    assert not sources.is_source("planted ranks, teacher 0")
    assert all(map(sources.is_source, ("sentiment/movies", "owner/name:part", subject.names[0])))


def test_options_of_a_command_are_replaced_or_there_is_none() -> None:
    receipt = Receipt(run="r", base="b", rows={}, command="lorascope dial 'a b' --rows 5 --by layer")
    assert receipt.command_with("--rows", 70) == "lorascope dial 'a b' --rows 70 --by layer"
    assert receipt.command_with("--top", 3) == ""
    assert Receipt(run="r", base="b", rows={}).command_with("--rows", 70) == ""
