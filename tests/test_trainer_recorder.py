"""Tests of the recorder of a Trainer: it changes no weights, records correct values, and resumes with the Trainer."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import warnings
import weakref

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.numpy import load_file
from test_export import by_the_card, distance
from tiny import tiny
from tolerance import TINY, near, rounding
from torch import nn
from trainers import METHODS, QV, ROWS, by_trainer, fresh, same_rows, same_weights, training_rows, with_peft
from transformers import TrainerCallback

import lorascope as ls
from lorascope.adapters import delta
from lorascope.analysis import initial_update
from lorascope.schema import module_table
from lorascope.training import run_folder
from lorascope.training.base_weights import Base
from lorascope.training.foreign_loop import step_of
from lorascope.training.state import seed_generators

NORMS = [ls.observe.norms(every=2), ls.observe.factors(every=3)]


@pytest.fixture(scope="module")
def rows(bert, task):
    return training_rows(bert, task)


def with_lora(bert, task, seed=0, **options):
    return with_peft(fresh(bert, task), peft.LoraConfig(**QV, r=3, **options), seed)


def last(run, quantity, module):
    table = run.table[(run.table["quantity"] == quantity) & (run.table["module"] == module)]
    return table[table["step"] == table["step"].max()]["value"].item()


@pytest.mark.parametrize("make", [fresh, with_lora], ids=["full", "peft"])
def test_weights_are_bitwise_equal_with_and_without_the_recorder(make, bert, task, rows, tmp_path):
    one, other = make(bert, task), make(bert, task)
    settings = {"max_grad_norm": 0.1, "accumulate": 2, "weight_decay": 0.1}
    by_trainer(one, rows, tmp_path / "without", **settings)
    by_trainer(other, rows, tmp_path / "with", recorder=ls.TrainerRecorder(observe=NORMS), **settings)
    same_weights(one, other)
    run = ls.load(tmp_path / "with/lorascope")
    assert run.finished
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.meta.settings["batch_size"] == ROWS


class PlantedLoss:
    """Forward hook that makes the loss of one batch NaN or infinite, and keeps all losses of training."""

    def __init__(self, model, planted=None, value=math.nan):
        self.planted, self.value, self.losses = planted, value, []
        model.register_forward_hook(self)

    def __call__(self, model, inputs, output):
        if model.training:
            if len(self.losses) + 1 == self.planted:
                output.loss = output.loss * self.value
            self.losses.append(float(output.loss.detach()))
        return output


def test_trainer_is_freed_after_its_last_use(bert, task, rows, tmp_path):
    gc.collect()
    gc.disable()
    try:
        trainer = by_trainer(fresh(bert, task), rows, tmp_path, recorder=ls.TrainerRecorder())
        reference = weakref.ref(trainer)
        del trainer
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("logging_steps", [1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_recorded_losses_are_those_that_the_model_computed(
    value, logging_steps, accumulate, bert, task, rows, tmp_path
):
    """The Trainer's log has 0 for a loss of NaN at its first step, and no loss between its logs."""
    model = fresh(bert, task)
    model.accepts_loss_kwargs = False
    planted = PlantedLoss(model, planted=4, value=value)
    evaluated = {"eval_dataset": rows[:ROWS], "eval_strategy": "steps", "eval_steps": 1}
    by_trainer(
        model,
        rows,
        tmp_path,
        recorder=ls.TrainerRecorder(),
        accumulate=accumulate,
        logging_steps=logging_steps,
        **evaluated,
    )
    table = ls.load(tmp_path / "lorascope").table.query("quantity == 'loss'")
    expected = np.reshape(planted.losses, (-1, accumulate)).mean(axis=1)
    step = -(-4 // accumulate)
    assert table["step"].tolist() == [*range(1, len(expected) + 1)]
    np.testing.assert_allclose(table["value"], expected, rtol=1e-6)
    assert not math.isfinite(table["value"].iloc[step - 1])
    assert np.isfinite(table["value"].iloc[: step - 1]).all()


def test_neft_rejects_a_reference_run_without_the_hash_of_its_base(bert, task, rows, tmp_path):
    by_trainer(fresh(bert, task), rows, tmp_path, recorder=ls.TrainerRecorder(), max_steps=1)
    with pytest.raises(ValueError, match=r"'changed' from .*Trainer.* initial weights"):
        ls.NeFT(num_neurons=3, reference=tmp_path / "lorascope").prepare()


def test_records_of_peft_layers_equal_their_deltas(bert, task, rows, tmp_path):
    model = with_lora(bert, task)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    before = head.detach().clone()
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=NORMS))
    run = ls.load(tmp_path / "lorascope")
    found = dict(delta.deltas(model))
    assert run.ranks() == dict.fromkeys(found, 3)
    for module, update in found.items():
        assert update.norm() > 0
        assert last(run, "update_norm", module) == pytest.approx(update.norm(), rel=1e-12)
        np.testing.assert_array_equal(run.factors()[module]["B"], update.B)
        np.testing.assert_array_equal(run.factors(step=3)[module]["B"].shape, update.B.shape)
    assert last(run, "update_norm", "classifier") == near((head.detach() - before).norm(), terms=TINY)
    assert last(run, "effective_rank", "bert.encoder.layer.0.attention.self.query") <= 3 + 1e-9
    assert set(run.summary()["module"]) == {*found, "classifier"}
    assert run.label == "PEFT LORA, r 3"
    assert run.lora_config()["r"] == 3
    assert run.meta.labels == list(task.labels)


