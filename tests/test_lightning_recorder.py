"""Tests of the recorder under Lightning: the same rows as of the same loop in plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_trackers import curves
from torch import nn
from trainers import same_rows, same_weights

import lorascope as ls

lightning = pytest.importorskip("lightning.pytorch")
from lorascope.training.lightning_recorder import LightningRecorder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
NORMS = [ls.observe.norms(every=2), ls.observe.factors(every=2), ls.observe.gradients(every=2)]
STEPS = 5


class Module(lightning.LightningModule):
    def __init__(self, fail=False, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.fail = fail
        self.automatic_optimization = not manual

    def training_step(self, batch, index):
        if self.fail and index == 3:
            raise RuntimeError("out of memory")
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=0.1)


def batches(count):
    return list(torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0)))


class Logger(lightning.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        self.logged |= {(name, step): value for name, value in metrics.items() if name.startswith("lorascope/")}


def fit(module, recorder, tmp_path, accumulate=1, **settings):
    trainer = lightning.Trainer(
        accelerator="cpu",
        callbacks=[recorder] if recorder else [],
        default_root_dir=tmp_path,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "logger": False} | settings,
    )
    data = torch.utils.data.DataLoader(batches(STEPS * accumulate), batch_size=None, shuffle=False)
    trainer.fit(module, data)


@pytest.mark.parametrize("settings", [{}, {"max_steps": STEPS, "max_epochs": -1}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_equal_those_of_a_plain_loop(accumulate, settings, tmp_path):
    one, other, bare = Module(), Module(), Module()
    fit(one, LightningRecorder(observe=NORMS, model="model", seed=0), tmp_path, accumulate, **settings)
    fit(bare, None, tmp_path, accumulate, **settings)
    optimizer = other.configure_optimizers()
    data = batches(STEPS * accumulate)
    with ls.record(other.model, optimizer, tmp_path / "loop", NORMS, steps=settings.get("max_steps")) as recorder:
        for start in range(0, len(data), accumulate):
            optimizer.zero_grad()
            total = 0.0
            for batch in data[start : start + accumulate]:
                loss = other.training_step(batch, 0) / accumulate
                loss.backward()
                total = total + loss.detach()
            optimizer.step()
            recorder.step(loss=total)
    same_weights(one, other)
    same_weights(one, bare)
    found, expected = ls.load(tmp_path / "lorascope"), ls.load(tmp_path / "loop")
    same_rows(found.table, expected.table, but=["seconds"])
    assert found.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3, 4, 5]
    assert (found.meta.status, found.seed, found.meta.states["last"].step) == ("done", 0, STEPS)


def test_module_itself_is_recorded_by_default(tmp_path):
    fit(Module(), LightningRecorder(tmp_path / "own"), tmp_path)
    assert set(ls.load(tmp_path / "own").summary()["module"]) == {"model.0", "model.2"}


def test_exception_marks_the_run_as_broken_and_keeps_its_rows(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Module(fail=True), LightningRecorder(), tmp_path)
    run = ls.load(tmp_path / "lorascope")
    assert (run.meta.status, run.meta.error) == ("broken", "RuntimeError: out of memory")
    assert run.table["step"].max() == 3
    assert np.isfinite(run.table["value"]).all()


def test_manual_optimization_is_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"cannot record manual optimization: call ls\.record"):
        fit(Module(manual=True), LightningRecorder(), tmp_path)


def test_recorded_values_are_reported_to_the_loggers(tmp_path):
    loggers, one, other = [Logger(), Logger()], Module(), Module()
    fit(one, LightningRecorder(tmp_path / "run", NORMS, report=True), tmp_path, logger=loggers)
    fit(other, None, tmp_path)
    same_weights(one, other)
    expected = {(f"lorascope/{name}", step): value for (name, step), value in curves(ls.load(tmp_path / "run")).items()}
    # Lightning logs loss and learning rate itself.
    expected = {key: value for key, value in expected.items() if "/train/" not in key[0]}
    assert [logger.logged for logger in loggers] == [expected] * 2
