"""Sensitivities compared with gradients of the weights themselves, of the model or of its folded copy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_delta import Matrix
from tiny import tiny
from tolerance import TEXT, TINY, near, rounding
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.adapters.hidden_states import token_means
from lorascope.adapters.host_weights import orient_weight
from lorascope.inputs import models
from lorascope.inputs.tokenization import IGNORED
from lorascope.methods import LISA, AdaLoRA, Adapprox, ALoRA, AutoLoRA, FourierFT, Full, HydraLoRA, LoRA, NeFT
from lorascope.methods.method import Step
from lorascope.observe.sensitivity import _changes
from lorascope.schema import module_table
from lorascope.schema.module_roles import FFN

FAST = {"steps": 4, "batch_size": 8, "eval_every": 2, "eval_size": 16, "progress": False, "device": "cpu"}
LOOK = {"every": 2, "batches": 2, "rows": 6}


class Copying(observe.Observer):
    """Observer that stores a copy of the model and the held-out batches at the last step."""

    def config(self):
        return {"name": "Copying"}

    def __call__(self, step):
        if step.last:
            text = step.held_out(12).batch
            batches = [{key: value[i : i + 6] for key, value in text.items()} for i in (0, 6)]
            Copying.kept = copy.deepcopy(step.model), batches, dict(step.base)
        return ()


def gradients(model, modules, batches):
    """Compute gradients of the weights by autograd, averaged over the batches, as (out, in)."""
    model.eval().requires_grad_(True)
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    hosts = {name: model.get_submodule(name) for name in modules}
    return {name: orient_weight(host, host.weight.grad) for name, host in hosts.items()}


METHODS = {
    "full": ("bert", Full(lr=1e-2)),
    "full, Conv1D": ("gpt2", Full(lr=1e-2)),
    "full, gates": ("llama", Full(lr=1e-2)),
    "frozen blocks": ("bert", LISA(lr=1e-2, n_active=1)),
    "masked neurons": ("llama", NeFT(lr=1e-2, num_neurons=40, select_by="random")),
    "adapprox": ("bert", Adapprox(lr=1e-2, min_dim=8)),
    "lora": ("bert", LoRA(lr=1e-2, dropout=0.3)),
    "lora, Conv1D": ("gpt2", LoRA(lr=1e-2, targets="all-linear")),
    "adalora": ("bert", AdaLoRA(lr=1e-2)),
    "autolora": ("bert", AutoLoRA(lr=1e-2, rank=3, targets="all-linear")),
    "alora": ("bert", ALoRA(lr=1e-2, init_rank=2, prune=3, warm_steps=1, round_steps=1, rounds=2)),
    "fourierft": ("bert", FourierFT(lr=1e-1, coefficients=20)),
    "experts with uniform gates": ("bert", HydraLoRA(lr=1e-2, router="uniform")),
}


def measured(run, quantity, module, step=4):
    rows = run.table[
        (run.table["quantity"] == quantity) & (run.table["module"] == module) & (run.table["step"] == step)
    ]
    return rows.sort_values("index")["value"].to_numpy()


@pytest.mark.parametrize("case", list(METHODS))
def test_sensitivity_equals_weight_times_its_gradient(case, task, tmp_path, request):
    family, method = METHODS[case]
    model = models.load(request.getfixturevalue(family), task=task)
    run = ls.train(model, task, method, observe=[observe.neurons(**LOOK), Copying()], out=tmp_path / "run", **FAST)
    kept, batches, base = Copying.kept
    modules = module_table.match(module_table.describe(kept), "all-linear")
    if delta.attached_deltas(kept):
        delta.fold(kept)
    weights = {name: delta.host_weight(kept.get_submodule(name)).detach() for name in modules}
    for name, gradient in gradients(kept, modules, batches).items():
        sensitivity = (weights[name] * gradient).abs().double().numpy()
        assert sensitivity.any()
        for quantity, axis in (("sensitivity_out", 1), ("sensitivity_in", 0)):
            found = measured(run, quantity, name)
            assert found == near(sensitivity.sum(axis), terms=TINY, growth=TEXT)
    check_changes(run, kept, base)


def check_changes(run, model, base):
    """Compare the changes of feed-forward neurons with cosine distances and norms by definition."""
    for row in run.modules[run.modules["role"].isin(FFN)].itertuples():
        host = model.get_submodule(row.module)
        before, after = (orient_weight(host, w.detach()).double() for w in (base[f"{row.module}.weight"], host.weight))
        if row.role == "ffn_out":
            before, after = before.T, after.T
        change = (after - before).norm(dim=1)
        u, v = nn.functional.normalize(before), nn.functional.normalize(after)
        found = {quantity: measured(run, quantity, row.module) for quantity in ("neuron_cosine", "neuron_update")}
        assert found["neuron_update"] == near(change, float(before.norm(dim=1).max()), terms=TINY)
        rtol = rounding(terms=TINY, growth=4 * TEXT)
        np.testing.assert_allclose(found["neuron_cosine"], (u - v).square().sum(1) / 2, rtol=rtol, atol=1e-10)
        assert not measured(run, "neuron_update", row.module, step=0).any()


def test_sensitivity_with_a_router_uses_mean_gates(task, tmp_path, bert):
    """The gradient equals the base weight's, because the layer is linear in that weight for every gate."""
    model = models.load(bert, task=task)
    run = ls.train(
        model, task, HydraLoRA(lr=1e-2, gates_every=1), observe=[observe.neurons(**LOOK), Copying()],
        out=tmp_path / "run", **FAST,
    )  # fmt: skip
    kept, batches, _ = Copying.kept
    deltas = delta.attached_deltas(kept)
    for name, gradient in gradients(kept, list(deltas), batches).items():
        weight = delta.host_weight(kept.get_submodule(name)) + deltas[name].weight(deltas[name].mean_gates_)
        sensitivity = (weight.detach() * gradient).abs().sum(1)
        assert measured(run, "sensitivity_out", name) == near(sensitivity, terms=TINY, growth=TEXT)


