"""Float32 copies of 16-bit weights in training, compared with a plain loop that keeps them itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import inputs, tiny
from torch import nn
from torch.func import functional_call

import lorascope as ls
from lorascope.methods import LISA, Adapprox, Full, LoRA, NeFT
from lorascope.methods.method import Method, Step, trained_parameters
from lorascope.training.master_weights import MASTER, train_in_float32

RATE = 5e-5
"""Learning rate at which a step changes no weight of 0.03 in bfloat16."""
STEPS = 5
METHODS = {
    "Full": Full(),
    "Adafactor": Full(optimizer_name="adafactor"),
    "CAME": Full(optimizer_name="came"),
    "Adapprox": Adapprox(min_dim=8, reselect_every=2, growth_scale=None),
    "NeFT": NeFT(neurons={"model.layers.0.mlp.up_proj": [0, 3]}),
}


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(**inputs(model)).logits.float().square().mean()


def attach(method: Method, model: nn.Module) -> torch.optim.Optimizer:
    method.attach(model)
    return method.optimizer(model, RATE, RATE, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_steps_equal_a_loop_that_rounds_its_own_float32_weights(name: str, dtype: torch.dtype) -> None:
    """The second model has the weights in float32, and the loss rounds them to compute the same gradients."""
    narrow = tiny("llama").to(dtype)
    wide = copy.deepcopy(narrow).float()
    method, twin = copy.deepcopy(METHODS[name]), copy.deepcopy(METHODS[name])
    ours, theirs = attach(method, narrow), attach(twin, wide)
    train_in_float32(ours)
    frozen = {key: weight.clone() for key, weight in narrow.named_parameters() if not weight.requires_grad}
    probe = copy.deepcopy(narrow)
    for _ in range(STEPS):
        for model, optimizer, steps in ((narrow, ours, method), (wide, theirs, twin)):
            optimizer.zero_grad()
            weights = dict(wide.named_parameters())
            if model is narrow:
                loss_of(narrow).backward()
            else:
                rounded = {key: weight.to(dtype) for key, weight in weights.items()}
                functional_call(probe, rounded, (), inputs(narrow)).logits.float().square().mean().backward()
            if isinstance(steps, NeFT):
                steps.after_backward(Step(0, STEPS, model, optimizer, {}, None, *[None] * 3))  # type: ignore[arg-type]
            optimizer.step()
    for (key, weight), master in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert weight.dtype == dtype
        assert torch.equal(weight, master.to(dtype)), key
        if key in frozen:
            assert torch.equal(weight, frozen[key]), key
        elif weight.grad is not None:
            assert torch.equal(ours.state[weight][MASTER], master), key
            assert weight.grad.dtype == dtype
    # The control: without copies, other weights result.
    bare = copy.deepcopy(METHODS[name])
    lossy = tiny("llama").to(dtype)
    optimizer = attach(bare, lossy)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(lossy).backward()
        if isinstance(bare, NeFT):
            bare.after_backward(Step(0, STEPS, lossy, optimizer, {}, None, *[None] * 3))  # type: ignore[arg-type]
        optimizer.step()
    pairs = zip(narrow.parameters(), lossy.parameters(), strict=True)
    assert not all(torch.equal(ours_, theirs_) for ours_, theirs_ in pairs)


def test_float32_weights_have_no_copies() -> None:
    model = tiny("llama")
    optimizer = attach(Full(), model)
    train_in_float32(optimizer)
    loss_of(model).backward()
    optimizer.step()
    assert all(MASTER not in state for state in optimizer.state.values())


def test_names_of_the_same_memory_stay_valid() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    view, address = weight.detach()[:2], weight.data_ptr()
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    train_in_float32(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.data_ptr() == address
    assert view.tolist() == [0.5, 0.5]
    assert weight.grad is not None


def test_loaded_states_are_not_cast() -> None:
    """torch casts states to the dtype of the weights, as a Trainer that resumes from a checkpoint."""
    runs = []
    for interrupted in (False, True):
        model = tiny("llama").to(torch.bfloat16)
        optimizer = attach(Full(), model)
        train_in_float32(optimizer)
        for step in range(4):
            if interrupted and step == 2:
                stored = copy.deepcopy(optimizer.state_dict())
                optimizer = attach(Full(), model)
                train_in_float32(optimizer)
                optimizer.load_state_dict(stored)
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        runs.append([optimizer.state[parameter] for parameter in trained_parameters(optimizer)])
    for before, after in zip(*runs, strict=True):
        assert before.keys() == after.keys() >= {MASTER}
        for key, value in before.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, after[key])


def train(model: Any, task: ls.Task, method: Method, out: Path, **options: Any) -> ls.Run:
    arguments = {
        "steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "progress": False,
        "observe": [ls.observe.memory()],
    }
    return ls.train(model, task, method, out=out, **arguments | options)


def half(folder: str, task: ls.Task) -> nn.Module:
    return ls.models.load(folder, task).to(torch.bfloat16)


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_lisa_keeps_copies_of_active_blocks_and_ends(llama: str, task: ls.Task, tmp_path: Path, policy: Any) -> None:
    """A block has as many weights as another, so the number of bytes shows which have copies and moments."""
    model = half(llama, task)
    method = LISA(n_active=1, interval=3, moment_policy=policy, draw_seed=2)
    run = train(model, task, method, tmp_path / policy)
    active = run.table[run.table["quantity"] == "active"]
    drawn = active[active["value"] == 1]["module"].tolist()
    assert len(set(drawn)) == len(drawn) == 2  # else the blocks could not be distinguished
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in set(drawn)}
    ends = sum(p.numel() for p in model.parameters()) - sum(sizes.values())
    count = len(list(model.parameters())) - sum(len(list(model.get_submodule(drawn[0]).parameters())) for _ in sizes)
    blocks = 1 if policy == "reset" else 2
    entries = ends + blocks * sizes[drawn[0]]
    tensors = count + blocks * len(list(model.get_submodule(drawn[0]).parameters()))
    rows = run.table[run.table["quantity"] == "optimizer_bytes"]
    # Two moments and the copy of 4 bytes per entry, and a count of the steps per tensor.
    assert rows["value"].iloc[-1] == 12 * entries + 4 * tensors


def test_a_resumed_run_equals_an_uninterrupted_one(bert: str, task: ls.Task, tmp_path: Path) -> None:
    """The classifier of a LoRA has copies too; both runs end at the same bits."""
    for name, method in (("full", Full(lr=RATE)), ("lora", LoRA(rank=2))):
        whole = half(bert, task)
        train(whole, task, method, tmp_path / f"{name}-whole")
        broken = half(bert, task)
        step, calls = torch.optim.AdamW.step, []

        def stop(self: Any, *arguments: Any, step: Any = step, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise InterruptedError
            return step(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", stop)
            with pytest.raises(InterruptedError):
                train(broken, task, method, tmp_path / f"{name}-broken")
        resumed = half(bert, task)
        train(resumed, task, method, tmp_path / f"{name}-broken")
        for (key, weight), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
            assert torch.equal(weight, other), key


def test_a_base_in_bfloat16_stays_as_it_was(llama: str, task: ls.Task, tmp_path: Path) -> None:
    model = half(llama, task)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    run = train(model, task, LoRA(rank=2, targets="all-linear"), tmp_path / "run")
    assert np.isfinite(run.meta.test.loss)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before.get(name, weight))}
    assert not changed
