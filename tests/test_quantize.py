"""The setting quantize: which bases it rejects, and outputs, gradients and training on 4-bit and 8-bit weights."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_tokenizer
from tiny import inputs, tiny
from tolerance import rounding
from torch import nn

import lorascope as ls
from lorascope.adapters.delta import Delta, adapters, attached_deltas, detach, fold
from lorascope.adapters.host_weights import host_weight, packed_bits
from lorascope.adapters.quantization import quantize_blocks
from lorascope.experiments.grid import read_settings
from lorascope.experiments.trained_model import open_trained
from lorascope.methods import (
    AdaLoRA,
    Adapprox,
    ALoRA,
    AutoLoRA,
    DoRA,
    FourierFT,
    Full,
    HydraLoRA,
    LoRA,
    NeFT,
    PiSSA,
    VeRA,
)
from lorascope.methods.method import Method

OPTIONS: dict[str, Any] = {"steps": 4, "batch_size": 4, "progress": False, "test_size": 20, "eval_size": 20}
ADAPTERS = {
    "LoRA": LoRA(rank=2, targets="all-linear"),
    "AdaLoRA": AdaLoRA(init_rank=2, target_rank=1, initial_steps=1, final_steps=1),
    "ALoRA": ALoRA(),
    "AutoLoRA": AutoLoRA(rank=2),
    "FourierFT": FourierFT(coefficients=8),
    "FourierFT, matrix": FourierFT(coefficients=200),
    "HydraLoRA": HydraLoRA(),
    "VeRA": VeRA(rank=4),
}
KINDS = {"nf4": 4, "int8": 8}
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*torch.compile")


def quantized(kind: str, family: str = "llama") -> nn.Module:
    # Blocks of 64 weights, which are shorter than a row, and an int8 product that needs no padding.
    model = tiny(family, hidden_size=64, intermediate_size=128).eval()
    quantize_blocks(model, kind, "cpu")
    return model


def packed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if packed_bits(module)}


# -- rejected -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lisa", "neft", "adapprox"])
def test_methods_that_train_weights_are_rejected(method: str, task: ls.Task) -> None:
    name = {"full": "Full", "lisa": "LISA", "neft": "NeFT", "adapprox": "Adapprox"}[method]
    with pytest.raises(ValueError, match=f"^cannot quantize the base of {name}: it trains the weights$"):
        ls.train("no such model", task, method, steps=3, quantize="nf4")


@pytest.mark.parametrize("method", [PiSSA(), DoRA()])
def test_methods_that_decompose_weights_are_rejected(method: Method, task: ls.Task) -> None:
    name = type(method).__name__
    with pytest.raises(ValueError, match=f"^cannot quantize the base of {name}: it decomposes W_0$"):
        ls.train("no such model", task, method, steps=3, quantize="nf4")


def test_an_unknown_quantization_is_one_line(task: ls.Task) -> None:
    with pytest.raises(ValueError, match=r"^quantize must be one of 'nf4', 'int8', got 'fp4'$"):
        ls.train("no such model", task, "lora", steps=3, quantize="fp4")


def test_a_missing_package_is_one_line(task: ls.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_others(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    install = r"pip install 'lorascope\[quantized\]'"
    with pytest.raises(ValueError, match=rf"^quantize 'nf4' requires bitsandbytes: {install}$"):
        ls.train("no such model", task, "lora", steps=3, quantize="nf4")


def test_a_model_without_linear_layers_in_its_blocks_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"^cannot quantize GPT2LMHeadModel: its blocks have no nn.Linear$"):
        quantize_blocks(tiny("gpt2"), "nf4", "cpu")


def test_a_sweep_rejects_them_before_any_run_starts() -> None:
    table = {"steps": 3, "quantize": "nf4"}
    with pytest.raises(ValueError, match=r"^cannot quantize the base of Full: it trains the weights$"):
        read_settings(table, [Full()])
    with pytest.raises(ValueError, match=r"^dtype must be one of 'float32', 'bfloat16', 'float16', got 'fp8'$"):
        read_settings({"steps": 3, "dtype": "fp8"}, [Full()])


# -- layers -------------------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_of_blocks_are_quantized(kind: str) -> None:
    plain, model = tiny("llama", hidden_size=64, intermediate_size=128), quantized(kind)
    layers = packed(model)
    expected = {name for name, module in plain.named_modules() if type(module) is nn.Linear and ".layers." in name}
    assert set(layers) == expected
    for name, weight in model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(weight, plain.get_parameter(name)), name
    for name, layer in layers.items():
        W, W0 = host_weight(layer), plain.get_submodule(name).weight
        assert W.shape == W0.shape
        # Half of the widest gap of NF4 is 0.152 of the largest weight of a block, and 1 / 254 of a row of int8.
        bound = W0.abs().max() * (0.16 if kind == "nf4" else 0.005)
        assert 0 < (W - W0).abs().max() <= bound
        assert packed_bits(layer) == KINDS[kind]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_outputs_equal_the_base_plus_the_update(name: str, kind: str) -> None:
    model = quantized(kind)
    before = {key: layer.weight.clone() for key, layer in packed(model).items()}
    copy.deepcopy(ADAPTERS[name]).attach(model)
    deltas = attached_deltas(model)
    assert deltas.keys() <= before.keys()
    for module, delta in deltas.items():
        for seed, (factor_name, factor) in enumerate(delta.named_parameters()):
            assert factor.dtype == torch.float32
            if "lambda" not in factor_name:
                nn.init.normal_(factor, std=0.2, generator=torch.Generator().manual_seed(seed))
        host: Any = model.get_submodule(module)
        x = torch.randn(5, 64 if "down" not in module else 128, requires_grad=True)
        y = host(x)
        W, W0 = host_weight(host), before[module]
        twin = x.detach().clone().requires_grad_()
        expected = F.linear(twin, W) + delta(twin)
        # LLM.int8() rounds its input to 127 steps of the largest entry; 4-bit layers compute in float32.
        tolerance = rounding(torch.float32, terms=128) if kind == "nf4" else 0.02
        assert (y - expected).norm() <= tolerance * expected.norm()
        probe = torch.randn(y.shape)
        (y * probe).sum().backward()
        gradients = [factor.grad.clone() for factor in delta.parameters() if factor.grad is not None]
        assert gradients
        assert any(gradient.abs().max() > 0 for gradient in gradients)
        for factor in delta.parameters():
            factor.grad = None
        (expected * probe).sum().backward()
        for gradient, factor in zip(gradients, delta.parameters(), strict=True):
            assert factor.grad is not None
            assert torch.allclose(gradient, factor.grad, rtol=1e-5, atol=1e-6)
        assert (x.grad - twin.grad).norm() <= tolerance * twin.grad.norm()
        assert host.weight.grad is None
        assert torch.equal(host.weight, W0)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_can_be_copied_pickled_and_detached_but_not_folded(kind: str) -> None:
    model = quantized(kind)
    batch = inputs(model)
    with torch.no_grad():
        plain = model(**batch).logits
        kinds = {name: type(layer) for name, layer in packed(model).items()}
        LoRA(rank=2, targets="all-linear").attach(model)
        for delta in attached_deltas(model).values():
            nn.init.normal_(delta.B)
        adapted = model(**batch).logits
        assert not torch.equal(plain, adapted)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, adapted)
        twin = pickle.loads(pickle.dumps(attached_deltas(model)))
        assert all(isinstance(delta, Delta) for delta in twin.values())
    with pytest.raises(ValueError, match=f"^cannot fold into {KINDS[kind]}-bit weights: load the base in bfloat16$"):
        fold(model)
    assert adapters(model)
    detach(model)
    assert {name: type(layer) for name, layer in packed(model).items()} == kinds
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_equal_peft_on_the_same_base(kind: str) -> None:
    """The operations and their order are the same in float32, so the numbers are."""
    ours, theirs = quantized(kind), quantized(kind)
    LoRA(targets="all-linear", rank=3, alpha=5).attach(ours)
    names = list(attached_deltas(ours))
    stored = {name: layer.weight.clone() for name, layer in packed(ours).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, target_modules=names))
    factors, others = [], []
    for seed, (name, delta) in enumerate(attached_deltas(ours).items()):
        layer: Any = theirs.get_base_model().get_submodule(name)
        for ours_, theirs_ in ((delta.A, layer.lora_A["default"].weight), (delta.B, layer.lora_B["default"].weight)):
            nn.init.normal_(ours_, std=0.1, generator=torch.Generator().manual_seed(seed))
            theirs_.data.copy_(ours_.data)
            factors.append(ours_)
            others.append(theirs_)
    losses = []
    for model, trained in ((ours, factors), (theirs, others)):
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        batch, values = inputs(ours), []
        for _ in range(5):
            loss = model(**batch).logits.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        losses.append(values)
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][-1]
    for factor, other in zip(factors, others, strict=True):
        assert torch.equal(factor, other)
    for name, layer in packed(ours).items():
        assert torch.equal(layer.weight, stored[name])


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT whose layers have rows of 64 weights."""
    path = tmp_path_factory.mktemp("models") / "bert"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(tiny_tokenizer())}
    tiny("bert", "base", **sizes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_run_is_repeated_opened_and_forked(kind: str, folder: str, task: ls.Task, tmp_path: Path) -> None:
    options = OPTIONS | {"quantize": kind, "dtype": "bfloat16", "keep_checkpoints": (2,), "root": tmp_path}
    model = ls.models.load(folder, task)
    run = ls.train(model, task, LoRA(rank=2, targets="all-linear"), **options)
    assert np.isfinite(run.meta.test.loss)
    assert run.meta.settings["quantize"] == kind
    assert set(run.meta.hosts.values()) == {"Linear"}
    plain = ls.models.load(folder, task)
    factors = sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters())
    assert run.meta.parameters.total == sum(p.numel() for p in plain.parameters()) + factors
    with pytest.raises(ValueError, match=f"^quantize must be '{kind}', as this model is, got None"):
        ls.train(model, task, LoRA(rank=2, targets="all-linear"), **options | {"quantize": None})
    again = ls.train(folder, task, LoRA(rank=2, targets="all-linear"), **options)
    assert (again.id, again.meta.checksums) == (run.id, run.meta.checksums)
    unquantized = ls.train(folder, task, LoRA(rank=2, targets="all-linear"), **options | {"quantize": None})
    assert unquantized.id != run.id
    assert unquantized.meta.w0_hash == run.meta.w0_hash
    opened = open_trained(run, folder, task, "last")
    assert packed(opened.base).keys() == packed(model).keys()
    forked = ls.fork(run, folder, task, step=2, progress=False)
    assert forked.meta.test.loss == run.meta.test.loss
    ls.export.to_peft(run, tmp_path / "peft")
    exported = ls.load(tmp_path / "peft").updates()
    for module, update in run.updates().items():
        assert np.array_equal(exported[module].dense(), update.dense())


@needs_bitsandbytes
def test_all_adapter_methods_train_on_4_bits(folder: str, task: ls.Task, tmp_path: Path) -> None:
    for name, method in ADAPTERS.items():
        options = OPTIONS | {"steps": 3, "observe": [ls.observe.norms(every=1)]}
        if name == "AdaLoRA":
            options["steps"] = 4
        run = ls.train(folder, task, copy.deepcopy(method), **options, out=tmp_path / name, quantize="nf4")
        rows = run.table[run.table["quantity"] == "update_norm"]
        assert rows["value"].max() > 0, name


@needs_bitsandbytes
def test_a_model_that_is_already_quantized_trains_only_by_adapters(folder: str, task: ls.Task, tmp_path: Path) -> None:
    model = ls.models.load(folder, task)
    quantize_blocks(model, "nf4", "cpu")
    for method in ("full", NeFT(num_neurons=2), Adapprox(), PiSSA()):
        with pytest.raises(ValueError, match=r"^cannot quantize the base of \w+: "):
            ls.train(model, task, method, **OPTIONS, out=tmp_path / "rejected")
    run = ls.train(model, task, "lora", **OPTIONS, out=tmp_path / "run")
    assert np.isfinite(run.meta.test.loss)