def test_nonzero_initial_update_of_peft_is_subtracted_or_reported_as_missing(bert, task, rows, tmp_path):
    model = with_lora(bert, task, init_lora_weights=False)
    first = {name: update.dense() for name, update in delta.deltas(model) if hasattr(update, "B")}
    for folder, observers in (("kept", NORMS), ("lost", NORMS[:1])):
        by_trainer(model, rows, tmp_path / folder, recorder=ls.TrainerRecorder(observe=observers), max_steps=3)
    kept, lost = (ls.load(tmp_path / folder / "lorascope") for folder in ("kept", "lost"))
    assert (initial_update.lacks_initial_update(kept), initial_update.lacks_initial_update(lost)) == (False, True)
    learned = kept.summary().set_index("module")["learned_norm"]
    for name, update in initial_update.learned_updates(kept).items():
        last = kept.updates()[name].dense()
        assert update.dense() == near(last - first[name], np.abs(last).max(), terms=3 + 1)
        assert update.norm() == pytest.approx(learned[name], rel=1e-9)


EXPORTED = {
    "lora": peft.LoraConfig(**QV, r=3, lora_alpha=5),
    "fourierft": peft.FourierFTConfig(**QV, n_frequency=30),
    "fourierft, another seed": peft.FourierFTConfig(**QV, n_frequency=30, random_loc_seed=2**33 + 5, scaling=40.0),
}


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_run_of_peft_is_exported_with_its_head(config, bert, task, rows, tmp_path, monkeypatch):
    model = with_peft(fresh(bert, task), config)
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(), learning_rate=0.05)
    run = ls.load(tmp_path / "lorascope")
    out = ls.export.to_peft(run, tmp_path / "adapter")
    expected, again = dict(delta.deltas(model)), ls.load(out, base=bert).updates()
    assert set(again) == set(expected)
    for module, update in expected.items():
        assert update.norm() > 0
        assert again[module].dense() == near(update.dense(), terms=3 + 1)
    assert distance(model.eval(), fresh(bert, task)) > 1e-3
    assert distance(model, by_the_card(out, monkeypatch)) < rounding(terms=TINY)
    with pytest.raises(ValueError, match=r"PEFT trained it.*ls\.export\.to_peft"):
        run.restore(fresh(bert, task))


def test_export_of_a_trained_bias_of_an_adapted_module_raises(bert, task, rows, tmp_path):
    by_trainer(with_lora(bert, task, bias="lora_only"), rows, tmp_path, recorder=ls.TrainerRecorder(), max_steps=1)
    with pytest.raises(ValueError, match=r"trained bias of adapted module .*query") as caught:
        ls.export.to_peft(ls.load(tmp_path / "lorascope"), tmp_path / "adapter")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantized", [False, True])
