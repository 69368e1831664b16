"""What is alive at a step, found among tensors of known size."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from tiny import tiny
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.analysis import accounting
from lorascope.method import Step
from lorascope.methods import Full, LoRA

FAST = {"steps": 3, "batch_size": 8, "eval_every": 0, "eval_size": 16, "progress": False, "device": "cpu"}
BLOCK = 100 * 2**20


def look(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    step = Step(0, 1, model, optimizer, {}, pd.DataFrame(), lambda *_: None, lambda *_: None, lambda *_: None)
    return {record.quantity: record.value for record in observe.memory()(step)}


def test_a_known_tensor_is_found_in_each_of_its_places():
    model = nn.utils.skip_init(nn.Linear, BLOCK // 4 // 1024, 1024, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert look(model, optimizer) == {"parameter_bytes": BLOCK, "gradient_bytes": 0, "optimizer_bytes": 0}
    model.weight.grad = torch.ones_like(model.weight)
    assert look(model, optimizer)["gradient_bytes"] == BLOCK
    optimizer.step()
    assert look(model, optimizer) == {
        "parameter_bytes": BLOCK,
        "gradient_bytes": BLOCK,
        "optimizer_bytes": pytest.approx(2 * BLOCK, rel=0.02),
    }


def test_shared_storage_counts_once_and_views_count_whole():
    whole = torch.zeros(1000)
    assert observe.storage_bytes([whole, whole[:10], whole.view(10, 100), torch.zeros(5)]) == 4000 + 20
    assert observe.storage_bytes([whole[:10]]) == 4000


def test_tied_weights_count_once():
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    twin = nn.Parameter(model.lm_head.weight.detach())  # another parameter on the same storage
    model.lm_head.weight = twin
    assert len(list(model.parameters())) > len(accounting.shapes_of(tiny("gpt2")))
    found = look(model, torch.optim.AdamW(model.parameters()))
    assert found["parameter_bytes"] == accounting.full(accounting.shapes_of(tiny("gpt2"))).parameters


def test_state_is_found_however_it_is_nested():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {
        "factors": [(torch.zeros(3), torch.zeros(4))],
        "rank": 2,
        "own": {"M": torch.zeros(5)},
    }
    assert look(model, optimizer)["optimizer_bytes"] == 4 * 12


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", [Full(), LoRA(rank=3, targets="all-linear")], ids=lambda method: method.name)
def test_a_run_holds_what_is_computed(family, method, task, tmp_path, request):
    model = ls.models.load(request.getfixturevalue(family), task=task)
    shapes = accounting.shapes_of(model)
    run = ls.train(model, task, method, observe=[observe.memory(every=1)], out=tmp_path / "run", **FAST)
    table = run.table.pivot_table(index="step", columns="quantity", values="value", observed=True)
    head = [name for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name]
    held = accounting.full(shapes) if method.name == "full" else accounting.lora(shapes, 3, "all-linear", head)
    assert table.loc[0, ["gradient_bytes", "optimizer_bytes"]].tolist() == [0, 0]
    for step in (1, 2, 3):
        found = table.loc[step, ["parameter_bytes", "gradient_bytes", "optimizer_bytes"]].astype(int)
        assert accounting.Held(*found.tolist()) == held
