"""Seconds of a step: parts that sum to the total on a fake clock, and the figure of planted values."""

from __future__ import annotations

import pytest
from planted import plant

from lorascope import plots
from lorascope.analysis import step_time as analysis
from lorascope.experiments import step_time
from lorascope.experiments.isolated_run import IsolatedRun
from lorascope.runs.run import Run

NAMES = ("forward_seconds", "backward_seconds", "rest_seconds")


def timed(*milliseconds: float, slow: float = 9.0) -> dict:
    """Return seven steps: the first two slow, and one of the others 1.5 times as long."""
    steps = {step: 1.5 if step == 5 else 1.0 for step in range(3, 8)} | {1: slow, 2: slow}
    return {
        (name, ""): {step: ms / 1e3 * k for step, k in steps.items()}
        for name, ms in zip(NAMES, milliseconds, strict=True)
    }


def test_parts_are_medians_of_the_later_steps(tmp_path):
    full = [plant(tmp_path, f"f{seed}", timed(10 + 2 * seed, 20, 5), seed=seed) for seed in range(2)]
    chart = plots.step_seconds({"full": full, "LISA": plant(tmp_path, "l", timed(10, 12, 4))})
    found = {(row.recipe, row.part): row.value for row in chart.data.itertuples()}
    assert found == pytest.approx({
        ("full", "forward"): 11, ("full", "backward"): 20, ("full", "rest"): 5,
        ("LISA", "forward"): 10, ("LISA", "backward"): 12, ("LISA", "rest"): 4,
    })  # fmt: skip
    assert chart.colors == ("forward", "backward", "rest")
    assert "at most 0% of their median" in chart.caption
    _, line, percentages = chart.marks
    assert (chart.title, line.x) == ("Time per step: LISA 72% of full", 36)
    assert "on an unnamed device. Medians over the steps after step 2." in chart.caption
    assert "Line and percentages: full." in chart.caption
    assert dict(zip(percentages.data["recipe"], percentages.data["words"], strict=True)) == {
        "full": "100%", "LISA": "72%",
    }  # fmt: skip
    single = plots.step_seconds({"full": full})
    assert (single.title, len(single.marks)) == ("Time per step", 1)
    assert (
        analysis.relative_spread(
            plant(tmp_path, "s", {(name, ""): dict(enumerate([1, 1, 1, 2, 3], 1)) for name in NAMES}).table
        )
        == 0.25
    )


def test_step_seconds_without_enough_steps_raises(tmp_path):
    with pytest.raises(
        ValueError, match=r"step_seconds needs records of forward_seconds: measure it with ls.step_time.measure"
    ):
        plots.step_seconds(plant(tmp_path, "a", {("loss", ""): {1: 1.0}}))
    with pytest.raises(ValueError, match=r"run b.*more than 2"):
        plots.step_seconds(plant(tmp_path, "b", {(name, ""): {1: 1.0, 2: 1.0} for name in NAMES}))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_each_part_is_timed_on_a_fake_clock(device, bert, task, tmp_path, monkeypatch):
    """The clock advances by 1 per loss, by 10 per backward pass and by 100 per optimizer step."""
    now = [0.0]

    def later(function, seconds):
        def called(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(step_time.time, "process_time", lambda: now[0])
    monkeypatch.setattr(step_time.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(step_time.Session, "_batch_loss", later(step_time.Session._batch_loss, 1))
    monkeypatch.setattr(step_time.Tensor, "backward", later(step_time.Tensor.backward, 10))
    monkeypatch.setattr(step_time.torch.optim.AdamW, "step", later(step_time.torch.optim.AdamW.step, 100))
    settings = {"steps": 2, "batch_size": 4, "accumulate": 2}
    job = IsolatedRun.of(
        bert, task, "lisa", settings, seed=0, out=tmp_path / "run", root="", overwrite=False, device=device
    )
    table = Run.read(step_time._measure_seconds(job)).table
    cells = table.pivot_table(index="step", columns="quantity", values="value", observed=True).loc[1:, list(NAMES)]
    assert cells.to_numpy().tolist() == [[2, 20, 100]] * 2
