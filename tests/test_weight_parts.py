"""Tests of adapters on parts of fused weights, against models whose matrices are split by hand."""

from __future__ import annotations

import copy
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import peft
import pytest
import torch
import transformers
from conftest import BAD, FILLER, GOOD
from examples import EXAMPLES
from tiny import inputs, tiny
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.adapters.delta import attach, attached_deltas, deltas, detach, effective_weight, fold
from lorascope.adapters.weight_parts import add_parts, find_host
from lorascope.analysis import memory_estimate
from lorascope.cli.main import main
from lorascope.inputs import models, tasks
from lorascope.methods import Adapprox, LoRA
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import AdapterMethod
from lorascope.runs.layout import identify
from lorascope.schema import module_table

# Family -> name of the fused matrix, and the rows of q, k and v in it, written by hand. Width 32 has 4 heads of 8.
# Phi-3 has 2 heads of keys and values; GPT-NeoX stores q, k and v of one head next to each other.
FUSED: dict[str, tuple[str, dict[str, list[int]]]] = {
    "gpt2": ("attn.c_attn", {"q": [*range(32)], "k": [*range(32, 64)], "v": [*range(64, 96)]}),
    "phi3": ("self_attn.qkv_proj", {"q": [*range(32)], "k": [*range(32, 48)], "v": [*range(48, 64)]}),
    "gpt-neox": (
        "attention.query_key_value",
        {
            "q": [24 * head + i for head in range(4) for i in range(8)],
            "k": [24 * head + i for head in range(4) for i in range(8, 16)],
            "v": [24 * head + i for head in range(4) for i in range(16, 24)],
        },
    ),
}
BLOCKS = {"gpt2": "transformer.h", "phi3": "model.layers", "gpt-neox": "gpt_neox.layers"}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


