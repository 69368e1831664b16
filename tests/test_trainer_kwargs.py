"""Tests of methods under transformers' Trainer: weights and records are bitwise equal to those of ``train``."""

from __future__ import annotations

import pytest
import torch
from test_export import by_the_card, distance
from torch import nn
from trainers import METHODS, arguments, by_train, by_trainer, fresh, same_rows, same_weights
from transformers import Trainer, TrainerControl, TrainerState

import lorascope as ls
from lorascope import plots
from lorascope.adapters import delta
from lorascope.diagnosis.inspection import inspect
from lorascope.training.hf_trainer import method_callback

LOOP_QUANTITIES = ["loss", "seconds", "factor_seconds", "eval_loss", "eval_metric", "test_loss", "test_metric"]
LOOP_QUANTITIES += ["test_metric_group"]
AT_GATES = ["update_norm", "learned_norm", "step_norm", "weight_norm", "relative_update"]
AT_GATES += ["stable_rank", "effective_rank"]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", list(METHODS))
def test_trainer_and_train_give_the_same_weights_and_records(name, accumulate, bert, task, tmp_path):
    method, precision = METHODS[name], "bf16" if accumulate == 2 else "fp32"
    settings = {"accumulate": accumulate, "precision": precision, "clip": 0.1}
    expected, run, rows = by_train(bert, task, method, tmp_path / "run", **settings)
    model = fresh(bert, task)
    recorder = ls.TrainerRecorder(tmp_path / "recorded", observe=[ls.observe.norms(every=2)])
    by_trainer(model, rows, tmp_path, method, clip=0.1, recorder=recorder, accumulate=accumulate, bf16=accumulate == 2)
    same_weights(model, expected)
    recorded = ls.load(tmp_path / "recorded")
    # Updates of routers are evaluated at mean gates, which need held-out text: the Trainer has none.
    if name == "hydralora":
        for one, gates in ((run, "mean gates"), (recorded, "uniform gates")):
            assert one.label in plots.update_norm(one).caption.rpartition("Updates of ")[2]
            assert plots.update_norm(one).caption.endswith(f" at {gates}.")
            assert (
                f"4 of 5 modules depend on their input: their updates are evaluated at {gates}" in inspect(one).findings
            )
    missing = {*run.table["quantity"]} - {*recorded.table["quantity"]}
    assert not missing & {"update_norm", "rank"}
    same_rows(recorded.table, run.table, but=[*LOOP_QUANTITIES, *missing, *(AT_GATES if name == "hydralora" else [])])


def test_recorded_run_can_be_restored_and_exported(bert, task, tmp_path, monkeypatch):
    _, _, rows = by_train(bert, task, METHODS["lora"], tmp_path / "run")
    model = fresh(bert, task)
    by_trainer(model, rows, tmp_path / "out", METHODS["adalora"], recorder=ls.TrainerRecorder())
    run = ls.load(tmp_path / "out/lorascope")
    assert run.ranks() == {name: adapter.rank for name, adapter in delta.attached_deltas(model).items()}
    base = ls.models.load(bert, task=task)
    run.restore(base)
    same_weights(base, model)
    assert run.label == "AdaLoRA, init_rank 4, target_rank 2, mask_every 1"
    assert run.lora_config()["target_modules"]
    theirs = by_the_card(ls.export.to_peft(run, tmp_path / "adapter"), monkeypatch)
    assert distance(model, theirs) < 1e-9


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (ls.AutoLoRA(), r"AutoLoRA.*several phases.*ls\.train"),
        (ls.ALoRA(), r"ALoRA.*search split.*ls\.train"),
        (ls.NeFT(num_neurons=3), "neurons of NeFT.*got None.*neurons="),
        (ls.NeFT(select_by="random", num_neurons=3), "neurons of NeFT.*got None"),
    ],
)
def test_method_that_needs_phases_or_a_search_split_is_rejected(method, line, fresh_bert):
    before = set(dict(fresh_bert.named_parameters()))
    with pytest.raises(ValueError, match=line) as caught:
        ls.trainer_kwargs(method, fresh_bert)
    assert "\n" not in str(caught.value)
    assert set(dict(fresh_bert.named_parameters())) == before


