"""Methods that train on a changed base, W_0 - s B0 A0: what is stored and restored refers to W_0."""

from __future__ import annotations

import pytest
import torch
from killing import RandomStart
from test_trainer_kwargs import LOOP_QUANTITIES
from tolerance import near
from trainers import by_train, by_trainer, fresh, same_rows, same_weights

import lorascope as ls
from lorascope.adapters import delta
from lorascope.inputs import models
from lorascope.methods import LoRA
from lorascope.methods.pissa import ResidualDelta
from lorascope.training.base_weights import prepare_model

METHOD = RandomStart(rank=2, alpha=1, targets="all-linear", lr=1e-2, head_lr=1e-2)
SETTINGS = {"seed": 3, "batch_size": 8, "progress": False, "device": "cpu", "eval_every": 0}


def logits(model, task):
    torch.manual_seed(0)
    ids = torch.randint(4, 20, (5, 9))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    model = models.load(bert, task=task)
    out = tmp_path_factory.mktemp("residual") / "run"
    return model, ls.train(model, task, METHOD, steps=4, out=out, observe=[ls.observe.norms(every=1)], **SETTINGS)


def test_output_equals_the_residual_plus_the_trained_product(bert, task):
    model = models.load(bert, task=task)
    METHOD.attach(model)
    name, host_delta = next(iter(delta.attached_deltas(model).items()))
    with torch.no_grad():
        host_delta.B.normal_()
        x, host = torch.randn(3, host_delta.A.shape[1]), model.get_submodule(name)
        residual = host.weight - host_delta.scale * host_delta.B0 @ host_delta.A0
        expected = x @ (residual + host_delta.scale * host_delta.B @ host_delta.A).T + host.bias
        torch.testing.assert_close(host(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x @ (host.weight + host_delta.weight()).T + host.bias, expected)
        torch.testing.assert_close(x @ host.weight.T + host.bias + host_delta(x), expected)
        torch.testing.assert_close(torch.from_numpy(host_delta.update().dense()).float(), host_delta.weight())


def test_dropout_leaves_the_residual_unchanged(bert, task):
    host = models.load(bert, task=task).get_submodule("bert.encoder.layer.0.intermediate.dense")
    B, A = torch.randn(host.weight.shape[0], 2), torch.randn(2, host.weight.shape[1])
    x = torch.randn(4, host.weight.shape[1])
    with torch.no_grad():
        part = ResidualDelta(host, B, A, dropout=1.0).train()
        torch.testing.assert_close(part.affine(x, host.weight, host.bias), host(x) - x @ A.T @ B.T)  # A sees no input
        torch.testing.assert_close(part(x), -x @ A.T @ B.T)


def test_update_is_zero_at_step_0_and_that_of_w0_afterwards(trained, bert, task):
    model, run = trained
    table = run.table
    norms = table[(table["quantity"] == "update_norm") & table["module"].isin(run.ranks())]
    assert (norms.loc[norms["step"] == 0, "value"] == 0).all()
    base = models.load(bert, task=task)
    updates = run.updates()
    for name, update in delta.deltas(model, dict(base.named_parameters())):
        if name not in updates:
            continue
        host, last = model.get_submodule(name), norms[(norms["module"] == name) & (norms["step"] == 4)]
        stacked = host.delta.scale * (host.delta.B @ host.delta.A - host.delta.B0 @ host.delta.A0)
        torch.testing.assert_close(torch.from_numpy(update.dense()).float(), stacked.detach(), rtol=1e-4, atol=1e-6)
        assert (updates[name].dense() == update.dense()).all()
        # From a spectrum and from Gram matrices: sums over the longer side, then small factorizations.
        assert last["value"].item() == near(update.norm(), dtype=torch.float64, terms=max(update.shape), depth=8)
        assert update.norm() > 0
        assert host.delta.rank == run.ranks()[name] == 2


def test_hash_equals_that_of_the_untouched_model(trained, bert, task):
    _, run = trained
    untouched = models.load(bert, task=task)
    assert prepare_model(untouched, task.fit(untouched), 3).w0_hash == run.meta.w0_hash


def test_restored_model_has_equal_logits(trained, bert, task):
    model, run = trained
    torch.manual_seed(99)  # attach draws other factors
    restored = models.load(bert, task=task)
    run.restore(restored, method=METHOD)
    assert torch.equal(logits(restored, task), logits(model, task))
    same_weights(restored, model)


def test_detach_leaves_w0(trained, bert, task):
    _, run = trained
    model = models.load(bert, task=task)
    run.restore(model, method=METHOD)
    delta.detach(model)
    for name, parameter in models.load(bert, task=task).named_parameters():
        if not name.startswith("classifier"):
            assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_and_train_give_the_same_weights_and_records(accumulate, bert, task, tmp_path):
    model, run, rows = by_train(bert, task, METHOD, tmp_path / "own", accumulate=accumulate)
    other = fresh(bert, task)
    recorder = ls.TrainerRecorder(tmp_path / "recorded", observe=[ls.observe.norms(every=2)])
    by_trainer(other, rows, tmp_path / "hf", METHOD, recorder=recorder, accumulate=accumulate)
    same_weights(model, other)
    recorded = ls.load(tmp_path / "recorded")
    same_rows(run.table, recorded.table, but=LOOP_QUANTITIES)
    restored = fresh(bert, task)
    recorded.restore(restored, method=METHOD)
    same_weights(restored, other)
    assert recorded.meta.w0_hash == run.meta.w0_hash


def test_resumed_trainer_ends_as_one_without_interruption(bert, task, tmp_path):
    _, _, rows = by_train(bert, task, METHOD, tmp_path / "own")
    whole, parts = fresh(bert, task), fresh(bert, task)
    kept = {"save_strategy": "steps", "save_steps": 3}
    by_trainer(whole, rows, tmp_path / "hf", METHOD, recorder=ls.TrainerRecorder(tmp_path / "one"), **kept)
    torch.manual_seed(5)
    by_trainer(
        parts, rows, tmp_path / "hf", METHOD, draw=7, recorder=ls.TrainerRecorder(tmp_path / "one"),
        resume=str(tmp_path / "hf/checkpoint-3"), **kept
    )  # fmt: skip
    same_weights(whole, parts)


class InPlace(LoRA):
    def attach(self, model):
        super().attach(model)
        with torch.no_grad():
            model.get_submodule("bert.encoder.layer.0.attention.self.query").weight.sub_(1e-3)


def test_attach_that_changes_a_base_weight_is_rejected(bert, task, tmp_path):
    with pytest.raises(ValueError, match=r"InPlace.*layer\.0\.attention\.self\.query\.weight"):
        ls.train(models.load(bert, task=task), task, InPlace(), steps=1, out=tmp_path / "run", **SETTINGS)
    with pytest.raises(ValueError, match=r"InPlace.*layer\.0\.attention\.self\.query\.weight"):
        ls.trainer_kwargs(InPlace(), models.load(bert, task=task))