class Separate(nn.Module):
    """Three linear layers, and their outputs in the order of a fused matrix."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rows: dict[str, list[int]]) -> None:
        super().__init__()
        order = [*rows["q"], *rows["k"], *rows["v"]]
        self.order = torch.tensor(order).argsort()
        for role, indices in rows.items():
            layer = nn.Linear(weight.shape[1], len(indices), bias is not None, dtype=weight.dtype)
            with torch.no_grad():
                layer.weight.copy_(weight[indices])
                if bias is not None:
                    layer.bias.copy_(bias[indices])
            setattr(self, role, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)[..., self.order]


def names(family: str) -> list[str]:
    """Return the names of the fused matrices."""
    return [f"{BLOCKS[family]}.{layer}.{FUSED[family][0]}" for layer in range(2)]


def matrix(host: Any) -> torch.Tensor:
    """Return the weight of a fused matrix as (out, in)."""
    return host.weight.T if type(host).__name__.endswith("Conv1D") else host.weight


def split_by_hand(family: str) -> nn.Module:
    """Return the tiny model in float64 with three linear layers instead of every fused matrix."""
    model = tiny(family).double()
    replace_by_separate(model, family)
    return model


def twin_name(name: str) -> str:
    """Return the name in the split model of a part: ``c_attn[q]`` is ``c_attn.q``."""
    return name.replace("[", ".").replace("]", "")


def pair(family: str, roles: str = "qv") -> tuple[nn.Module, nn.Module]:
    """Return a model with LoRA on parts, and a split model with the same factors on its linear layers."""
    whole, split = tiny(family).double(), split_by_hand(family)
    generator = torch.Generator().manual_seed(0)
    ours, twins = {}, {}
    for name in names(family):
        for role in roles:
            part = f"{name}[{role}]"
            delta = LoRADelta(find_host(whole, part), 3, 0.5)
            with torch.no_grad():
                delta.A.copy_(torch.randn(delta.A.shape, generator=generator) / 4)
                delta.B.copy_(torch.randn(delta.B.shape, generator=generator) / 4)
            ours[part], twins[twin_name(part)] = delta, copy.deepcopy(delta)
    attach(whole, ours)
    attach(split, twins)
    for model in (whole, split):
        model.requires_grad_(False)
        for delta in attached_deltas(model).values():
            delta.requires_grad_(True)
    return whole, split


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    batch = inputs(model, seed=seed)
    return model(**batch, labels=batch["input_ids"]).loss


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {twin_name(name): value for name, value in model.named_parameters() if ".delta." in name}


@pytest.mark.parametrize("family", FUSED)
def test_parts_equal_separate_layers_in_outputs_gradients_and_steps(family: str) -> None:
    whole, split = pair(family)
    base = tiny(family).double()
    assert not torch.allclose(whole(**inputs(whole)).logits, base(**inputs(base)).logits, rtol=1e-4)
    torch.testing.assert_close(whole(**inputs(whole)).logits, split(**inputs(split)).logits, **TOLERANCE)
    optimizers = [torch.optim.AdamW(factors(model).values(), lr=1e-2) for model in (whole, split)]
    for step in range(5):
        losses = []
        for model, optimizer in zip((whole, split), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(model, step))
            losses[-1].backward()
        ours, twins = factors(whole), factors(split)
        assert ours.keys() == twins.keys()
        assert len(ours) == 8
        for name, factor in ours.items():
            assert factor.grad.abs().max() > 0
            torch.testing.assert_close(factor.grad, twins[name].grad, **TOLERANCE)
        for optimizer in optimizers:
            optimizer.step()
        assert math.isclose(*(loss.item() for loss in losses), rel_tol=1e-10)
    for name, factor in factors(whole).items():
        torch.testing.assert_close(factor, factors(split)[name], **TOLERANCE)


@pytest.mark.parametrize("family", FUSED)
def test_merged_parts_leave_the_other_rows_unchanged_bit_for_bit(family: str) -> None:
    whole, split = pair(family)
    before = {name: matrix(whole.get_submodule(name)).clone() for name in names(family)}
    outputs = whole(**inputs(whole)).logits
    fold(whole)
    fold(split)
    assert not attached_deltas(whole)
    assert [name for name, _ in whole.named_modules() if "[" in name] == []
    rows = FUSED[family][1]
    for name in names(family):
        merged = matrix(whole.get_submodule(name))
        assert torch.equal(merged[rows["k"]], before[name][rows["k"]])
        for role in "qv":
            assert not torch.equal(merged[rows[role]], before[name][rows[role]])
            twin = split.get_submodule(f"{name}.{role}").weight
            torch.testing.assert_close(merged[rows[role]], twin, **TOLERANCE)
    torch.testing.assert_close(whole(**inputs(whole)).logits, outputs, **TOLERANCE)


@pytest.mark.parametrize("family", FUSED)
def test_detached_model_is_the_base_and_attaches_again(family: str) -> None:
    whole, _ = pair(family)
    base, adapted = tiny(family).double(), whole(**inputs(whole)).logits
    classes = {name: type(module) for name, module in base.named_modules()}
    removed = detach(whole)
    assert {name: type(module) for name, module in whole.named_modules()} == classes
    assert torch.equal(whole(**inputs(whole)).logits, base(**inputs(base)).logits)
    attach(whole, removed)
    assert torch.equal(whole(**inputs(whole)).logits, adapted)
    twin = copy.deepcopy(whole)
    with torch.no_grad():
        for delta in attached_deltas(whole).values():
            delta.B.zero_()
    assert torch.equal(twin(**inputs(twin)).logits, adapted)


@pytest.mark.parametrize("family", FUSED)
def test_updates_and_weights_of_parts_and_of_the_whole(family: str) -> None:
    whole, _ = pair(family)
    fused, rows = names(family)[0], FUSED[family][1]
    updates = dict(deltas(whole))
    assert list(updates) == [f"{name}[{role}]" for name in names(family) for role in "qv"]
    base = matrix(tiny(family).double().get_submodule(fused))
    for role in "qv":
        expected = base[rows[role]] + torch.from_numpy(updates[f"{fused}[{role}]"].dense())
        torch.testing.assert_close(effective_weight(whole, f"{fused}[{role}]"), expected, **TOLERANCE)
        torch.testing.assert_close(effective_weight(whole, fused)[rows[role]], expected, **TOLERANCE)
    assert torch.equal(effective_weight(whole, fused)[rows["k"]], base[rows["k"]])


@pytest.mark.parametrize("family", FUSED)
def test_order_of_the_rows_equals_the_order_in_the_attention(family: str) -> None:
    """A change of q at the first token moves no later output of the attention, one of k and v does.

    Without values, the attention has only the bias of its output.
    """
    rows = FUSED[family][1]
    name = names(family)[0]

    def attention_output(role: str, change: float | None) -> torch.Tensor:
        model, outputs = tiny(family), []
        attention = model.get_submodule(name.rpartition(".")[0])

        def edit(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            if change is None:
                output[..., rows[role]] = 0
            else:
                output[:, 0, rows[role]] += change * torch.arange(len(rows[role])).cos()
            return output

        model.get_submodule(name).register_forward_hook(edit)
        attention.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with torch.no_grad():
            model(**inputs(model))
        return outputs[0]

    unchanged = attention_output("q", 0.0)
    assert torch.equal(attention_output("q", 1.0)[:, 1:], unchanged[:, 1:])
    for role in "kv":
        assert not torch.allclose(attention_output(role, 1.0)[:, 1:], unchanged[:, 1:], atol=1e-4)
    no_values = attention_output("v", None)
    torch.testing.assert_close(no_values, no_values[:1, :1].expand_as(no_values))


@pytest.mark.parametrize("family", FUSED)
def test_targets_select_parts_in_the_order_of_the_model(family: str) -> None:
    model = tiny(family)
    method = LoRA(rank=2, targets=("v", "q"))
    method.attach(model)
    expected = [f"{name}[{role}]" for name in names(family) for role in "qv"]
    assert list(attached_deltas(model)) == expected
    table = module_table.describe(model).set_index("module")
    assert table.loc[expected, "role"].tolist() == ["q", "v"] * 2
    rows = FUSED[family][1]
    assert table.loc[expected, "out_features"].tolist() == [len(rows["q"]), len(rows["v"])] * 2
    assert table.loc[expected, "in_features"].tolist() == [32] * 4
    assert table.loc[expected, "layer"].tolist() == [0, 0, 1, 1]
    plain = module_table.describe(tiny(family))
    assert module_table.describe(model)["module"].tolist() != plain["module"].tolist()
    detach(model)
    assert module_table.describe(model).equals(plain)


@pytest.mark.parametrize("targets", ["qkv", ("qkv",), "all-linear"])
def test_whole_matrices_are_still_targets(targets: Any) -> None:
    model = tiny("gpt2")
    LoRA(rank=2, targets=targets).attach(model)
    assert {name for name in attached_deltas(model) if "c_attn" in name} == set(names("gpt2"))


def test_names_of_parts_are_targets() -> None:
    model = tiny("phi3")
    one = "model.layers.1.self_attn.qkv_proj[k]"
    LoRA(rank=2, targets=(one,)).attach(model)
    assert list(attached_deltas(model)) == [one]
    model = tiny("phi3")
    LoRA(rank={one: 3, "model.layers.0.self_attn.o_proj": 1}).attach(model)
    assert {name: delta.rank for name, delta in attached_deltas(model).items()} == {
        "model.layers.0.self_attn.o_proj": 1,
        one: 3,
    }


@pytest.mark.parametrize(
    ("family", "config", "targets", "message"),
    [
        (
            "gpt2",
            {"n_head": 2, "head_dim": 20},
            ("q",),
            r"cannot split '.*c_attn' into q, k, v: its 96 rows do not fit",
        ),
        ("gpt2", {}, ("q", "qkv"), r"cannot adapt both '.*c_attn' and its part '.*c_attn\[q\]'"),
        ("gpt2", {}, ("transformer.h.0.attn.c_attn[o]",), r"matches no module"),
        ("gpt2", {"model_type": "unheard"}, ("q",), r"cannot split '.*c_attn' .*got 'unheard'.* \"qkv\""),
    ],
)
def test_parts_that_cannot_be_adapted_are_one_line(
    family: str, config: dict[str, Any], targets: Any, message: str
) -> None:
    model = tiny(family)
    for name, value in config.items():
        if name == "model_type":
            type(model.config).model_type, before = value, type(model.config).model_type
        else:
            setattr(model.config, name, value)
    try:
        with pytest.raises(ValueError, match=message) as caught:
            LoRA(targets=targets).attach(model)
    finally:
        if "model_type" in config:
            type(model.config).model_type = before
    assert "\n" not in str(caught.value)
    assert not attached_deltas(model)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives a task and a new model of a family, loaded from a folder with a tokenizer."""
    folders: dict[str, str] = {}

    def load(family: str) -> tuple[Any, nn.Module]:
        if family not in folders:
            folders[family] = families.folder(tmp_path_factory.mktemp("parts") / family, family)
        task = families.task_of(family)
        return task, models.load(folders[family], task=task)

    return load