def test_norms_of_a_peft_layer_equal_a_worked_example(quantized):
    """W_0 = [[1, 0, 0], [0, 1, 0]], B = (1, 2)^T, A = (2, 0, 1), scale 2: |dW| 10, |W_0 + dW| 10.48809."""
    model = nn.Sequential()
    model.q = nn.Linear(3, 2, bias=False)
    model.q.weight.data = torch.eye(2, 3)
    peft.inject_adapter_in_model(peft.LoraConfig(r=1, lora_alpha=2, target_modules=["q"]), model)
    model.q.lora_A["default"].weight.data = torch.tensor([[2.0, 0.0, 1.0]])
    model.q.lora_B["default"].weight.data = torch.tensor([[1.0], [2.0]])
    if quantized:  # packed, as in a 4-bit model
        model.q.base_layer.weight = nn.Parameter(torch.ones(3, 1, dtype=torch.uint8), requires_grad=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    step = step_of(model, optimizer, Base(model), module_table.describe(model), "here")
    step.total = 1
    found = {item.quantity: item.value for item in ls.observe.norms()(step)}
    assert found["update_norm"] == pytest.approx(10.0)
    assert found["adapter_norm"] == pytest.approx(math.sqrt(10))
    assert found["rank"] == 1
    assert found["weight_norm"] == pytest.approx(math.nan if quantized else math.sqrt(110), nan_ok=True)
    assert ("relative_update" in found) is not quantized


class Packed(nn.Module):
    """Linear layer without a weight parameter, like those of GPTQ and AWQ."""

    def __init__(self, host):
        super().__init__()
        self.in_features, self.out_features = host.in_features, host.out_features
        self.register_buffer("qweight", (host.weight.detach() * 64).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight / 64)


CONVOLUTION = "vit.embeddings.patch_embeddings.projection"


def test_adapters_on_a_convolution_and_on_a_packed_layer_are_recorded(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["projection", "q_proj"])
    with seed_generators(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT only recognizes packed layers of the libraries that pack them
        model = peft.get_peft_model(tiny("vit"), config)
        attention = next(module for module in model.modules() if hasattr(module, "k_proj"))
        attention.k_proj = GPTQLoraLinear(Packed(attention.k_proj), "default", config=config, r=3, lora_alpha=6)
        rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": number % 2} for number in range(6 * ROWS)]
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=NORMS))
    run = ls.load(tmp_path / "lorascope")
    assert run.finished
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    packed = next(name for name in layers if name.endswith("k_proj"))
    assert run.ranks() == dict.fromkeys(layers, 3)
    assert [run.meta.hosts[name] for name in (CONVOLUTION, packed)] == ["Conv2d", "Packed"]
    products = {}
    for name, layer in layers.items():
        B, A = (factors["default"].weight.detach().flatten(1) for factors in (layer.lora_B, layer.lora_A))
        products[name] = layer.scaling["default"] * B @ A
    kernel = layers[CONVOLUTION].get_delta_weight("default")
    assert products[CONVOLUTION].reshape(kernel.shape).numpy() == near(kernel, terms=3 + 1)
    for name, product in products.items():
        assert last(run, "update_norm", name) == near(product.norm(), terms=3 * 8 * 8)
        assert product.norm() > 0
    assert run.factors()[CONVOLUTION]["A"].shape == (3, 3 * 8 * 8)
    assert last(run, "relative_update", CONVOLUTION) > 0
    with_weight_norm = run.table[run.table["quantity"] == "relative_update"]["module"].unique()
    blocks = [name for name in run.modules["module"] if packed.startswith(f"{name}.")]
    assert blocks
    assert not {packed, *blocks} & set(with_weight_norm)  # the norm of packed weights is unknown
    assert set(run.summary()["module"]) >= {CONVOLUTION, packed}
    assert run.meta.task_kind == "image"
    with pytest.raises(ValueError, match=r"kernel shape of .*Conv2d.* folder that PEFT saved"):
        ls.export.to_peft(run, tmp_path / "export")


def test_adapter_whose_update_is_not_a_matrix_is_skipped_with_a_warning(bert, task, rows, tmp_path):
    config = peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])
    models_ = [with_peft(fresh(bert, task), config) for _ in range(2)]
    line = r"not a matrix: bert\.embeddings\.LayerNorm \(LayerNorm\) and 4 more$"
    with pytest.warns(UserWarning, match=line) as caught:
        by_trainer(models_[0], rows, tmp_path / "with", recorder=ls.TrainerRecorder(observe=NORMS))
    assert sum("cannot record" in str(each.message) for each in caught) == 1
    by_trainer(models_[1], rows, tmp_path / "without")
    same_weights(*models_)
    run = ls.load(tmp_path / "with/lorascope")
    assert run.finished
    assert not run.ranks()
    assert "unused" not in [finding.cause for finding in ls.diagnose(run)]


