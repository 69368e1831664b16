"""Gradient norms by module: the gradients that the optimizer gets, in every loop, and together the global norm."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from tiny import FAMILIES, inputs, tiny
from tolerance import rounding
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trainers import METHODS, QV, STEPS, Batches, by_train, by_trainer, fresh, same_weights, with_peft
from transformers import MixtralConfig, MixtralForCausalLM

import lorascope as ls
from lorascope.adapters.host_weights import to_host
from lorascope.adapters.peft_layers import unwrap_peft_model
from lorascope.observe import gradient_norms

ALORA = ls.ALoRA(init_rank=2, prune=5, warm_steps=1, round_steps=1, rounds=3, lr=1e-2)
OWN = METHODS | {"autolora": ls.AutoLoRA(rank=3), "dora": ls.DoRA(rank=2), "vera": ls.VeRA(rank=8, lr=1e-1)}
EVERY = [ls.observe.gradients(every=1)]
CLOSE = rounding(torch.float32, 1 << 12)  # no tensor of the tiny models has more entries


@pytest.fixture
def used():
    """Return the squared norms in float64 of all gradients with which any optimizer steps, by step."""
    steps: list[dict[int, float]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        members = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append({id(p): float(p.grad.double().square().sum()) for p in members})

    handle = register_optimizer_step_pre_hook(keep)
    yield steps
    handle.remove()


def norms_of(run: ls.Run) -> dict[int, dict[str, float]]:
    """Return the recorded norms of each step by module."""
    rows = run.table[run.table["quantity"] == "gradient_norm"]
    return {
        step: dict(zip(part["module"].astype(str), part["value"], strict=True)) for step, part in rows.groupby("step")
    }


def totals(run: ls.Run) -> dict[int, float]:
    return {step: math.hypot(*found.values()) for step, found in norms_of(run).items()}


def global_norms(run: ls.Run) -> dict[int, float]:
    rows = run.table[run.table["quantity"] == "grad_norm"]
    return dict(zip(rows["step"], rows["value"], strict=True))


def batch_loss(model: nn.Module, seed: int) -> torch.Tensor:
    return model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().mean()


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_norms_equal_those_of_torch_by_hand(tmp_path):
    model, optimizer = small()
    expected = {}
    with ls.record(model, optimizer, tmp_path / "run", EVERY) as recorder:
        for step in (1, 2):
            optimizer.zero_grad()
            batch_loss(model, step).backward()
            expected[step] = {
                "0": float(torch.cat([model[0].weight.grad.flatten(), model[0].bias.grad]).norm()),
                "2": float(model[2].weight.grad.norm()),
            }
            optimizer.step()
            recorder.step()
    found = norms_of(ls.load(tmp_path / "run"))
    assert found == {step: pytest.approx(each, rel=1e-6) for step, each in expected.items()}


@pytest.mark.parametrize("clip", [1e6, 0.05])
@pytest.mark.parametrize("name", OWN)
def test_squares_of_all_modules_add_up_to_the_global_norm(name, clip, bert, task, tmp_path, used):
    _, run, _ = by_train(bert, task, OWN[name], tmp_path / "run", clip=clip, observe=EVERY)
    found, before = totals(run), global_norms(run)
    assert found.keys() == before.keys() == set(range(1, STEPS + 1))
    for step, norm in before.items():
        assert found[step] == pytest.approx(min(norm, clip * norm / (norm + 1e-6)), rel=CLOSE)
        squares = used[step - STEPS - 1].values()  # the last steps are those of the last phase
        assert found[step] == pytest.approx(math.sqrt(math.fsum(squares)), rel=CLOSE)


def test_components_that_alora_removes_do_not_count(bert, task, tmp_path):
    _, run, _ = by_train(bert, task, ALORA, tmp_path / "run", clip=1e6, observe=EVERY)
    ranks = run.table[(run.table["quantity"] == "rank") & (run.table["step"] == 1)]
    empty = set(ranks.loc[ranks["value"] == 0, "module"])
    assert empty
    assert {module for module, norm in norms_of(run)[1].items() if norm == 0} == empty


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_tensor_counts_once_at_the_layer_that_has_it(family, tmp_path):
    model = tiny(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ls.record(model, optimizer, tmp_path / "run", EVERY) as recorder:
        model(**inputs(model)).logits.float().square().mean().backward()
        optimizer.step()
        recorder.step()
    run = ls.load(tmp_path / "run")
    squares = {n: float(p.grad.double().square().sum()) for n, p in model.named_parameters() if p.grad is not None}
    assert totals(run)[1] == pytest.approx(math.sqrt(math.fsum(squares.values())), rel=CLOSE)
    modules = ls.module_table.describe(model)
    rows = run.table[run.table["quantity"] == "gradient_norm"]
    for block in modules[modules["role"] == "block"].itertuples():
        inside = [value for name, value in squares.items() if name.startswith(f"{block.module}.")]
        own = rows[(rows["stack"] == block.stack) & (rows["layer"] == block.layer)]["value"]
        assert math.hypot(*own) == pytest.approx(math.sqrt(math.fsum(inside)), rel=CLOSE)
    # Only parameters outside of all modules with a weight have names that the module table does not have.
    others = set(rows["module"].astype(str)) - set(modules["module"])
    assert not any(name == f"{other}.weight" for other in others for name in squares)


@pytest.mark.parametrize("name", METHODS)
def test_trainer_records_what_train_records(name, bert, task, tmp_path):
    settings = {"clip": 0.1, "accumulate": 2}
    _, run, rows = by_train(bert, task, METHODS[name], tmp_path / "run", observe=[Batches(), *EVERY], **settings)
    model, recorder = fresh(bert, task), ls.TrainerRecorder(tmp_path / "recorded", observe=EVERY)
    by_trainer(model, rows, tmp_path, METHODS[name], recorder=recorder, **settings)
    assert norms_of(ls.load(tmp_path / "recorded")) == norms_of(run)
    assert len(norms_of(run)) == STEPS


OPTIONS: dict[str, Any] = {
    "bias": "all",
    "lora_bias": True,
    "use_dora": True,
    "trainable_token_indices": {"word_embeddings": [3, 4]},
}


@pytest.mark.parametrize(
    ("settings", "clip"),
    [({}, 1e6), ({}, 0.05), *(({name: value}, 0.05) for name, value in OPTIONS.items())],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else None,
)
def test_tensors_of_peft_count_at_the_adapted_modules(settings, clip, bert, task, tmp_path, used):
    _, _, rows = by_train(bert, task, METHODS["lora"], tmp_path / "rows")
    used.clear()
    model = with_peft(fresh(bert, task), peft.LoraConfig(**QV, r=3, **settings))
    by_trainer(model, rows, tmp_path, recorder=ls.TrainerRecorder(observe=EVERY), max_grad_norm=clip)
    run = ls.load(tmp_path / "lorascope")
    before = global_norms(run)
    for step, squares in enumerate(used, start=1):
        assert totals(run)[step] == pytest.approx(math.sqrt(math.fsum(squares.values())), rel=CLOSE)
        assert totals(run)[step] == pytest.approx(min(before[step], clip), rel=1e-4)  # 1e-6 is added to the norm
    names = {name: id(p) for name, p in unwrap_peft_model(model).named_parameters() if id(p) in used[-1]}
    for module, norm in norms_of(run)[STEPS].items():
        own = [used[-1][key] for name, key in names.items() if name.startswith(f"{module}.")]
        assert norm == pytest.approx(math.sqrt(math.fsum(own)), rel=CLOSE)
    expected = {name.removesuffix(".token_adapter") for name, _ in ls.deltas(model)} | {"classifier"}
    if settings == {"bias": "all"}:
        expected |= {name.removesuffix(".bias") for name, _ in fresh(bert, task).named_parameters() if "bias" in name}
    assert norms_of(run)[STEPS].keys() == expected


def test_adapter_of_experts_in_one_tensor_counts_at_their_module(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=60, num_attention_heads=2, num_key_value_heads=2, **sizes)
    experts = peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(MixtralForCausalLM(config), experts)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with ls.record(model, optimizer, tmp_path / "run", EVERY) as recorder:
            model(input_ids=torch.arange(3, 10)[None]).logits.square().mean().backward()
            optimizer.step()
            recorder.step()
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    run = ls.load(tmp_path / "run")
    assert norms_of(run)[1].keys() == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts"}
    assert totals(run)[1] == pytest.approx(float(total), rel=CLOSE)


def test_weights_are_bitwise_equal_with_and_without_the_observer(bert, task, tmp_path):
    models = [
        by_train(bert, task, METHODS["full"], tmp_path / str(len(observe)), observe=observe)[0]
        for observe in ([], EVERY)
    ]
    same_weights(*models)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [None, 0.02])
def test_scale_of_grad_scaler_is_taken_off(clip, fused, tmp_path):
    found = []
    for scale in (1.0, 1024.0):
        model, _ = small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with ls.record(model, optimizer, tmp_path / str(scale), EVERY) as recorder:
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(batch_loss(model, step)).backward()
                if clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                recorder.step()
        found.append(norms_of(ls.load(tmp_path / str(scale))))
    assert found[0] == found[1]  # a power of two does not round
    assert len(found[0]) == 3
    if clip is not None:
        assert math.hypot(*found[0][1].values()) == pytest.approx(clip, rel=1e-3)


def test_frozen_blocks_of_lisa_have_no_rows(bert, task, tmp_path):
    _, run, _ = by_train(bert, task, replace(METHODS["lisa"], interval=2), tmp_path / "run", observe=EVERY)
    active = run.table[(run.table["quantity"] == "active") & (run.table["value"] == 1)]
    rows = run.table[run.table["quantity"] == "gradient_norm"].dropna(subset="layer")
    draws = dict(zip(active["step"], active["layer"], strict=True))
    assert {(step, layer) for step, layer in zip(rows["step"], rows["layer"], strict=True)} == {
        (step, draws[max(drawn for drawn in draws if drawn <= step)]) for step in range(1, STEPS + 1)
    }


@pytest.mark.parametrize("steps", [None, 3])
def test_last_step_is_recorded_only_while_its_gradients_exist(steps, tmp_path):
    model, optimizer = small()
    with ls.record(model, optimizer, tmp_path / "run", [ls.observe.gradients(every=2)], steps=steps) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            batch_loss(model, step).backward()
            optimizer.step()
            recorder.step()
        batch_loss(model, 3).backward()  # of a batch that no step uses
    assert set(norms_of(ls.load(tmp_path / "run"))) == ({2} if steps is None else {2, 3})


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_were_reset_are_reported(set_to_none, tmp_path):
    model, optimizer = small()
    with ls.record(model, optimizer, tmp_path / "run", EVERY) as recorder:
        batch_loss(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        with pytest.warns(UserWarning, match="cannot record gradients.*reset") as caught:
            recorder.step()
    assert "\n" not in str(caught[0].message)
    assert not norms_of(ls.load(tmp_path / "run"))


class Sums(nn.Module):
    """Model that itself has a parameter, next to an embedding with sparse gradients that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift = nn.Parameter(torch.ones(3))
        self.table = nn.Embedding(5, 3, sparse=True)
        self.again = self.table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return (self.table(ids) + self.again(ids) + self.shift).square().sum()


def test_sparse_gradients_and_parameters_of_the_model_itself_count(tmp_path):
    model = Sums()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ls.record(model, optimizer, tmp_path / "run", EVERY) as recorder:
        model(torch.tensor([1, 1, 4])).backward()
        optimizer.step()
        recorder.step()
    expected = {"shift": float(model.shift.grad.norm()), "table": float(model.table.weight.grad.to_dense().norm())}
    assert norms_of(ls.load(tmp_path / "run")) == {1: pytest.approx(expected, rel=1e-6)}


def test_norms_are_copied_to_the_host_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(gradient_norms, "to_host", lambda tensors: calls.append(len(tensors)) or to_host(tensors))
    model, optimizer = small()
    with ls.record(model, optimizer, tmp_path / "run", [ls.observe.gradients(every=2)], steps=4) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            batch_loss(model, step).backward()
            optimizer.step()
            recorder.step()
    assert calls == [3, 3]
