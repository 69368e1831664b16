"""The KL gauge against the dial, and a training with it against one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from planted import plant
from test_dial import METHODS
from test_export import trained

import lorascope as ls
from lorascope.analysis.forgetting_course import forgetting_course
from lorascope.inputs import tasks
from lorascope.papers.setups import planted_teacher

ROWS = 40
METHOD = ls.LoRA(rank=3, alpha=12.0, targets=("q", "ffn_out"), lr=1e-2)


def without_time(run: ls.Run) -> Any:
    table = run.table
    gauge = ("row_loss", "kl_task", "kl_keep", "drift_task", "drift_keep", "seconds")
    return table[~table["quantity"].isin(gauge)].drop(columns="run").reset_index(drop=True)


@pytest.mark.parametrize(
    ("name", "method"), [("llama", METHOD), ("bert", METHODS["pissa"]), ("bert", ls.Full(lr=1e-3))]
)
def test_last_value_is_the_dial_s_and_other_records_stay(
    name: str,
    method: ls.Method,
    request: Any,
    reviews: tasks.Task,
    other_text: tasks.Task,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(name)
    gauge = ls.observe.kl(every=5, rows=ROWS, keep=other_text)
    plain = trained(folder, reviews, method, tmp_path / "plain", steps=12, observe=[ls.observe.norms()])[1]
    run = trained(folder, reviews, method, tmp_path / "run", steps=12, observe=[gauge, ls.observe.norms()])[1]
    pandas_equal(without_time(plain), without_time(run))
    values = run.table[run.table["quantity"].isin(("kl_keep", "drift_keep"))].set_index("step")["value"]
    assert values.index.tolist() == [0, 5, 10, 12]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values[12] > 0
    for before, after in ((plain.tensors("last"), run.tensors("last")), (updates(plain), updates(run))):
        assert before.keys() == after.keys()
        for key in before:
            np.testing.assert_array_equal(before[key], after[key])
    if isinstance(method, ls.Full):
        return
    dial = ls.dial(run, folder, reviews, other_text, by="whole", rows=ROWS, keep_rows=ROWS, progress=False)
    curve = dial.table.query("scale == 1").set_index("axis")["value"]
    assert values[12] == curve["keep"]
    assert run.table.query("quantity == 'row_loss' and step == 12")["value"].mean() == pytest.approx(
        curve["task"], rel=1e-6
    )


def pandas_equal(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    assert one["value"].equals(other["value"])


def updates(run: ls.Run) -> dict[str, np.ndarray]:
    return {name: update.dense() for name, update in run.updates().items()}


def test_recorder_measures_peft_adapters_on_the_rows_to_keep(
    llama: str,
    other_text: tasks.Task,
    tmp_path: Path,
) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(ls.models.load(llama), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with ls.record(model, optimizer, tmp_path / "run", steps=1, kl=other_text) as recorder:
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        recorder.step()
    values = ls.load(tmp_path / "run").table.query("quantity == 'kl_keep'")["value"]
    assert len(values) == 2
    assert (values > 0).all()  # the adapter does not start at zero
    assert not any(layer._disable_adapters for layer in model.modules() if hasattr(layer, "_disable_adapters"))


def test_recorder_without_rows_to_keep_is_rejected(llama: str, tmp_path: Path) -> None:
    model = ls.models.load(llama)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="keep is required"):
        ls.record(model, optimizer, tmp_path / "run", [ls.observe.kl()])
    with pytest.raises(ValueError, match="rows must be"):
        ls.observe.kl(rows=8)


def test_step_to_keep_has_the_least_distance_within_one_paired_error(tmp_path: Path) -> None:
    losses = {0: [2.0, 3.0, 4.0, 5.0], 5: [1.0, 2.2, 3.1, 4.0], 10: [1.1, 1.9, 3.0, 4.1], 15: [1.3, 2.3, 3.3, 4.4]}
    rows = {step: np.array(values) for step, values in losses.items()}
    run = plant(tmp_path, "a", {("row_loss", ""): rows, ("kl_keep", ""): {0: 0.0, 5: 0.2, 10: 0.5, 15: 0.9}})
    chart = ls.plots.kl(run)
    path, ring = [mark.data for mark in chart.marks if mark.data is not None]
    assert path.groupby("stretch")["step"].apply(list).tolist() == [[0, 5], [5, 10], [10, 15]]
    assert ring["step"].tolist() == [5]
    assert "Keep: step 5, loss 2.58 nats, distance 0.2" in chart.caption
    course = forgetting_course(run).set_index("step")
    # Step 10 is best; step 5 is above it by 0.05 with differences -0.1, 0.3, 0.1, -0.1.
    assert course.loc[5, "above"] == pytest.approx(0.05)
    assert course.loc[5, "error"] == pytest.approx(np.std([-0.1, 0.3, 0.1, -0.1], ddof=1) / 2)
    assert course.index[course["keep"]].tolist() == [5]


def few_sentences() -> tasks.Task:
    """Return 375 sentences, of which 268 train."""
    return tasks.from_frame(planted_teacher.task(0).table[["text"]].iloc[::8].reset_index(drop=True), "few sentences")


def overfitted(out: Path, observe: list[Any]) -> ls.Run:
    """Train on a few sentences, which are learned by heart from about step 30 on."""
    settings = {"steps": 100, "batch_size": 16, "eval_every": 0, "eval_size": 32, "test_size": 32, "progress": False}
    method = ls.LoRA(rank=4, targets="all-linear", lr=1e-2)
    return ls.train(planted_teacher.student(), few_sentences(), method, out=out, observe=observe, **settings)


def test_doctor_names_the_step_to_keep_of_a_training_that_overfits(tmp_path: Path) -> None:
    run = overfitted(tmp_path / "run", [ls.observe.kl(every=5, keep=planted_teacher.task(1))])
    (late,) = (finding for finding in ls.diagnose(run) if finding.cause == "late-checkpoint")
    course = forgetting_course(run).set_index("step")
    assert [late.evidence["step"]] == course.index[course["keep"]].tolist()
    assert 20 <= late.evidence["step"] <= 50
    assert late.evidence["last_distance"] == course["distance"].iloc[-1]
