"""Our methods under transformers' Trainer: the same weights and records as from ``train``, bit for bit."""

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

OURS = ["loss", "seconds", "factor_seconds", "eval_loss", "eval_metric", "test_loss", "test_metric"]
OURS += ["test_metric_group"]
AT_GATES = ["update_norm", "learned_norm", "step_norm", "weight_norm", "relative_update"]
AT_GATES += ["stable_rank", "effective_rank"]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", list(METHODS))
def test_both_loops_give_the_same_weights_and_records(name, accumulate, bert, task, tmp_path):
    method, precision = METHODS[name], "bf16" if accumulate == 2 else "fp32"
    settings = {"accumulate": accumulate, "precision": precision, "clip": 0.1}
    expected, run, rows = by_train(bert, task, method, tmp_path / "run", **settings)
    model = fresh(bert, task)
    recorder = ls.TrainerRecorder(tmp_path / "recorded", observe=[ls.observe.norms(every=2)])
    by_trainer(model, rows, tmp_path, method, clip=0.1, recorder=recorder, accumulate=accumulate, bf16=accumulate == 2)
    same_weights(model, expected)
    recorded = ls.load(tmp_path / "recorded")
    # A router's update is told at its mean gates, and the Trainer shows no text to find them on.
    if name == "hydralora":
        for one, gates in ((run, "mean gates"), (recorded, "even gates")):
            assert one.label in plots.update_norm(one).caption.rpartition("Updates of ")[2]
            assert plots.update_norm(one).caption.endswith(f" at {gates}.")
            assert f"4 of 5 modules depend on their input: their updates here are at {gates}" in inspect(one).findings
    untold = {*run.table["quantity"]} - {*recorded.table["quantity"]}
    assert not untold & {"update_norm", "rank"}
    same_rows(recorded.table, run.table, but=[*OURS, *untold, *(AT_GATES if name == "hydralora" else [])])


def test_what_is_recorded_can_be_restored_and_exported(bert, task, tmp_path, monkeypatch):
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
        (
            ls.AutoLoRA(),
            r"AutoLoRA needs several phases, which a Trainer does not give: train with ls\.train, then exp",
        ),
        (ls.ALoRA(), r"ALoRA needs rows of its own to score on, which a Trainer does not give: train with ls\.train"),
        (ls.NeFT(num_neurons=3), r"NeFT without neurons chooses them by a training of its own: give neurons=, or"),
        (ls.NeFT(select_by="random", num_neurons=3), "NeFT without neurons"),
    ],
)
def test_methods_that_need_more_than_a_trainer_are_refused(method, line, fresh_bert):
    before = set(dict(fresh_bert.named_parameters()))
    with pytest.raises(ValueError, match=line) as caught:
        ls.trainer_kwargs(method, fresh_bert)
    assert "\n" not in str(caught.value)
    assert set(dict(fresh_bert.named_parameters())) == before


def test_a_model_that_carries_adapters_is_refused(fresh_bert):
    ls.trainer_kwargs(ls.LoRA(), fresh_bert)
    with pytest.raises(ValueError, match="carries adapters already"):
        ls.trainer_kwargs(ls.Full(), fresh_bert)


def test_a_clipping_trainer_is_refused(fresh_bert, tmp_path):
    kwargs = ls.trainer_kwargs(ls.LoRA(), fresh_bert, lr=1e-3, clip=0.5)
    trainer = Trainer(fresh_bert, arguments(tmp_path, max_grad_norm=1.0), train_dataset=[{}] * 8, **kwargs)
    line = r"max_grad_norm=1.0 clips before LoRA .* set it to 0 in TrainingArguments; rate and clip are LoRA's own, by "
    with pytest.raises(ValueError, match=line + r"trainer_kwargs\(lr=0.001, clip=0.5\)") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clip", [0, -1.0])
def test_a_clip_that_is_none_is_refused(clip, fresh_bert):
    with pytest.raises(ValueError, match=f"clip={clip} must be positive, or None"):
        ls.trainer_kwargs(ls.LoRA(), fresh_bert, clip=clip)


def test_optimizers_of_another_call_are_refused(bert, task, tmp_path):
    one, other = (fresh(bert, task) for _ in range(2))
    first, second = ls.trainer_kwargs(ls.LoRA(), one), ls.trainer_kwargs(ls.LoRA(), other)
    trainer = Trainer(one, arguments(tmp_path), train_dataset=[{}] * 8, **first | {"callbacks": second["callbacks"]})
    with pytest.raises(ValueError, match="another model, or by another optimizer"):
        trainer.train()


def test_gradients_that_are_no_numbers_stop_it(bert, task, tmp_path):
    _, _, rows = by_train(bert, task, METHODS["lora"], tmp_path / "run")
    model = fresh(bert, task)
    with torch.no_grad():
        model.classifier.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradient norm became nan at step 1 of 6 \(rate 0.01\)"):
        by_trainer(model, rows, tmp_path / "out", METHODS["lora"])


def test_half_precision_is_refused(fresh_bert, tmp_path):
    (callback,) = ls.trainer_kwargs(ls.LoRA(), fresh_bert)["callbacks"]
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="fp16=True leaves out steps that overflow, unseen by LoRA: set bf16=True"):
        callback._refuse(args, fresh_bert, callback.optimizer)


def test_sharded_weights_are_refused():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    method_callback.refuse_sharded(model, optimizer)
    pieces = torch.optim.SGD([nn.Parameter(torch.zeros(8))])
    with pytest.raises(ValueError, match=r"the optimizer holds pieces .* train by DDP, or in one process"):
        method_callback.refuse_sharded(model, pieces)
    model.bias.ds_id = 1  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match=r"bias is sharded \(FSDP, tensor parallelism or ZeRO-3\)"):
        method_callback.refuse_sharded(model, optimizer)


@pytest.mark.filterwarnings("ignore")  # of FSDP's own making: it is to be left, and one process shards nothing
def test_weights_that_fsdp_shards_are_refused(tmp_path):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="weight is sharded"):
            method_callback.refuse_sharded(model, torch.optim.SGD(model.parameters()))
        # The first version: what it shards looks like parameters of the model, and the optimizer holds these very ones.
        first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        wrapped = FullyShardedDataParallel(first, use_orig_params=True, device_id=torch.device("cpu"))
        given = {"optimizer": torch.optim.SGD(wrapped.parameters())}
        for each in (wrapped, first):
            with pytest.raises(ValueError, match=r"0\.weight is sharded \(FSDP, tensor parallelism or ZeRO-3\)"):
                method_callback.refuse_sharded(each, given["optimizer"])
            with pytest.raises(ValueError, match=r"0\.weight is sharded"):
                ls.TrainerRecorder(tmp_path).on_train_begin(
                    arguments(tmp_path), TrainerState(), TrainerControl(), model=each, **given
                )
    finally:
        distributed.destroy_process_group()