def test_embedding_as_target_raises(task, tmp_path, bert):
    model = models.load(bert, task=task)
    with pytest.raises(ValueError, match=r"targets .*word_embeddings'"):
        ls.train(model, task, LoRA(), observe=[observe.neurons(targets="embed")], out=tmp_path / "run", **FAST)


def changes(model, base):
    """Return the recorded changes of a model's neurons from W_0, by quantity and module."""
    step = object.__new__(Step)
    step.model, step.modules, step.base = model, module_table.describe(model), base
    return {
        (record.quantity, record.module): dict(zip(record.index, record.value, strict=True))
        for record in _changes(step)
    }


def test_changes_in_a_16_bit_model_include_small_updates():
    """W is 1 and dW is 0.001 at every second weight, too small for bfloat16; norm and angle are worked by hand."""
    model = tiny("bert", head="base").to(torch.bfloat16)
    up, down = "encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"
    for module, d in ((up, 48), (down, 32)):
        nn.init.ones_(model.get_submodule(module).weight)
        update = torch.zeros(d, 80 - d)
        update[:: 1 if module == up else 2, :: 2 if module == up else 1] = 1e-3
        delta.attach(model, {module: Matrix(update)})
    found = changes(model, dict(model.named_parameters()))
    d, norm = 32, 1e-3 * 16**0.5
    cosine = (d + 16e-3) / (d * (16 + 16 * 1.001**2)) ** 0.5
    for module in (up, down):
        assert list(found["neuron_update", module].values()) == near([norm] * 48, terms=TINY, growth=1 / norm)
        assert list(found["neuron_cosine", module].values()) == pytest.approx([1 - cosine] * 48, rel=1e-3)


def test_changes_include_gates_fused_with_inputs():
    """One gate moves at a right angle by its own length, and one input is rescaled; all others are unchanged."""
    model = tiny("phi3")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module = "model.layers.0.mlp.gate_up_proj"
    gate, stretched = base[f"{module}.weight"][[3, 48 + 7]]
    turn = torch.zeros_like(gate)
    turn[:2] = torch.stack([-gate[1], gate[0]]) * gate.norm() / gate[:2].norm()
    with torch.no_grad():
        model.get_submodule(module).weight[3] += turn
        model.get_submodule(module).weight[48 + 7] *= 2
    found = changes(model, base)
    moved, turned = found["neuron_update", module], found["neuron_cosine", module]
    assert list(moved) == list(turned) == list(range(96))
    assert {n: value for n, value in moved.items() if value} == near(
        {3: float(gate.norm()), 55: float(stretched.norm())}, terms=TINY
    )
    assert turned[3] == near(1 - 0.5**0.5, terms=TINY)
    assert turned[55] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("targets", [6, 7])
def test_decoder_states_are_averaged_over_the_labels(targets: int) -> None:
    """Source and labels have different padding, also if they are equally long."""
    model = tiny("t5", "seq2seq").eval()
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(4, 60, (2, size), generator=draw) for size in (6, targets))
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    labels[0, 4:] = IGNORED
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    found = token_means(model, batch)
    encoder, decoder = output.encoder_hidden_states, output.decoder_hidden_states
    for stack, states, kept in (("encoder", encoder, mask == 1), ("decoder", decoder, labels != IGNORED)):
        for row in range(2):
            wanted = torch.stack(states[1:])[:, row, kept[row]].double().mean(1).numpy()
            np.testing.assert_allclose(found[stack][row], wanted, rtol=1e-12)
