"""Test NeFT against worked numbers, plain AdamW on the same tensors, and weights that must not change."""

from __future__ import annotations

import copy
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny
from tolerance import near
from torch import nn

import lorascope as ls
from lorascope.adapters.host_weights import host_weight
from lorascope.analysis import neurons, selected_neurons
from lorascope.cli import main
from lorascope.inputs import models
from lorascope.methods import Full, LoRA, NeFT
from lorascope.methods.method import Step, config, task_head
from lorascope.methods.neft import Mask, distances

FAST = {"steps": 4, "batch_size": 8, "eval_size": 8, "test_size": 8, "device": "cpu", "progress": False}
UP, DOWN = "bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"
CHOSEN = {UP.format(0): [0, 3], DOWN.format(1): [1]}


def train(folder, task, method, out, **settings):
    model = models.load(folder, task=task)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    run = ls.train(model, task, method, out=out, **FAST | settings)
    return model, before, run


def step_of(optimizer):
    """Build a step with only an optimizer, which is all that the mask needs."""
    step = object.__new__(Step)
    step.optimizer = optimizer
    return step


def changed_rows_and_columns(model, before, module):
    """Return the outputs (rows) and inputs (columns) of a module that contain a changed weight."""
    host = model.get_submodule(module)
    old = copy.deepcopy(host)
    old.weight.data = before.get(f"{module}.weight", host.weight).clone()
    changed = host_weight(host) != host_weight(old)
    return changed.any(1).nonzero().flatten().tolist(), changed.any(0).nonzero().flatten().tolist()