ADAPTERS = sorted(name for name, method in EXAMPLES.items() if isinstance(method, AdapterMethod))
SHORT = {"steps": 5, "batch_size": 6, "eval_size": 12, "test_size": 8, "eval_every": 0, "progress": False}


def replace_by_separate(model: nn.Module, family: str) -> None:
    for name in names(family):
        host = model.get_submodule(name)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Separate(matrix(host), host.bias, FUSED[family][1]))


def train_pair(
    loaded: Any, family: str, method: Any, out: Path, **settings: Any
) -> tuple[ls.Run, ls.Run, nn.Module, nn.Module]:
    """Train a method on q and v of a fused model and of one with separate layers; return runs and models."""
    task, whole = loaded(family)
    _, split = loaded(family)
    replace_by_separate(split, family)
    settings = SHORT | {"device": "cpu"} | settings
    run = ls.train(whole, task, replace(method), out=out / "whole", **settings)
    twin = ls.train(split, task, replace(method), out=out / "split", **settings)
    return run, twin, whole, split


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_every_adapter_method_on_parts_equals_separate_layers(
    method: str, family: str, loaded: Any, tmp_path: Path
) -> None:
    fields = {"prune": 2} if method == "alora" else {}  # fewer modules than in its example
    targets = replace(EXAMPLES[method], targets=("q", "v"), **fields)
    settings = {"observe": [observe.norms(every=1), observe.gradients(every=1), observe.factors(every=5)]}
    run, twin, *_ = train_pair(loaded, family, targets, tmp_path, **settings)
    expected = [f"{name}[{role}]" for name in names(family) for role in "qv"]
    assert list(run.updates()) == expected
    assert run.id != twin.id
    assert max(update.norm() for update in run.updates().values()) > 1e-3
    for name, update in run.updates().items():
        reference = twin.updates()[twin_name(name)].dense()
        np.testing.assert_allclose(update.dense(), reference, rtol=1e-3, atol=2e-5)
    quantities = ["update_norm", "weight_norm", "stable_rank", "effective_rank", "gradient_norm", "loss", "rank"]
    tables = []
    for opened in (run, twin):
        table = opened.table[opened.table["quantity"].isin(quantities)]
        if method == "dora":  # at step 0, rounding errors have ranks
            table = table[(table["step"] > 0) | ~table["quantity"].isin(["stable_rank", "effective_rank"])]
        table = table.assign(module=[twin_name(str(module)) for module in table["module"]])
        columns = ["quantity", "step", "module", "role", "layer"]
        tables.append(table.astype(dict.fromkeys(columns, "str")).set_index(columns)["value"].sort_index())
    # Blocks have the same norms, because the parts of a weight and the separate layers have the same entries.
    assert tables[0].index.tolist() == tables[1].index.tolist()
    np.testing.assert_allclose(tables[0], tables[1], rtol=2e-3, atol=1e-5)


