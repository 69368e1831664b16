"""Results of instruments from the cache: the same ones, only for the same content, and announced if they are long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_export import trained
from test_price import METHODS, task  # noqa: F401  # a fixture

import lorascope as ls
from lorascope.analysis.dial import Dial
from lorascope.inputs.tasks import Task
from lorascope.insight import dial as dials
from lorascope.insight import instrument_costs, measured_results
from lorascope.insight.measured_results import MEASURE_AGAIN

Turn = Callable[..., Dial]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(MEASURE_AGAIN)
    monkeypatch.setattr(measured_results, "folder", lambda: tmp_path / "measured")
    return tmp_path / "measured"


@pytest.fixture
def run(bert: str, task: Task, tmp_path: Path) -> ls.Run:  # noqa: F811
    return trained(bert, task, METHODS["lora"], tmp_path / "run", steps=4)[1]


@pytest.fixture
def turn(run: ls.Run, bert: str, task: Task) -> Turn:  # noqa: F811
    texts = [f"the {word} goes {count} times around" for word in ("dog", "cat") for count in range(90)]
    splits = [("train", "validation", "test")[row % 3] for row in range(len(texts))]
    labels = [("negative", "positive")[row % 2] for row in range(len(texts))]
    keep = ls.tasks.from_frame(pd.DataFrame({"text": texts, "label": labels, "split": splits}), "other text")

    def turned(**changes: Any) -> Dial:
        options: dict[str, Any] = {"by": "whole", "rows": 40, "keep_rows": 40, "scales": (0.5,), "progress": False}
        return ls.dial(run, bert, task, keep, **options | changes)

    return turned


def test_the_second_result_is_the_first_and_nothing_is_measured(
    cache: Path, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = turn()
    assert len(list(cache.iterdir())) == 1

    def fail(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(dials, "_turn", fail)
    second = turn()
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.parts, second.parts)
    assert first.receipt == second.receipt


@pytest.mark.parametrize("changes", [{"rows": 41}, {"margin": 0.5}, {"by": "layer"}, {"scales": (0.25,)}])
def test_another_call_is_measured(cache: Path, turn: Turn, changes: dict[str, Any]) -> None:
    turn()
    turn(**changes)
    assert len(list(cache.iterdir())) == 2


def test_another_weight_is_measured(cache: Path, turn: Turn, run: ls.Run, bert: str, task: Task) -> None:  # noqa: F811
    """A head that differs by one value gives another result, although run, task and call are the same."""
    turn()
    other = trained(bert, task, METHODS["lora"], run.path.parent / "other", steps=4, seed=1)[1]  # type: ignore[union-attr]
    ls.price(other, bert, task, (1,), progress=False)
    ls.price(run, bert, task, (1,), progress=False)
    assert len(list(cache.glob("price-*"))) == 2
    ls.price(run, bert, task, (1,), progress=False)
    assert len(list(cache.glob("price-*"))) == 2


def test_the_track_record_is_read_again(cache: Path, run: ls.Run, bert: str, task: Task) -> None:  # noqa: F811
    assert len(ls.price(run, bert, task, (1,), progress=False).residuals) == 0
    entry = {"run": "a", "task": "t", "base": "b", "rank": 8, "to": 4, "seeds": 3, "cut": 0.5, "retrained": 0.3}
    assert run.path is not None
    (run.path.parent / "prices.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    np.testing.assert_allclose(ls.price(run, bert, task, (1,), progress=False).residuals, [-0.2])


def test_a_long_measurement_is_announced(
    turn: Turn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turn(progress=True)
    assert "CPU seconds" not in capsys.readouterr().err
    monkeypatch.setattr(instrument_costs, "_LONG", 0.0)
    turn(progress=True)
    assert "dial: about " in capsys.readouterr().err