def test_adapter_that_peft_cannot_merge_is_skipped_with_a_warning(tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])
    model = with_peft(tiny("llama"), config)
    text = torch.tensor([5, 6, 3, 7, 8])
    rows = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text} for _ in range(2 * ROWS)]
    with pytest.warns(
        UserWarning, match=r"cannot record adapters whose update is not a matrix: .*q_proj \(\w*Linear\) and 1 more$"
    ):
        by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=NORMS))
    run = ls.load(tmp_path / "lorascope")
    assert run.finished
    assert not run.ranks()


def test_frozen_parameters_of_the_optimizer_are_not_saved(bert, task, rows, tmp_path):
    model = with_lora(bert, task)
    next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    everything = torch.optim.AdamW(model.parameters(), lr=1e-3)
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=NORMS), optimizer=everything)
    run = ls.load(tmp_path / "lorascope")
    saved = load_file(run.path / "state/last.safetensors")
    assert {name.rpartition(".")[0] for name in saved} == {"classifier"}
    assert run.meta.parameters.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    loaded = ls.load(ls.export.to_peft(run, tmp_path / "export"))
    for name, update in run.updates().items():
        assert loaded.updates()[name].dense() == near(update.dense(), terms=3 + 1)


def test_export_of_an_unsupported_task_type_raises(bert, task, rows, tmp_path):
    model = with_lora(bert, task)
    model.peft_config["default"].task_type = "TOKEN_CLS"
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=NORMS))
    with pytest.raises(ValueError, match=r"task_type must be one of SEQ_CLS.* got TOKEN_CLS"):
        ls.export.to_peft(ls.load(tmp_path / "lorascope"), tmp_path / "export")