def test_run_on_parts_loads_continues_and_restores_bit_for_bit(loaded: Any, tmp_path: Path) -> None:
    task, model = loaded("gpt2")
    method = LoRA(rank=2, lr=1e-2)
    settings = SHORT | {"device": "cpu", "keep_checkpoints": (3,)}
    run = ls.train(model, task, method, out=tmp_path / "run", **settings)
    opened = ls.load(tmp_path / "run")
    rows = {"q": (1, 0, 32), "v": (1, 64, 96)}
    expected = {f"{name}[{role}]": indices for name in names("gpt2") for role, indices in rows.items()}
    assert opened.meta.weight_parts == expected
    assert set(opened.meta.hosts.values()) == {"Conv1D"}
    _, restored = loaded("gpt2")
    opened.restore(restored)
    batch = inputs(model)
    assert torch.equal(restored(**batch).logits, model.eval()(**batch).logits)
    _, fresh = loaded("gpt2")
    assert ls.train(fresh, task, LoRA(rank=2, lr=1e-2), out=tmp_path / "run", **settings).id == run.id
    assert torch.equal(fresh.eval()(**batch).logits, model(**batch).logits)
    _, base = loaded("gpt2")
    forked = ls.fork(opened, step=3, model=base, task=task, progress=False, device="cpu")
    for name, factors_of_part in run.factors().items():
        for key, array in factors_of_part.items():
            np.testing.assert_array_equal(forked.factors()[name][key], array)