class Toy(nn.Module):
    """Gated feed-forward module of width 4 with 6 hidden units."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.gate_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down_proj = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def test_only_selected_entries_of_the_toy_change():
    toy = Toy()
    before = copy.deepcopy(toy.state_dict())
    masks = [Mask.of(toy, "up_proj", 1, [0, 3]), Mask.of(toy, "down_proj", 0, [1])]
    optimizer = torch.optim.AdamW([mask.weight for mask in masks], lr=0.1, weight_decay=0)
    method, step = NeFT(), step_of(optimizer)
    method._masks = dict(zip(("up_proj", "down_proj"), masks, strict=True))
    x = torch.randn(16, 4)
    for _ in range(5):
        optimizer.zero_grad()
        (toy(x) - 1).square().mean().backward()
        method.after_backward(step)
        optimizer.step()
    rows = (toy.up_proj.weight != before["up_proj.weight"]).any(1).nonzero().flatten().tolist()
    columns = (toy.down_proj.weight != before["down_proj.weight"]).any(0).nonzero().flatten().tolist()
    assert (rows, columns) == ([0, 3], [1])
    assert torch.equal(toy.gate_proj.weight, before["gate_proj.weight"])
    assert sum(mask.weight.numel() - mask.covered for mask in masks) == 12


@pytest.mark.parametrize(("family", "up", "down"), [
    ("bert", UP.format(0), DOWN.format(0)),
    ("gpt2", "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"),
    ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"),
    ("phi3", "model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj"),
])  # fmt: skip
def test_mask_follows_the_stored_axis(family, up, down):
    """Masked gradients are nonzero in rows of the input and columns of the output projection, in any layout."""
    model = tiny(family)
    method = NeFT(neurons={up: [50, 70] if family == "phi3" else [3, 5], down: [7]})
    method.attach(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{up}.weight", f"{down}.weight", *task_head(model)}
    for module in (up, down):
        model.get_submodule(module).weight.grad = torch.ones_like(model.get_submodule(module).weight)
    method.after_backward(step_of(torch.optim.SGD([p for p in model.parameters() if p.requires_grad])))
    for module, axis in ((up, 0), (down, 1)):
        host = copy.deepcopy(model.get_submodule(module))
        host.weight.data = model.get_submodule(module).weight.grad
        lines = host_weight(host).movedim(axis, 0)
        assert lines.any(1).nonzero().flatten().tolist() == list(method.neurons[module])
        assert lines[method.neurons[module][0]].all()
    held = sum(p.numel() for name, p in model.named_parameters() if name in trained) - method.frozen_entry_count()
    assert held - sum(p.numel() for p in task_head(model).values()) == 3 * 32


@pytest.mark.parametrize("settings", [
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "accumulate": 2},
    {"precision": "bf16", "weight_decay": 0.1},
    {"weight_decay": 0.0, "clip": None},
], ids=["decay", "accumulation", "bf16", "plain"])  # fmt: skip
def test_unselected_weights_do_not_change(bert, task, tmp_path, settings):
    model, before, run = train(bert, task, NeFT(neurons=CHOSEN, lr=1e-2, head_lr=1e-2), tmp_path / "run", **settings)
    head = set(task_head(model))
    assert head
    for name, parameter in model.named_parameters():
        if name in head:
            assert not torch.equal(parameter, before[name])
        elif name.removesuffix(".weight") not in CHOSEN:
            assert torch.equal(parameter, before[name]), name
    assert changed_rows_and_columns(model, before, UP.format(0))[0] == [0, 3]
    assert changed_rows_and_columns(model, before, DOWN.format(1))[1] == [1]
    leak = run.table[run.table["quantity"] == "leak"]
    assert set(leak["module"]) == set(CHOSEN)
    assert not leak["value"].any()
    assert run.meta.parameters.trained - run.meta.parameters.head == 3 * 32


def rows_under_a_mask(weight_decay):
    """Build a host of two rows of ones, the first selected; return method, step and host."""
    host, method = nn.Linear(4, 2, bias=False, dtype=torch.float64), NeFT()
    nn.init.ones_(host.weight)
    method._masks = {"": Mask.of(host, "", 1, [0])}
    step = step_of(torch.optim.AdamW([host.weight], lr=0.1, weight_decay=weight_decay))
    step.base = {".weight": host.weight.detach().clone()}
    return method, step, host


def test_weight_decay_changes_only_selected_neurons():
    """In three steps of learning rate 0.1 and decay 0.1 a row shrinks by (1 - 0.01)^3, unless it is restored."""
    method, step, host = rows_under_a_mask(0.1)
    for _ in range(3):
        host.weight.grad = torch.tensor([[0.0] * 4, [5.0] * 4], dtype=torch.float64)
        method.after_backward(step)
        step.optimizer.step()
        method.after_step(step)
    chosen, masked = host.weight.detach()
    assert chosen.tolist() == near([0.970299] * 4, depth=3 * 8)
    assert masked.tolist() == [1.0] * 4


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"precision": "bf16"}], ids=["", "decay", "bf16"])
def test_all_neurons_selected_equals_fine_tuning_of_the_groups(bert, task, tmp_path, settings):
    class Matrices(Full):
        def attach(self, model):
            model.requires_grad_(False)
            for module in (*places, *(name.rpartition(".")[0] for name in task_head(model))):
                model.get_submodule(module).weight.requires_grad_(True)
            for parameter in task_head(model).values():
                parameter.requires_grad_(True)

    places = [name.format(layer) for layer in range(2) for name in (UP, DOWN)]
    every = NeFT(neurons={module: list(range(48)) for module in places}, lr=1e-2, head_lr=1e-2)
    ours, _, run = train(bert, task, every, tmp_path / "ours", **settings)
    theirs, *_ = train(bert, task, Matrices(lr=1e-2, head_lr=1e-2), tmp_path / "theirs", **settings)
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert run.meta.parameters.trained - run.meta.parameters.head == 4 * 48 * 32


@pytest.mark.parametrize(("clip_before", "left"), [(None, 1.0), (1.0, 0.6)])
def test_clip_before_clips_before_the_mask(clip_before, left):
    """Clipping (3, 0) and a masked (0, 4) to norm 1 leaves 1 after the mask and 0.6 before it."""
    host = nn.Linear(2, 2, bias=False)
    method = NeFT(clip_before=clip_before)
    method._masks = {"": Mask.of(host, "", 1, [0])}
    host.weight.grad = torch.tensor([[3.0, 0], [0, 4]])
    optimizer = torch.optim.AdamW([host.weight])
    method.after_backward(step_of(optimizer))
    torch.nn.utils.clip_grad_norm_([host.weight], 1.0)
    assert float(method._unmasked) == 5
    assert host.weight.grad.tolist() == [[pytest.approx(left, abs=1e-5), 0], [0, 0]]


def test_masked_gradient_that_is_not_finite_becomes_zero():
    host = nn.Linear(2, 2, bias=False)
    method = NeFT()
    method._masks = {"": Mask.of(host, "", 1, [0])}
    host.weight.grad = torch.tensor([[1.0, 1], [np.inf, np.nan]])
    method.after_backward(step_of(torch.optim.SGD([host.weight])))
    assert host.weight.grad.tolist() == [[1, 1], [0, 0]]


@pytest.fixture(scope="module", params=["bert", "gpt2", "llama"])
def phased(request, task, tmp_path_factory):
    """Train NeFT with its full fine-tuning; return folder, model, W_0 and run."""
    folder, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("neft") / "run"
    return folder, *train(folder, task, NeFT(num_neurons=9, lr=1e-2, head_lr=1e-2, tune_steps=3), out)


def test_selected_neurons_rotated_most_and_training_restarts_from_the_base(phased, task):
    folder, model, before, run = phased
    (tune,) = run.parents
    assert (tune.meta.method["name"], tune.meta.settings["steps"]) == ("full", 3)
    assert run.meta.recipe == tune.meta.recipe
    assert json.loads((run.path.parent / "recipe.json").read_text(encoding="utf-8"))["phases"] == ["1-tune", "2-masked"]
    fresh, tuned = models.load(folder, task=task), models.load(folder, task=task)
    tune.restore(tuned)
    found = {}
    for part in neurons.list_groups(ls.module_table.describe(fresh)):
        one, two = (host_weight(m.get_submodule(part.module)).detach().double() for m in (fresh, tuned))
        cosine = torch.nn.functional.cosine_similarity(one, two, dim=part.axis)
        found |= {(part.module, i): 1 - float(value) for i, value in enumerate(cosine)}
    worst = set(sorted(found, key=found.get)[-9:])
    table = run.table[run.table["quantity"] == "selected"]
    assert set(zip(table["module"].astype(str), table["index"], strict=True)) == worst
    assert set(table["step"]) == {0}
    scored = run.table[run.table["quantity"] == "selection_cosine"]
    assert {(row.module, row.index): row.value for row in scored.itertuples(index=False)} == pytest.approx(
        found, abs=1e-9
    )
    for module in {module for module, _ in found}:
        rows, columns = changed_rows_and_columns(model, before, module)
        lines = rows if ls.module_table.parse(module).role == "ffn_in" else columns
        assert set(lines) == {number for name, number in worst if name == module}
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in {module for module, _ in worst} and name not in task_head(model):
            assert torch.equal(parameter, before[name])


def test_recorded_distances_match_the_trained_model(phased, task):
    _, model, before, run = phased
    places = neurons.list_groups(ls.module_table.describe(model))
    expected = distances(model, places, before, dict(model.named_parameters()))
    found = run.table[run.table["quantity"] == "neuron_cosine"]
    assert set(found["step"]) == {4}
    assert found["value"].tolist() == expected["cosine_distance"].tolist()
    assert (found["value"] > 0).sum() == 9


def test_masked_reference_raises_and_names_the_phase_before_it(phased):
    """Its state contains every projection, but most of its neurons did not train and would tie."""
    *_, run = phased
    tune = run.path.parent.resolve() / "1-tune"
    line = rf"{run.id} .* 9 neurons.*{re.escape(str(tune))}$"
    for tuned in (run, run.path.parent):
        with pytest.raises(ValueError, match=line):
            NeFT(num_neurons=5, reference=tuned).prepare()
    method = NeFT(num_neurons=5, reference=tune)
    method.prepare()
    assert method.reference.id == run.parents[0].id


STORED = {
    "name": "neft", "lr": 2e-5, "head_lr": 1e-4, "search_share": 0, "num_neurons": 5, "parameter_share": 0.09,
    "targets": ["ffn_in", "ffn_out"], "select_by": "changed", "neurons": None, "tune_steps": None, "tune_lr": None,
    "clip_before": None,
}  # fmt: skip


def test_reference_folder_is_read_only_when_needed(phased, task, tmp_path):
    """The configuration, and so the run id, contains the id of the reference; a wrong folder deletes nothing."""
    base, *_, run = phased
    tune, folder = run.path.parent / "1-tune", tmp_path / "late"
    method = NeFT(num_neurons=5, reference=str(folder))
    with pytest.raises(FileNotFoundError, match=re.escape(str(folder))):
        config(method)
    shutil.copytree(tune, folder)
    tune_run = run.parents[0]
    stored = STORED | {"reference": {"run": tune_run.id}}
    assert config(method) == config(NeFT(num_neurons=5, reference=tune_run)) == stored
    model, method = models.load(base, task=task), NeFT(num_neurons=5, reference=folder)
    for wrong, error in ((run.path, ValueError), (tmp_path / "nowhere", FileNotFoundError)):
        with pytest.raises(error):
            ls.train(model, task, NeFT(num_neurons=5, reference=wrong), out=folder, overwrite=True, **FAST)
    method.attach(model)
    assert sum(map(len, method.neurons_.values())) == 5


@pytest.mark.parametrize(("tune_lr", "rate"), [(1e-5, 1e-5), (None, 1e-2)])
def test_tune_lr_overrides_the_learning_rate_of_train(tune_lr, rate, bert, task, tmp_path):
    method = NeFT(num_neurons=9, tune_lr=tune_lr, tune_steps=3)
    _, _, run = train(bert, task, method, tmp_path / "neft", lr=1e-2, head_lr=1e-2)
    _, _, separate = train(bert, task, Full(), tmp_path / "full", steps=3, lr=rate, head_lr=1e-2)
    (tune,) = run.parents
    found, expected = tune.tensors(), separate.tensors()
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    assert (tune.meta.settings["lr"], run.meta.settings["lr"]) == (rate, 1e-2)


def test_finished_reference_is_used_and_reversed_selects_the_other_end(bert, task, tmp_path):
    _, _, full = train(bert, task, Full(lr=1e-2, head_lr=1e-2), tmp_path / "full")
    chosen = {}
    for mode in neurons.MODES:
        method = NeFT(num_neurons=60, select_by=mode, reference=full if mode == "changed" else str(full.path))
        _, _, run = train(bert, task, method, tmp_path / mode)
        assert not run.parents
        assert run.meta.recipe["reference"] == {"run": full.id}
        table = run.table[run.table["quantity"] == "selected"]
        chosen[mode] = set(zip(table["module"].astype(str), table["index"], strict=True))
        assert len(chosen[mode]) == 60
    with pytest.raises(ValueError, match=rf"'probed'.*{full.id} .*linear probing"):
        NeFT(num_neurons=60, select_by="probed", reference=full)
    assert not chosen["changed"] & chosen["reversed"]
    assert len(chosen["changed"] & chosen["random"]) < 40


def test_reversed_share_adds_neurons_of_the_other_end(bert, task, tmp_path):
    """The selection is the union of both ends, which cannot exceed the number of neurons."""
    _, _, full = train(bert, task, Full(lr=1e-2, head_lr=1e-2), tmp_path / "full")
    model, _, run = train(bert, task, NeFT(num_neurons=9, reversed_share=0.02, reference=full), tmp_path / "both")
    total = sum(parameter.numel() for parameter in model.parameters())
    pool = selected_neurons.last_scores(run, "selection_cosine")
    first, other = (
        neurons.select_neurons(pool, 9, by="value"),
        neurons.select_neurons(pool, round(0.02 * total / 32), "reversed", by="value"),
    )
    assert selected_neurons.to_set(selected_neurons.list_selected(run)) == selected_neurons.to_set(
        pd.concat([first, other])
    )
    assert len(selected_neurons.list_selected(run)) == len(first) + len(other)
    more = NeFT(num_neurons=9, reversed_share=0.9, reference=full)
    with pytest.raises(ValueError, match=r"reversed_share must be <= 0\.\d+, .*183 .*, got 0.9"):
        train(bert, task, more, tmp_path / "more")
    none = NeFT(num_neurons=9, reversed_share=1e-9, reference=full)
    with pytest.raises(ValueError, match=r"reversed_share must be >= .*, got 1e-09"):
        train(bert, task, none, tmp_path / "none")
    assert "reversed_share" not in config(NeFT())


@pytest.mark.parametrize("select_by", ["changed", "probed"])
@pytest.mark.parametrize(("share", "more"), [(0.03, 0.06), (0.0531, 0.0207), (0.00882, 0.00882)])
def test_both_ends_together_have_as_many_neurons_as_their_sum(share, more, select_by):
    """The highest and the lowest scores, each once; separately rounded fractions may be one neuron off."""
    model, draw = tiny("bert"), np.random.default_rng(0)

    def chosen(**given):
        method = NeFT(select_by=select_by, **given)
        method._groups = neurons.list_groups(ls.module_table.describe(model))
        pool = neurons.unscored_neurons(method._groups)
        method._scores = pool.assign(**{method.score_names[0]: scores})
        found = method._choose(sum(parameter.numel() for parameter in model.parameters()))
        return {(module, number) for module, numbers in found.items() for number in numbers}, pool

    scores = draw.permutation(192) + 1.0
    both, pool = chosen(parameter_share=share, reversed_share=more)
    assert len(both) == len(chosen(parameter_share=share + more)[0])
    first = chosen(parameter_share=share)[0]
    assert first < both
    order = [(row.module, row.neuron) for row in pool.iloc[np.argsort(scores)].itertuples()]
    assert both - first == set(order[: len(both) - len(first)])


def test_masked_training_equals_separate_parameters():
    """Selected rows and columns as separate parameters, added to frozen weights, take the same ten steps."""
    torch.manual_seed(0)
    toy, compact = Toy(), Toy()
    compact.load_state_dict(toy.state_dict())
    x, up, down = torch.randn(16, 4), [0, 3], [1]
    masks = [Mask.of(toy, "up_proj", 1, up), Mask.of(toy, "down_proj", 0, down)]
    rows, columns = (nn.Parameter(torch.zeros(size)) for size in ((2, 4), (4, 1)))
    ours = torch.optim.AdamW([mask.weight for mask in masks], lr=0.1, weight_decay=0)
    theirs = torch.optim.AdamW([rows, columns], lr=0.1, weight_decay=0)
    method, step = NeFT(), step_of(ours)
    method._masks = dict(zip(("up_proj", "down_proj"), masks, strict=True))
    frozen = {name: tensor.clone() for name, tensor in compact.state_dict().items()}

    def scattered():
        return frozen | {
            "up_proj.weight": frozen["up_proj.weight"].index_add(0, torch.tensor(up), rows),
            "down_proj.weight": frozen["down_proj.weight"].index_add(1, torch.tensor(down), columns),
        }

    for _ in range(10):
        ours.zero_grad()
        (toy(x) - 1).square().mean().backward()
        method.after_backward(step)
        ours.step()
        theirs.zero_grad()
        (torch.func.functional_call(compact, scattered(), (x,)) - 1).square().mean().backward()
        theirs.step()
    for name, tensor in toy.state_dict().items():
        assert tensor.numpy() == near(scattered()[name], 1, terms=16, depth=10), name


def test_random_selection_depends_on_the_seed_and_needs_no_reference(bert, task, tmp_path):
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        _, _, run = train(bert, task, NeFT(num_neurons=20, select_by="random"), tmp_path / str(number), seed=seed)
        assert not run.parents
        table = run.table[run.table["quantity"] == "selected"]
        chosen.append(set(zip(table["module"].astype(str), table["index"], strict=True)))
    assert chosen[0] == chosen[1] != chosen[2]


def test_parameter_share_counts_parameters_not_neurons(bert, task, tmp_path):
    model, _, run = train(bert, task, NeFT(parameter_share=0.04, select_by="random"), tmp_path / "run")
    total = sum(parameter.numel() for parameter in model.parameters())
    counted = run.meta.parameters
    assert counted.trained - counted.head == 32 * round(0.04 * total / 32)
    assert counted.total == total


@pytest.mark.parametrize(("share", "line"), [
    (1e-6, r"parameter_share must be >= {one:.2g}, .*, got 1e-06"),
    (0.9, r"parameter_share must be <= {all:.2g}, .*192 .*, got 0.9 \({count} neurons\)"),
])  # fmt: skip
def test_parameter_share_below_one_neuron_or_above_all_raises_one_line(share, line):
    model = tiny("bert")
    one = 32 / sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(ValueError, match=line.format(one=one, count=round(0.9 / one), all=192 * one)):
        NeFT(parameter_share=share, select_by="random").attach(model)


def test_reference_with_another_base_or_few_trained_weights_raises(bert, task, tmp_path):
    _, _, lora = train(bert, task, LoRA(rank=2), tmp_path / "lora")
    with pytest.raises(ValueError, match=r"did not train .*full fine-tuning"):
        train(bert, task, NeFT(num_neurons=3, reference=lora), tmp_path / "a")
    _, _, few = train(bert, task, NeFT(num_neurons=5, select_by="random"), tmp_path / "few")
    with pytest.raises(ValueError, match=r" 5 neurons.*full fine-tuning$"):
        NeFT(num_neurons=3, reference=few)
    _, _, full = train(bert, task, Full(), tmp_path / "full")
    other = models.load(bert, task=task)
    with torch.no_grad():
        other.bert.pooler.dense.weight[0, 0] += 1
    with pytest.raises(ValueError, match=rf"reference must .*, got run {full.id}"):
        ls.train(other, task, NeFT(num_neurons=3, reference=full), out=tmp_path / "b", **FAST)


def test_external_adapter_as_reference_raises(bert, task, tmp_path, capsys):
    _, _, lora = train(bert, task, LoRA(rank=2), tmp_path / "lora")
    folder = ls.export.to_peft(lora, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"external adapter.*initial weights"):
        NeFT(num_neurons=3, reference=folder).prepare()
    for given in (folder, tmp_path / "nowhere"):
        assert main.main(["train", "neft", "--steps", "3", "--reference", str(given)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


WRONG = [
    ({"reversed_share": -1}, "reversed_share must be .*, got -1"),
    ({"reversed_share": 0.1, "select_by": "random"}, "reversed_share must be 0 .*'random', got 0.1"),
    ({"reversed_share": 0.1, "select_by": "reversed"}, "reversed_share must be 0 .*'reversed', got 0.1"),
    ({"targets": ("q",)}, "targets must be .*'ffn_out', got 'q'"),
    ({"targets": "query"}, "targets must be .*'ffn_out', got 'query'"),
    ({"num_neurons": 0}, "num_neurons must be an integer >= 1, got 0"),
    ({"tune_steps": 0}, "tune_steps must be an integer >= 1, got 0"),
    ({"clip_before": 0}, "clip_before must be > 0 or None, got 0"),
    ({"clip_before": -1.0}, "clip_before must be .*, got -1.0"),
    ({"neurons": {"up": [1, 0.5]}}, r"neurons of up.*got 0\.5"),
    ({"parameter_share": 0}, "parameter_share must be .*, got 0"),
    ({"parameter_share": 9}, "parameter_share must be .*, got 9"),
]


@pytest.mark.parametrize(("given", "line"), WRONG)
def test_invalid_settings_raise_one_line(given, line):
    with pytest.raises(ValueError, match=line) as caught:
        NeFT(**given)
    assert "\n" not in str(caught.value)


def test_one_target_is_a_string_as_in_other_methods():
    assert NeFT(targets="ffn_in").targets == NeFT(targets=("ffn_in",)).targets == ("ffn_in",)


WRONG_NEURONS = [
    ({"bert.pooler.dense": [0]}, "neurons.*'bert.pooler.dense'"),
    ({UP.format(0): [48]}, f"neurons of {UP.format(0)}.*0 to 47.*got 48"),
    ({UP.format(0): [1, 1]}, f"neurons of {UP.format(0)}.*duplicate 1"),
    ({UP.format(0): []}, "neurons.*got none"),
]


@pytest.mark.parametrize(("given", "line"), WRONG_NEURONS)
def test_invalid_neurons_raise_one_line(given, line):
    with pytest.raises(ValueError, match=line):
        NeFT(neurons=given).attach(tiny("bert"))


@pytest.mark.parametrize(
    "numbers",
    [np.array([3, 0]), [np.int32(3), np.int64(0)], torch.tensor([3, 0]), (3, 0)],
    ids=["array", "scalars", "tensor", "tuple"],
)
def test_neurons_accept_any_array(numbers):
    method, plain = NeFT(neurons={UP.format(0): numbers}), NeFT(neurons={UP.format(0): [3, 0]})
    assert json.dumps(config(method)) == json.dumps(config(plain))
    method.attach(tiny("bert"))
    assert method.neurons_ == {UP.format(0): [0, 3]}


def test_command_line_lists_options_and_exits_with_2_for_invalid_ones(capsys):
    assert main.main(["train", "neft", "--steps", "3", "--select-by", "lowest"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main.main(["train", "neft", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--reference" in printed
    assert "--clip-before" in printed
    assert "--neurons" not in printed