class Meanwhile(TrainerCallback):
    """Callback that calls a function after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **trainer):
        if state.global_step == self.step:
            return self.act(control)


def test_run_can_be_read_during_training_and_is_broken_after_an_error(bert, task, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "FLUSH_SECONDS", 0.0)
    seen = []

    def read(_):
        run = ls.load(tmp_path / "out/lorascope")
        seen.append((run.meta.status, run.table["step"].max(), run.snapshot_steps(NAME)))

    def stop(_):
        raise RuntimeError("out of memory")

    method = {"method": METHODS["lora"], "recorder": ls.TrainerRecorder(observe=NORMS)}
    with pytest.raises(RuntimeError, match="out of memory"):
        by_trainer(fresh(bert, task), rows, tmp_path / "out", **method, others=[Meanwhile(3, read), Meanwhile(4, stop)])
    assert seen == [("running", 3, [])]
    method["recorder"]._recording.mark_interrupted()
    run = ls.load(tmp_path / "out/lorascope")
    assert run.meta.status == "broken"
    assert run.table["step"].max() == 4
    assert "broken" in repr(run)
    assert run.id == json.loads((tmp_path / "out/lorascope/run.json").read_text(encoding="utf-8"))["id"]


NAME = "bert.encoder.layer.0.attention.self.query/singular_values"


def test_run_of_a_deleted_recorder_is_broken(bert, task, rows, tmp_path):
    def stop(_):
        raise RuntimeError("no more")

    def train():
        try:
            by_trainer(fresh(bert, task), rows, tmp_path, recorder=ls.TrainerRecorder(), others=[Meanwhile(2, stop)])
        except RuntimeError as error:
            error.__traceback__ = None

    train()
    gc.collect()
    assert ls.load(tmp_path / "lorascope").meta.status == "broken"


def test_second_recorder_of_one_folder_ends_the_first_and_keeps_its_own_rows(bert, task, rows, tmp_path):
    recorders = [ls.TrainerRecorder(observe=[ls.observe.norms(every=2)]) for _ in range(2)]
    with pytest.warns(UserWarning, match="another recorder writes to .*lorascope: pass it another out") as caught:
        by_trainer(fresh(bert, task), rows, tmp_path, recorder=recorders[0], others=[recorders[1]])
    assert len(caught) == 1
    run = ls.load(tmp_path / "lorascope")
    assert run.finished
    assert run.table.query("quantity == 'loss'")["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_finished_run_is_moved_aside_and_other_files_raise(bert, task, rows, tmp_path):
    ids = []
    for _ in range(2):
        by_trainer(fresh(bert, task), rows, tmp_path, METHODS["lora"], recorder=ls.TrainerRecorder(), max_steps=2)
        ids.append(ls.load(tmp_path / "lorascope").id)
    assert ids[0] != ids[1]
    assert ls.load(tmp_path / f"lorascope-{ids[0]}").id == ids[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"mine.*no run"):
        by_trainer(fresh(bert, task), rows, tmp_path, recorder=ls.TrainerRecorder(tmp_path / "mine"))


@pytest.mark.parametrize("name", [n if n == "adalora" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_resumed_training_ends_as_one_without_interruption(name, bert, task, rows, tmp_path):
    """It resumes with a fresh model whose head and factors have other random values."""
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 5}

    def run(resume=None):
        model = fresh(bert, task)
        if resume:
            model.classifier.weight.data.normal_()
        own = {"recorder": ls.TrainerRecorder(observe=NORMS), "resume": resume, "draw": len(resume or "")}
        by_trainer(model, rows, tmp_path, METHODS[name], **own, **settings)
        return model, ls.load(tmp_path / "lorascope")

    whole, first = run()
    table = first.table
    again, second = run(resume=str(tmp_path / "checkpoint-3"))
    same_weights(whole, again)
    assert second.id == first.id
    assert second.finished
    same_rows(second.table, table, but=["seconds", "factor_seconds"])
    assert ls.load(tmp_path / f"lorascope-{first.id}").finished


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("full", "adalora")), "peft"])
def test_training_interrupted_after_its_checkpoint_resumes_without_duplicates(name, bert, task, rows, tmp_path):
    """Steps after the checkpoint run twice, but have their rows and snapshots once."""
    make = with_lora if name == "peft" else fresh
    observe = [ls.observe.norms(every=1), ls.observe.factors(every=2)]

    def stop(_):
        raise RuntimeError("out of memory")

    def train(out, **settings):
        recorder = ls.TrainerRecorder(observe=observe)
        own = {"save_strategy": "steps", "save_steps": 3, "recorder": recorder} | settings
        by_trainer(make(bert, task), rows, tmp_path / out, METHODS.get(name), **own)

    train("whole")
    train("broken", max_steps=1)  # leaves another run in the folder
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        train("broken", others=[Meanwhile(5, stop)])
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    broken = ls.load(tmp_path / "broken/lorascope")
    assert broken.meta.status == "broken"
    assert broken.table["step"].max() == 5
    train("broken", resume=str(tmp_path / "broken/checkpoint-3"))
    run, whole = (ls.load(tmp_path / out / "lorascope") for out in ("broken", "whole"))
    assert (run.id, run.meta.status, run.meta.error) == (broken.id, "done", None)
    assert not run.table.duplicated(["step", "module", "quantity", "index"]).any()
    same_rows(run.table, whole.table, but=["seconds", "factor_seconds"])
    kept = [sorted(file.name for file in (each.path / "snapshots").iterdir()) for each in (run, whole)]
    assert kept[0] == kept[1]
    for step in [] if name == "full" else (2, 4, 6):
        for module, factors in whole.factors(step=step).items():
            for key, factor in factors.items():
                np.testing.assert_array_equal(run.factors(step=step)[module][key], factor)
    assert len(list((tmp_path / "broken").glob("lorascope*"))) == 2


def test_resumed_peft_and_full_training_have_the_same_records(bert, task, rows, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    for make in (fresh, with_lora):
        out = tmp_path / make.__name__
        tables = []
        for resume in (None, str(out / "checkpoint-3")):
            by_trainer(
                make(bert, task), rows, out, recorder=ls.TrainerRecorder(observe=NORMS), resume=resume, **settings
            )
            tables.append(ls.load(out / "lorascope").table)
        same_rows(*tables, but=["seconds", "factor_seconds"])


def test_resume_from_a_checkpoint_without_the_recorders_file_raises(bert, task, rows, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    by_trainer(fresh(bert, task), rows, tmp_path, METHODS["lora"], **settings)
    with pytest.raises(ValueError, match=r"step 3: .*checkpoint-3/lorascope-recorder"):
        by_trainer(
            fresh(bert, task),
            rows,
            tmp_path,
            METHODS["lora"],
            recorder=ls.TrainerRecorder(),
            resume=str(tmp_path / "checkpoint-3"),
        )


def test_training_that_stops_early_saves_its_last_state(bert, task, rows, tmp_path):
    def stop(control):
        control.should_training_stop = True

    model = fresh(bert, task)
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=NORMS), others=[Meanwhile(5, stop)])
    run = ls.load(tmp_path / "lorascope")
    assert run.finished
    assert run.meta.states["last"].step == 5
    change = float((model.classifier.weight - fresh(bert, task).classifier.weight).detach().norm())
    assert last(run, "update_norm", "classifier") == near(change, terms=TINY)
    assert last(run, "stable_rank", "classifier") >= 1 - 1e-9


def test_evaluation_of_the_trainer_is_recorded(bert, task, rows, tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "accuracy"}
    by_trainer(
        fresh(bert, task),
        rows,
        tmp_path,
        recorder=ls.TrainerRecorder(),
        eval_dataset=rows[:ROWS],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        **evaluated,
    )
    table = ls.load(tmp_path / "lorascope").table
    assert table[table["quantity"] == "eval_loss"]["step"].tolist() == [3, 6]
    assert table[table["quantity"] == "eval_metric"]["value"].between(0, 1).all()


def test_observer_of_held_out_text_is_rejected(bert, task, rows, tmp_path):
    with pytest.raises(ValueError, match="held-out text under a Trainer") as caught:
        by_trainer(fresh(bert, task), rows, tmp_path, recorder=ls.TrainerRecorder(observe=[ls.observe.neurons()]))
    assert "\n" not in str(caught.value)


def test_records_do_not_depend_on_the_order_of_callbacks(bert, task, rows, tmp_path):
    tables = []
    for first in (True, False):
        recorder = ls.TrainerRecorder(tmp_path / str(first), observe=NORMS)
        model = fresh(bert, task)
        by_trainer(model, rows, tmp_path, METHODS["adalora"], recorder=recorder, recorder_first=first)
        tables.append(ls.load(tmp_path / str(first)).table)
    same_rows(*tables, but=["seconds", "factor_seconds"])


def test_recorder_does_not_change_the_global_generators(bert, task, rows, tmp_path):
    states = []
    for recorder in (None, ls.TrainerRecorder(observe=NORMS)):
        model = fresh(bert, task)
        by_trainer(model, rows, tmp_path, recorder=recorder, max_steps=2)
        states.append((torch.get_rng_state(), np.random.get_state()[1].tolist()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_full_disk_for_some_steps_loses_no_records(bert, task, rows, tmp_path, monkeypatch):
    """Training continues with one warning; records and weights equal those of a training without the outage."""
    observe = [ls.observe.norms(every=1), ls.observe.factors(every=2)]
    whole = with_lora(bert, task)
    by_trainer(whole, rows, tmp_path / "whole", recorder=ls.TrainerRecorder(observe=observe))
    monkeypatch.setattr(run_folder, "FLUSH_SECONDS", 0.0)
    sync, away = os.fsync, []

    def fail(handle):
        if away:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    others = [Meanwhile(1, lambda _: away.append("full")), Meanwhile(4, lambda _: away.clear())]
    model = with_lora(bert, task)
    with pytest.warns(UserWarning, match=r"No space left .*kept in memory") as warned:
        by_trainer(model, rows, tmp_path / "out", recorder=ls.TrainerRecorder(observe=observe), others=others)
    assert len(warned) == 1
    same_weights(whole, model)
    run, undisturbed = ls.load(tmp_path / "out/lorascope"), ls.load(tmp_path / "whole/lorascope")
    assert run.finished
    same_rows(run.table, undisturbed.table, but=["seconds", "factor_seconds"])
    files = [sorted(file.name for file in (each.path / "snapshots").iterdir()) for each in (run, undisturbed)]
    assert files[0] == files[1]


class Freeing(TrainerCallback):
    """Callback that ends the outage after the last step."""

    def __init__(self, away):
        self.away = away

    def on_log(self, args, state, control, **trainer):
        if state.global_step == state.max_steps:
            self.away.clear()


def test_final_state_that_cannot_be_written_leaves_a_broken_run_without_stopping_training(
    bert, task, rows, tmp_path, monkeypatch
):
    sync, away = os.fsync, []

    def fail(handle):
        if away:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    model = with_lora(bert, task)
    others = [Meanwhile(5, lambda _: away.append("full")), Freeing(away)]
    with pytest.warns(UserWarning, match=r"No space left .*kept in memory"):
        by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(), others=others)
    run = ls.load(tmp_path / "lorascope")
    assert (run.meta.status, run.meta.states) == ("broken", {})
    assert run.table["step"].max() == 6


@pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call")
@pytest.mark.parametrize("observers", [ls.observe.norms(), ["norms"], [ls.observe.norms]])
def test_observers_that_are_none_are_rejected_when_they_are_passed(observers):
    with pytest.raises(
        ValueError, match=r"^observe must be a list of observers such as \[ls\.observe\.norms\(\)\], got"
    ):
        ls.TrainerRecorder(observe=observers)