def test_runs_on_whole_weights_have_no_parts_and_runs_of_earlier_versions_restore_and_fork(
    loaded: Any, tmp_path: Path
) -> None:
    """A run of an earlier version adapted the whole weight with the targets q and v."""
    settings = SHORT | {"device": "cpu", "keep_checkpoints": (3,)}
    task, model = loaded("gpt2")
    method = LoRA(rank=2, lr=1e-2)
    method.splits_fused = False
    earlier = ls.train(model, task, method, out=tmp_path / "earlier", **settings)
    stored = json.loads((tmp_path / "earlier" / "run.json").read_text())
    assert "weight_parts" not in stored
    # The id has what it had before there were parts.
    content = {key: stored[key] for key in ("method", "phase", "w0_hash", "data_hash", "settings", "seed", "schema")}
    assert identify(content) == earlier.id
    _, restored = loaded("gpt2")
    ls.load(tmp_path / "earlier").restore(restored)
    assert set(attached_deltas(restored)) == set(names("gpt2"))
    assert torch.equal(restored(**inputs(model)).logits, model.eval()(**inputs(model)).logits)
    _, base = loaded("gpt2")
    forked = ls.fork(ls.load(tmp_path / "earlier"), step=3, model=base, task=task, progress=False, device="cpu")
    for name, arrays in earlier.factors().items():
        np.testing.assert_array_equal(forked.factors()[name]["B"], arrays["B"])
    _, fresh = loaded("gpt2")
    parts = ls.train(fresh, task, LoRA(rank=2, lr=1e-2), out=tmp_path / "parts", **settings)
    assert parts.id != earlier.id


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module:UserWarning")
@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("method", ["lora", "pissa", "adalora", "alora"])
def test_peft_loads_the_export_of_parts_as_a_lora_on_the_fused_weight(
    method: str, family: str, loaded: Any, tmp_path: Path
) -> None:
    task, model = loaded(family)
    fields = {"prune": 2} if method == "alora" else {}
    recipe = replace(EXAMPLES[method], targets=("q", "v", "o"), dropout=0.0, **fields)
    run = ls.train(model, task, recipe, out=tmp_path / "run", device="cpu", **SHORT)
    ls.export.to_peft(run, tmp_path / "adapter")
    _, base = loaded(family)
    before = base(**inputs(base)).logits
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    logits = model.eval()(**inputs(model)).logits
    torch.testing.assert_close(wrapped(**inputs(model)).logits, logits, rtol=1e-4, atol=1e-5)
    assert (logits - before).abs().max() > 1e-3
    opened = ls.load(tmp_path / "adapter")
    rows = FUSED[family][1]
    fused = [name for name in opened.updates() if name in names(family)]
    assert fused
    for name in fused:
        update = opened.updates()[name].dense()
        assert not update[rows["k"]].any()
        for role in "qv":
            np.testing.assert_allclose(update[rows[role]], run.updates()[f"{name}[{role}]"].dense(), atol=1e-7)


@pytest.mark.parametrize("method", ["dora", "vera", "fourierft"])
def test_updates_that_peft_cannot_restrict_to_rows_are_refused_in_one_line(
    method: str, loaded: Any, tmp_path: Path
) -> None:
    task, model = loaded("gpt2")
    recipe = replace(EXAMPLES[method], targets=("q", "v"))
    run = ls.train(model, task, recipe, out=tmp_path / "run", device="cpu", **SHORT)
    with pytest.raises(ValueError, match=r"cannot export .* PEFT adapts all rows of '.*c_attn'.*\"qkv\"") as caught:
        ls.export.to_peft(run, tmp_path / "adapter")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "adapter").exists()


def test_ranks_of_parts_as_a_configuration_of_peft_raise(loaded: Any, tmp_path: Path) -> None:
    task, model = loaded("gpt2")
    run = ls.train(model, task, LoRA(rank=2), out=tmp_path / "run", device="cpu", **SHORT)
    with pytest.raises(ValueError, match=r"PEFT adapts no part such as .*c_attn\[q\]; export it"):
        run.lora_config()
    _, fresh = loaded("gpt2")
    second = ls.train(fresh, task, LoRA(rank=run.ranks()), out=tmp_path / "ranks", device="cpu", **SHORT)
    assert second.ranks() == run.ranks()