def test_model_with_adapters_is_rejected(fresh_bert):
    ls.trainer_kwargs(ls.LoRA(), fresh_bert)
    with pytest.raises(ValueError, match=r"adapters \(bert\.encoder.*\)"):
        ls.trainer_kwargs(ls.Full(), fresh_bert)


def test_max_grad_norm_of_the_trainer_is_rejected(fresh_bert, tmp_path):
    kwargs = ls.trainer_kwargs(ls.LoRA(), fresh_bert, lr=1e-3, clip=0.5)
    trainer = Trainer(fresh_bert, arguments(tmp_path, max_grad_norm=1.0), train_dataset=[{}] * 8, **kwargs)
    with pytest.raises(ValueError, match=r"max_grad_norm must be 0 .*got 1\.0.*trainer_kwargs") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clip", [0, -1.0])
def test_clip_that_is_not_positive_is_rejected(clip, fresh_bert):
    with pytest.raises(ValueError, match=f"clip .*got {clip}"):
        ls.trainer_kwargs(ls.LoRA(), fresh_bert, clip=clip)


def test_optimizers_and_callbacks_of_different_calls_are_rejected(bert, task, tmp_path):
    one, other = (fresh(bert, task) for _ in range(2))
    first, second = ls.trainer_kwargs(ls.LoRA(), one), ls.trainer_kwargs(ls.LoRA(), other)
    trainer = Trainer(one, arguments(tmp_path), train_dataset=[{}] * 8, **first | {"callbacks": second["callbacks"]})
    with pytest.raises(ValueError, match="trainer_kwargs"):
        trainer.train()


def test_gradient_that_is_not_finite_stops_training(bert, task, tmp_path):
    _, _, rows = by_train(bert, task, METHODS["lora"], tmp_path / "run")
    model = fresh(bert, task)
    with torch.no_grad():
        model.classifier.weight.fill_(float("inf"))
    with pytest.raises(
        FloatingPointError, match=r"loss .*nan at step 1 of 6 .*0\.01.* weights before it were not finite: load"
    ):
        by_trainer(model, rows, tmp_path / "out", METHODS["lora"])


def test_fp16_is_rejected(fresh_bert, tmp_path):
    (callback,) = ls.trainer_kwargs(ls.LoRA(), fresh_bert)["callbacks"]
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match=r"fp16 .*LoRA, got True"):
        callback.on_train_begin(args, TrainerState(), model=fresh_bert, optimizer=callback.optimizer)


def test_sharded_weights_are_rejected():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    method_callback.reject_sharded(model, optimizer)
    pieces = torch.optim.SGD([nn.Parameter(torch.zeros(8))])
    with pytest.raises(ValueError, match="optimizer of sharded weights"):
        method_callback.reject_sharded(model, pieces)
    model.bias.ds_id = 1  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="sharded bias"):
        method_callback.reject_sharded(model, optimizer)


@pytest.mark.filterwarnings("ignore")  # FSDP warns that it is deprecated, and that one process shards nothing
def test_weights_sharded_by_fsdp_are_rejected(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded weight"):
            method_callback.reject_sharded(model, torch.optim.SGD(model.parameters()))
        # With FSDP1, the shards look like ordinary parameters, in the model as well as in the optimizer.
        first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        wrapped = FullyShardedDataParallel(first, use_orig_params=True, device_id=torch.device("cpu"))
        given = {"optimizer": torch.optim.SGD(wrapped.parameters())}
        for each in (wrapped, first):
            with pytest.raises(ValueError, match=r"sharded .*0\.weight"):
                method_callback.reject_sharded(each, given["optimizer"])
            with pytest.raises(ValueError, match=r"sharded .*0\.weight"):
                ls.TrainerRecorder(tmp_path).on_train_begin(
                    arguments(tmp_path), TrainerState(), TrainerControl(), model=each, **given
                )
    finally:
        distributed.destroy_process_group()
