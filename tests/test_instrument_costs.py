"""Estimates of the instruments' costs: they follow the model's seconds, and count the passes that are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_dial import METHODS, measures
from test_export import trained
from test_reader import sentences

import lorascope as ls
from lorascope.adapters.delta import attach
from lorascope.analysis.dial import TASK, WHOLE
from lorascope.inputs import tasks
from lorascope.insight import advise, reader
from lorascope.insight import dial as instrument
from lorascope.insight.adapted_base import AdaptedBase, open_adapted
from lorascope.insight.instrument_costs import Passes, PassSeconds, dial_passes, reading_passes, time_passes
from lorascope.insight.update_parts import ScaledUpdates, UpdatePart, group_parts


@pytest.fixture(scope="module")
def run(bert: str, reviews: tasks.Task, tmp_path_factory: pytest.TempPathFactory) -> ls.Run:
    return trained(bert, reviews, METHODS["lora"], tmp_path_factory.mktemp("costs") / "run", steps=2)[1]


class SlowModel:
    """Clock of a model that takes a number of seconds per row, and twice as much for gradients."""

    def __init__(self, adapted: AdaptedBase, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds
        self.hook = adapted.base.base_model.register_forward_hook(self.advance)

    def advance(self, module: Any, inputs: Any, output: Any) -> None:
        states = output.last_hidden_state
        self.now += self.seconds * len(states) * (3 if states.requires_grad else 1)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", [0.25, 1.0])
def test_timed_passes_are_those_of_a_slower_model(
    run: ls.Run, bert: str, reviews: tasks.Task, other_text: tasks.Task, seconds: float
) -> None:
    adapted = open_adapted(run, bert, reviews, "last")
    loss = measures(adapted, other_text)[TASK]
    attach(adapted.base, adapted.deltas)
    slow = SlowModel(adapted, seconds)
    timed = time_passes(loss, ScaledUpdates(adapted.base, adapted.deltas, {}), slow.clock)
    slow.hook.remove()
    # The first pass of either kind is not timed.
    assert timed == PassSeconds(seconds, 3 * seconds)
    assert timed.per_row(Passes(2, 5)) == 17 * seconds


def test_estimates_of_an_advice_follow_a_slower_model(
    run: ls.Run, bert: str, reviews: tasks.Task, other_text: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = []
    for factor in (1, 4):
        monkeypatch.setattr(advise, "time_passes", lambda *_, factor=factor: PassSeconds(0.5 * factor, 2.0 * factor))
        adviser = advise.Adviser(run, bert, reviews, other_text, 64, 64, "last", progress=False)
        costs.append(adviser._estimate_costs())
    fast, slow = costs
    for by in (WHOLE, "layer", "module"):
        assert slow.dial[by].per_row == pytest.approx(4 * fast.dial[by].per_row)
    assert slow.price.per_row == pytest.approx(4 * fast.price.per_row)
    assert slow.reading.per_row == pytest.approx(4 * fast.reading.per_row)
    passes = dial_passes(WHOLE, 0)
    assert fast.dial[WHOLE].per_row == pytest.approx(2 * 0.5 * passes.forward)


@pytest.mark.parametrize("by", ["module", "layer", "role"])
def test_passes_of_a_dial_are_about_those_that_are_made(
    run: ls.Run, bert: str, reviews: tasks.Task, other_text: tasks.Task, by: str
) -> None:
    """Count the rows that pass each block, of the curve of the whole, all removals and a curve of every second part."""
    adapted = open_adapted(run, bert, reviews, "last")
    axes = measures(adapted, other_text)
    attach(adapted.base, adapted.deltas)
    parts = group_parts(adapted.base, adapted.updates, by).parts
    rows: list[int] = []
    blocks = adapted.base.base_model.encoder.layer
    for block in blocks:
        # Replayed blocks do not call their modules.
        block.output.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    dialed = instrument.DialedModel(
        ScaledUpdates(adapted.base, adapted.deltas, {}), axes, instrument.tqdm(disable=True)
    )
    dialed.curve(UpdatePart(WHOLE, tuple(adapted.deltas)), instrument.SCALES)
    dialed.removals(parts)
    dialed.curves(parts[::2], [scale for scale in instrument.SCALES if scale not in (0, 1)])
    measured = sum(rows) / len(blocks) / sum(len(axis.order) for axis in axes.values())
    assert dial_passes(by, len(parts)).forward == pytest.approx(measured, rel=0.35)


@pytest.mark.parametrize("top", [1, 6])
def test_passes_of_a_reading_are_about_those_that_are_made(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: int
) -> None:
    """Count the rows that pass each block without and with gradients, as fractions of the rows that are read."""
    monkeypatch.setenv("LORASCOPE_MEASURE_AGAIN", "1")
    task = tasks.from_frame(sentences(), "reviews")
    read_rows, selection_rows = len(task.split("validation")), len(task.split("train"))
    run = trained(bert, task, METHODS["lora"], tmp_path / "run", steps=2)[1]
    counts = {True: 0, False: 0}

    def count(module: Any, inputs: Any, output: Any) -> None:
        counts[output.requires_grad] += len(output)

    def open_counted(*arguments: Any) -> AdaptedBase:
        adapted = open_adapted(*arguments)
        for block in adapted.base.base_model.encoder.layer:
            block.output.register_forward_hook(count)
        blocks.append(len(adapted.base.base_model.encoder.layer))
        return adapted

    blocks: list[int] = []
    announced = []
    monkeypatch.setattr(reader, "open_adapted", open_counted)
    monkeypatch.setattr(reader, "time_passes", lambda *_: PassSeconds(1.0, 1000.0))
    monkeypatch.setattr(reader, "announce", lambda name, seconds, progress: announced.append(seconds))
    ls.read(run, bert, task, top, progress=False)
    passes = reading_passes(top, selection_rows / read_rows)
    (number,) = blocks
    assert counts[True] / number / read_rows == pytest.approx(passes.gradient)
    assert counts[False] / number / read_rows == pytest.approx(passes.forward, rel=0.35)
    assert announced == [pytest.approx(read_rows * (passes.forward + 1000 * passes.gradient))]


def test_a_dial_announces_what_its_passes_take(
    run: ls.Run,
    bert: str,
    reviews: tasks.Task,
    other_text: tasks.Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LORASCOPE_MEASURE_AGAIN", "1")
    announced = []
    for factor in (1, 3):
        monkeypatch.setattr(instrument, "time_passes", lambda *_, factor=factor: PassSeconds(factor, 2.0 * factor))
        monkeypatch.setattr(instrument, "announce", lambda name, seconds, progress: announced.append(seconds))
        ls.dial(run, bert, reviews, other_text, by="whole", rows=40, keep_rows=64, progress=False)
    assert announced == [104 * dial_passes(WHOLE, 0).forward, 3 * 104 * dial_passes(WHOLE, 0).forward]