def test_instruments_measure_parts_as_they_measure_separate_layers(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = LoRA(rank=2, targets=("q", "v", "o"), lr=3e-2)
    draw = random.Random(0)
    rows = []
    for number in range(1600):
        words = [draw.choice([*FILLER, *GOOD, *BAD]) for _ in range(4)]
        label = "positive" if sum(word in GOOD for word in words) > sum(word in BAD for word in words) else "negative"
        rows.append({"text": " ".join([*words, *f"{number:04d}"]), "label": label, "group": "a"})
    task = tasks.from_frame(pd.DataFrame(rows), "toy")
    run, twin, *_ = train_pair(lambda family: (task, loaded(family)[1]), "phi3", method, tmp_path, steps=12)
    measured = []
    for opened in (run, twin):

        def reload(other: ls.Run, *_: Any) -> nn.Module:
            _, base = loaded("phi3")
            if other.id == twin.id:
                replace_by_separate(base, "phi3")
            return base

        monkeypatch.setattr("lorascope.experiments.trained_model.reload_model", reload)
        dial = ls.dial(opened, "base", task, by="component", rows=48, keep_rows=48, exact=2, progress=False)
        price = ls.price(opened, "base", task, ranks=(1,), rows=128, progress=False)
        importance = ls.component_importance.component_importance(opened, "base", task, rows=16, exact_rows=8)
        measured.append((dial.table, price.table, price.modules, importance))
    for ours, reference in zip(measured[0][:3], measured[1][:3], strict=True):
        assert len(ours) == len(reference) > 0
        for column in ours:
            if ours[column].dtype.kind == "f":
                np.testing.assert_allclose(ours[column], reference[column], rtol=5e-3, atol=2e-5, err_msg=column)
            elif column != "run":
                assert [twin_name(str(value)) for value in ours[column]] == list(map(str, reference[column]))
    ours, reference = measured[0][3], measured[1][3]
    assert [twin_name(name) for name in ours] == list(reference)
    for name, values in ours.items():
        np.testing.assert_allclose(values, reference[twin_name(name)], rtol=5e-3, atol=1e-6)


def test_command_line_sweeps_and_trainer_adapt_parts(loaded: Any, tmp_path: Path) -> None:
    task, model = loaded("gpt2")
    data = tmp_path / "task.csv"
    task.table[["text", "label"]].to_csv(data, index=False)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    models.tokenizer(model).save_pretrained(folder)
    common = ["--model", str(folder), "--task", str(data), "--steps", "2", "--no-progress", "--device", "cpu"]
    assert main(["train", "lora", *common, "--targets", "q", "v", "-o", str(tmp_path / "run")]) == 0
    expected = [f"{name}[{role}]" for name in names("gpt2") for role in "qv"]
    run = ls.load(tmp_path / "run")
    assert list(run.updates()) == expected
    assert run.summary()["role"].tolist() == ["q", "v"] * 2
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'root = "{tmp_path / "runs"}"\nmodel = "{folder}"\ntask = "{data}"\nseeds = 1\n'
        '[[method]]\nname = "lora"\ntargets = [["q", "v"], ["qkv"]]\n'
        '[settings]\nsteps = 2\ndevice = "cpu"\n'
    )
    assert main(["sweep", str(sweep), "--no-progress"]) == 0
    runs = sorted((ls.load(path.parent) for path in (tmp_path / "runs").rglob("run.json")), key=lambda run: run.label)
    assert sorted(len(run.updates()) for run in runs) == [2, 4]
    for words in (["inspect"], ["doctor"], ["plot", "spectrum"]):
        extra = ["-o", str(tmp_path / "figure.pdf")] if words[0] == "plot" else []
        assert main([*words, str(tmp_path / "run"), *extra]) in (0, 1)
    _, fresh = loaded("gpt2")
    ls.trainer_kwargs(LoRA(rank=2), fresh)
    assert list(attached_deltas(fresh)) == expected


def test_adapprox_rejects_a_part_of_a_fused_weight_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"dense must not be a part .* Use \"qkv\"") as caught:
        Adapprox(dense=("q",)).optimizer(tiny("phi3"), 1e-3, 1e-3, 0.0)
    assert "\n" not in str(caught.value)
    Adapprox(dense=("qkv",)).optimizer(tiny("phi3"), 1e-3, 1e-3, 0.0)


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("qkv", "o"), "all-linear"])
def test_memory_estimate_counts_the_factors_of_parts(family: str, targets: Any) -> None:
    model = tiny(family)
    shapes = memory_estimate.shapes_of(model)
    LoRA(rank=3, targets=targets).attach(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    estimate = memory_estimate.lora(shapes, 3, targets)
    assert estimate.gradients == 4 * sum(parameter.numel() for parameter in trained)
    assert estimate.optimizer == 2 * estimate.gradients + 4 * len(trained)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "persimmon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_order_of_the_rows_of_further_architectures(architecture: str) -> None:
    """Without queries or keys, all earlier tokens get equal weight; a change of q at the first token moves no other."""
    config = transformers.AutoConfig.for_model(architecture, vocab_size=64, **ARCHITECTURES[architecture])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    table = module_table.describe(model)
    fused = table["module"][table["role"] == "qkv"].tolist()
    output = table["module"][table["role"] == "o"].tolist()[0]
    assert len(fused) == 2
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    rows = {}
    for role in "qkv":
        host = find_host(model, f"{fused[0]}[{role}]")
        rows[role] = host.take(torch.arange(96))

    def attended(change: dict[str, float | None]) -> torch.Tensor:
        """Return the input of the output projection, after a change of q, k or v: its first token, or all zero."""
        seen = []

        def edit(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for role, size in change.items():
                if size is None:
                    out[..., rows[role]] = 0
                else:
                    out[:, 0, rows[role]] += size * torch.arange(32).cos()
            return out

        handles = [
            model.get_submodule(fused[0]).register_forward_hook(edit),
            model.get_submodule(output).register_forward_pre_hook(lambda _, given: seen.append(given[0])),
        ]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return seen[0]

    assert not attended({"v": None}).any()
    plain = attended({})
    assert torch.equal(attended({"q": 3.0})[:, 1:], plain[:, 1:])
    assert not torch.allclose(attended({"k": 3.0})[:, 1:], plain[:, 1:], atol=1e-5)
    assert not torch.allclose(attended({"v": 3.0})[:, 1:], plain[:, 1:], atol=1e-5)
    LoRA(rank=2, targets=("q", "v")).attach(model)
    before = model(ids).logits
    for delta in attached_deltas(model).values():
        nn.init.normal_(delta.B)
    assert not torch.allclose(model(ids).logits, before, atol=1e-4)
    adapted = model(ids).logits
    fold(model)
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-3, atol=1e-4)


def test_sensitivity_of_parts_is_the_rows_of_the_whole_weight(loaded: Any, tmp_path: Path) -> None:
    observers = [
        observe.neurons(every=5, rows=4, targets=("q", "v")),
        observe.neurons(every=5, rows=4, targets="all-linear"),
    ]
    values = {}
    for number, observer in enumerate(observers):
        task, model = loaded("phi3")
        method = LoRA(rank=2, targets=("q", "v"), lr=1e-2)
        run = ls.train(model, task, method, out=tmp_path / str(number), observe=[observer], device="cpu", **SHORT)
        table = run.table[run.table["quantity"] == "sensitivity_out"]
        for (module, step), rows in table.groupby(["module", "step"], observed=True):
            values[str(module), int(step)] = rows.sort_values("index")["value"].to_numpy()
    for name in names("phi3"):
        for step in (0, 5):
            for role, rows in FUSED["phi3"][1].items():
                if role != "k":
                    expected = values[name, step][rows]
                    np.testing.assert_allclose(values[f"{name}[{role}]", step], expected, rtol=1e-3, atol=1e-7)


def test_match_of_roles_in_a_table_with_parts() -> None:
    model = tiny("gpt2")
    plain = module_table.describe(model)
    table = add_parts(plain, model)
    assert table[~table["module"].str.endswith("]")].reset_index(drop=True).equals(plain)
    assert module_table.match(plain, "q") == names("gpt2")
    assert module_table.match(table, "k") == [f"{name}[k]" for name in names("gpt2")]
    assert module_table.match(table, ("qkv",)) == names("gpt2")
    assert module_table.match(table, r".*attn\.c_attn.*") == names("gpt2")
    assert module_table.match(table, "all-linear") == module_table.match(plain, "all-linear")
