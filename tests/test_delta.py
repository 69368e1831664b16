"""Adapters on modules: they equal the folded weight, keep parameter names, and can be detached and resized."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
from tiny import inputs, tiny
from tolerance import TINY, amplification, near, rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from lorascope.adapters.delta import (
    Delta,
    attach,
    attached_deltas,
    deltas,
    detach,
    effective_weight,
    fold,
    host_weight,
    resize,
)
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA, FourierFT, HydraLoRA, LoRA
from lorascope.methods.lora import LoRADelta
from lorascope.schema import module_table
from lorascope.updates import Dense, Fourier, LowRank


class Matrix(Delta):
    """A Delta whose parameter is its weight, so that only the base class is tested."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def weight(self) -> torch.Tensor:
        return self.matrix


class Gated(Matrix):
    linear = False


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(host: nn.Module, seed: int, rank: int = 3) -> LoRADelta:
    """Return a LoRA delta with both factors nonzero, as after training."""
    delta = LoRADelta(host, rank, scale=0.7)
    for i, factor in enumerate(delta.parameters()):
        factor.data = noise(*factor.shape, seed=2 * seed + i).to(factor)
    return delta


def everywhere(model: nn.Module) -> nn.Module:
    """Adapt every module whose class is exactly nn.Linear, nn.Embedding or Conv1D."""
    description = module_table.describe(model)
    rows = description[description["role"].ne("norm") & description["role"].ne("block")]
    hosts = {name: model.get_submodule(name) for name in rows["module"]}
    plain = {name: host for name, host in hosts.items() if type(host) in (nn.Linear, nn.Embedding, Conv1D)}
    attach(model, {name: trained(host, seed) for seed, (name, host) in enumerate(plain.items())})
    return model


def output(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)  # for dropout of the base model
    return model(**inputs(model)).logits.detach()


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.filterwarnings("ignore:untied")
def test_forward_equals_the_folded_weight(family, dtype, training):
    model = everywhere(tiny(family, tie_word_embeddings=family != "bert").to(dtype)).train(training)
    plain = output(tiny(family).to(dtype).train(training))
    adapted_output = output(model)
    assert error(adapted_output, plain) > 1e-2
    fold(model)
    assert not attached_deltas(model)
    bound = 1e-12 if dtype == torch.float64 else rounding(terms=TINY, growth=amplification(model, output))
    assert error(output(model), adapted_output) < bound


@pytest.mark.parametrize("host", [nn.Linear(64, 48), Conv1D(48, 64)], ids=repr)
@pytest.mark.parametrize("kind", [Matrix, LoRADelta])
def test_forward_equals_the_folded_weight_under_autocast(host, kind):
    host = copy.deepcopy(host)
    nn.init.normal_(host.weight, std=0.1)
    attach(host, {"": Matrix(noise(48, 64)) if kind is Matrix else trained(host, 0)})
    folded = copy.deepcopy(host)
    fold(folded)
    x = noise(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert host(x).dtype == torch.bfloat16
        assert error(host(x), folded(x)) < rounding(torch.bfloat16, depth=6)  # weights, factors, products, sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_effective_weight_in_16_bits_keeps_small_updates(dtype):
    """The weight is 1, and bfloat16 would round 1.001 to 1."""
    host = nn.Linear(6, 4, dtype=dtype)
    nn.init.ones_(host.weight)
    attach(host, {"": Matrix(torch.full((4, 6), 1e-3))})
    found = effective_weight(host, "")
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.double() - 1).numpy() == near(1e-3, 1)
    if dtype == torch.float32:
        assert torch.equal(found, host.weight + host.delta.weight())


@pytest.mark.parametrize("host", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)], ids=repr)
@pytest.mark.parametrize("kind", [Matrix, LoRADelta])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (0, 6), (2, 0, 6)])
def test_adapted_linear_equals_the_sum_of_weights(host, kind, shape):
    host = copy.deepcopy(host)
    delta = Matrix(noise(4, 6)) if kind is Matrix else trained(host, 0)
    weight = host_weight(host) + delta.weight()
    expected = torch.nn.functional.linear(noise(*shape, seed=5), weight, getattr(host, "bias", None))
    attach(host, {"": delta})
    assert host(noise(*shape, seed=5)).detach().numpy() == near(expected, 1, terms=6 + 2)
    contribution = noise(*shape, seed=5) @ delta.weight().T
    assert host.delta(noise(*shape, seed=5)).detach().numpy() == near(contribution, 1, terms=6 + 2)


@pytest.mark.parametrize("kind", [Matrix, LoRADelta])
def test_adapted_embedding_equals_the_sum_of_weights(kind):
    host = nn.Embedding(9, 4, padding_idx=0)
    delta = Matrix(noise(4, 9)) if kind is Matrix else trained(host, 0)
    table = host.weight + delta.weight().T
    attach(host, {"": delta})
    ids = torch.tensor([[1, 8, 0], [3, 3, 2]])
    assert host(ids).detach().numpy() == near(table[ids], terms=4)
    fold(host)
    assert host(ids).detach().numpy() == near(table[ids], terms=4)


def test_attach_keeps_parameter_names_and_detach_restores_the_model():
    model = tiny("gpt2")
    plain, before = copy.deepcopy(model.state_dict()), output(model)
    everywhere(model)
    assert [name for name in model.state_dict() if ".delta." not in name] == list(plain)
    added = {name for name in model.state_dict() if ".delta." in name}
    assert "transformer.h.0.attn.c_attn.delta.A" in added
    host = model.transformer.h[0].attn.c_attn
    assert isinstance(host, Conv1D)
    taken = attached_deltas(model)
    assert detach(model) == taken
    assert type(host) is Conv1D
    assert list(model.state_dict()) == list(plain)
    assert torch.equal(output(model), before)
    attach(model, taken)
    assert not torch.equal(output(model), before)


def test_copies_of_an_adapted_model_are_independent():
    model = everywhere(tiny("bert"))
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), expected)
        for delta in attached_deltas(twin).values():
            nn.init.zeros_(delta.A)
        assert torch.equal(output(model), expected)
        assert not torch.equal(output(twin), expected)


COMPILE = """
import sys
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from lorascope.adapters.delta import attach
from lorascope.methods.lora import LoRADelta

def gradients(call):
    model.zero_grad()
    call(torch.tensor([[1, 2], [5, 0]])).square().sum().backward()
    return [p.grad for p in model.parameters()]

model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 5), Conv1D(4, 5))
attach(model, {name: LoRADelta(host, 2) for name, host in model.named_children()})
for p in model.parameters():
    nn.init.normal_(p)
expected = gradients(model)
for one, other in zip(gradients(torch.compile(model, backend="aot_eager", fullgraph=True)), expected, strict=True):
    assert (one - other).norm() <= float(sys.argv[1]) * other.norm()
"""


@pytest.mark.slow
def test_adapted_model_compiles_to_one_graph():
    """Compile in a separate process, because this one may check annotations at run time."""
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(rounding(terms=8, depth=8))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class NoHostSync(TorchDispatchMode):
    """Fail on operations that synchronize with the GPU: reading values, and shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        assert not boolean, "a boolean index waits for the device"
        return func(*args, **(kwargs or {}))


METHODS = [
    LoRA(), AdaLoRA(), AutoLoRA(), ALoRA(), FourierFT(coefficients=2), FourierFT(coefficients=200),
    FourierFT(basis="random"), HydraLoRA(), HydraLoRA(shared_a=False), HydraLoRA(router="uniform"),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label())
def test_step_of_an_adapter_does_not_wait_for_the_device(method):
    """Includes forward passes without gradients and in evaluation mode."""
    model = tiny("bert")
    method.targets = "q"
    method.attach(model)
    delta = next(iter(attached_deltas(model).values()))
    x = torch.randn(2, 3, 32, requires_grad=True)
    host = next(module for module in model.modules() if getattr(module, "delta", None) is delta)
    host(x)  # fills caches
    with NoHostSync():
        host.train()(x).sum().backward()
        delta(x).sum().backward()
        with torch.no_grad():
            host.eval()(x)
    assert x.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_the_same(reentrant):
    def gradients(model: nn.Module) -> list[torch.Tensor]:
        model.requires_grad_(False).train()
        for delta in attached_deltas(model).values():
            delta.requires_grad_(True)
        torch.manual_seed(3)
        model(**inputs(model)).logits.square().mean().backward()
        return [parameter.grad for delta in attached_deltas(model).values() for parameter in delta.parameters()]

    expected = gradients(everywhere(tiny("bert")))
    model = everywhere(tiny("bert"))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    assert len(expected) > 20
    for one, other in zip(gradients(model), expected, strict=True):
        assert one.numpy() == near(other, terms=TINY)


BERT = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
GPT2 = "transformer.wte", "lm_head"
TIED = [
    ("bert", "masked", AutoModelForMaskedLM, *BERT),
    ("bert", "masked", AutoModelForMaskedLM, *BERT[::-1]),
    ("gpt2", "causal", AutoModelForCausalLM, *GPT2),
    ("gpt2", "causal", AutoModelForCausalLM, *GPT2[::-1]),
    ("t5", "seq2seq", AutoModelForSeq2SeqLM, "encoder.embed_tokens", "decoder.embed_tokens"),
    ("bart", "seq2seq", AutoModelForSeq2SeqLM, "lm_head", "model.shared"),
]


@pytest.mark.parametrize(("family", "head", "loader", "name", "other"), TIED)
def test_fold_of_a_tied_weight_unties_it(family, head, loader, name, other, tmp_path):
    """Only the named module is adapted; folding gives it its own weight, which also holds after saving."""
    model = tiny(family, head, tie_word_embeddings=True)
    for seed, vector in enumerate(p for p in model.parameters() if p.ndim == 1):
        vector.data += noise(*vector.shape, seed=seed)  # biases are tied too, and are initialized to zero
    host, untouched = model.get_submodule(name), model.get_submodule(other)
    assert host.weight is untouched.weight
    shared, weight, before = untouched.weight, host.weight.detach().clone(), output(model)
    delta = trained(host, 1)
    attach(model, {name: delta})
    expected = output(model)
    assert list(attached_deltas(model)) == [name]
    assert error(expected, before) > 1e-3
    with pytest.raises(ValueError, match=f"fold '{name}'.* untie=True"):
        fold(model, untie=False)
    assert torch.equal(output(model), expected)
    with pytest.warns(UserWarning, match=f"untied '{name}'"):
        fold(model)
    bound = rounding(terms=TINY, growth=amplification(model, output))
    assert error(output(model), expected) < bound
    assert model.config.tie_word_embeddings is False
    assert torch.equal(untouched.weight, weight)
    assert any(parameter is shared for parameter in model.parameters())
    assert host.weight is not shared
    assert not torch.equal(host.weight, weight)
    model.tie_weights()
    assert error(output(model), expected) < bound
    model.save_pretrained(tmp_path)
    assert error(output(loader.from_pretrained(tmp_path)), expected) < bound


def test_fold_of_an_input_dependent_delta_raises():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    attach(model, {"0": Matrix(noise(2, 3)), "1": Gated(noise(2, 2))})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="fold '1': its Gated "):
        fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_attach_to_invalid_names_raises_and_changes_nothing():
    model = tiny("bert")
    good = "bert.encoder.layer.0.attention.self.query"
    with pytest.raises(ValueError, match=r"unknown module 'query' of BertFor.*bert\.encoder\.layer\.0.*query"):
        attach(model, {good: Matrix(noise(32, 32)), "query": Matrix(noise(32, 32))})
    with pytest.raises(ValueError, match=r"did you mean .*layer\.0\.attention\.self\.query"):
        attach(model, {"bert.encoder.layer.0.attention.self.qury": Matrix(noise(32, 32))})
    assert not attached_deltas(model)
    attach(model, {good: Matrix(noise(32, 32))})
    with pytest.raises(ValueError, match=f"attach to '{good}'.* has a Matrix"):
        attach(model, {good: Matrix(noise(32, 32))})


def test_attach_to_another_class_raises():
    class Scaled(nn.Embedding):
        pass

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "table": Scaled(5, 4), "linear": nn.Linear(2, 2)})
    with pytest.raises(TypeError, match=r"'attention.out_proj' .*got .*NonDynamicallyQuantizableLinear"):
        attach(model, {"attention.out_proj": Matrix(noise(4, 4))})
    with pytest.raises(TypeError, match=r"'table' .*got .*Scaled"):
        attach(model, {"table": Matrix(noise(4, 5))})
    with pytest.raises(TypeError, match=r"'attention' .*got"):
        attach(model, {"attention": Matrix(noise(4, 4))})
    model["linear"].forward = lambda x: x
    with pytest.raises(TypeError, match=r"'linear'.* forward"):
        attach(model, {"linear": Matrix(noise(2, 2))})


@pytest.mark.parametrize("dim", [0, 1])
def test_resize_does_not_change_the_training_of_retained_coordinates(dim):
    """With a loss that is a sum over coordinates, the retained ones train bitwise as if they had been the only ones."""

    def start(indices: list[int]) -> tuple[nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        param = nn.Parameter(noise(5, 4).movedim(dim, 0)[indices].movedim(0, dim).clone())
        optimizer = torch.optim.AdamW([{"params": [param], "name": "adapter"}], lr=0.1, amsgrad=True)
        return param, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)

    def step(param, optimizer, scheduler):
        optimizer.zero_grad()
        param.square().sum().add(param.sum()).backward()
        optimizer.step()
        scheduler.step()

    one, other = start(list(range(4))), start([3, 1])
    for _ in range(3):
        step(*one)
        step(*other)
    param, optimizer, scheduler = one
    new = torch.full((1, 4) if dim == 0 else (5, 1), 9.0)
    resize(param, optimizer, [3, 1], new, dim)
    tail = param.narrow(dim, 2, 1)
    assert torch.equal(tail, new)
    assert torch.equal(param.narrow(dim, 0, 2), other[0])
    assert torch.equal(param.grad.narrow(dim, 0, 2), other[0].grad)
    assert not param.grad.narrow(dim, 2, 1).any()
    assert optimizer.param_groups[0]["params"][0] is param
    for name, value in optimizer.state[param].items():
        if value.ndim:
            assert torch.equal(value.narrow(dim, 0, 2), other[1].state[other[0]][name])
            assert not value.narrow(dim, 2, 1).any()
    for _ in range(3):
        step(*one)
        step(*other)
    assert torch.equal(param.narrow(dim, 0, 2), other[0])
    assert not torch.equal(param.narrow(dim, 2, 1), new)
    assert scheduler.get_last_lr() == other[2].get_last_lr()
    resize(param, optimizer, [], None, dim)
    assert param.shape[dim] == 0


def test_resize_before_the_first_step():
    param = nn.Parameter(torch.arange(6.0).reshape(3, 2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    resize(param, optimizer, torch.tensor([2, 0]), None, 0)
    assert param.tolist() == [[4, 5], [0, 1]]
    assert param.grad is None


@pytest.mark.filterwarnings("ignore")
def test_resize_in_a_distributed_run_raises(tmp_path):
    param = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="distributed"):
            resize(param, optimizer, [0], None, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_deltas_are_copies():
    model = everywhere(tiny("gpt2"))
    found = dict(deltas(model))
    assert found.keys() == attached_deltas(model).keys()
    for name, delta in attached_deltas(model).items():
        assert isinstance(found[name], LowRank)
        assert found[name].dense() == near(delta.weight(), terms=3 + 1)
    norm = found["transformer.wte"].norm()
    nn.init.zeros_(attached_deltas(model)["transformer.wte"].B)
    assert found["transformer.wte"].norm() == norm > 0


def test_deltas_with_a_reference_include_trained_weights():
    """An update is the change of the weight plus the Delta's part; tied weights count once, others are unchanged."""
    model = tiny("gpt2")
    reference = {name: value.detach().clone() for name, value in model.named_parameters()}
    fused, wte = model.transformer.h[0].attn.c_attn, model.transformer.wte
    attach(
        model, {"transformer.h.0.attn.c_attn": trained(fused, 0), "transformer.wpe": trained(model.transformer.wpe, 1)}
    )
    with torch.no_grad():
        fused.weight += noise(*fused.weight.shape)
        wte.weight += noise(*wte.weight.shape, seed=1)
    found = dict(deltas(model, reference))
    expected = noise(32, 96).T + fused.delta.weight()
    assert found["transformer.h.0.attn.c_attn"].dense() == near(expected, 1, terms=3)
    assert found["transformer.wte"].dense() == near(noise(64, 32, seed=1).T, 1)
    assert isinstance(found["transformer.wpe"], LowRank)
    assert "lm_head" not in found
    assert found["transformer.h.1.attn.c_attn"].norm() == 0.0
    assert all(len(update.shape) == 2 for update in found.values())
    partial = dict(deltas(model, {"transformer.wte.weight": reference["transformer.wte.weight"]}))
    assert sorted(partial) == ["transformer.h.0.attn.c_attn", "transformer.wpe", "transformer.wte"]
    both = reference | {"lm_head.weight": reference["transformer.wte.weight"]}
    assert "lm_head" not in dict(deltas(model, both))


QUERY = {"target_modules": ["query"]}
PEFT = {
    "lora": (peft.LoraConfig(r=3, lora_alpha=5, target_modules=["query", "dense"]), LowRank),
    "lora on an embedding": (peft.LoraConfig(r=3, target_modules=["word_embeddings"]), LowRank),
    "dora": (peft.LoraConfig(r=3, use_dora=True, **QUERY), Dense),
    "adalora": (peft.AdaLoraConfig(init_r=4, total_step=10, **QUERY), LowRank),
    "fourierft": (peft.FourierFTConfig(n_frequency=20, **QUERY), Fourier),
    "loha": (peft.LoHaConfig(r=2, **QUERY), Dense),
    "oft": (peft.OFTConfig(oft_block_size=8, **QUERY), Dense),
    "ia3": (peft.IA3Config(feedforward_modules=[], **QUERY), Dense),
}


def with_peft(model: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    wrapped = peft.get_peft_model(model, config)
    for seed, parameter in enumerate(p for p in wrapped.parameters() if p.requires_grad):
        parameter.data += noise(*parameter.shape, seed=seed)
    return wrapped.eval()


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.filterwarnings("ignore")
def test_deltas_of_peft_layers_equal_the_difference_of_merging(kind):
    config, form = PEFT[kind]
    wrapped = with_peft(tiny("bert"), config)
    found = dict(deltas(wrapped))
    merged = copy.deepcopy(wrapped).double().merge_and_unload()
    original = tiny("bert").double()
    assert found
    for name, update in found.items():
        change = host_weight(merged.get_submodule(name)) - host_weight(original.get_submodule(name))
        assert isinstance(update, form)
        assert np.abs(update.dense()).max() > 1e-4
        assert update.dense() == near(change, terms=TINY)
    with wrapped.disable_adapter():
        assert not dict(deltas(wrapped))
    wrapped.merge_adapter()
    for name, update in deltas(wrapped):
        assert update.dense() == near(found[name].dense(), terms=TINY)


@pytest.mark.filterwarnings("ignore")
def test_deltas_of_two_peft_adapters_on_conv1d_are_summed():
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = with_peft(tiny("gpt2"), config)
    wrapped.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["c_attn"], fan_in_fan_out=True))
    nn.init.ones_(wrapped.base_model.model.transformer.h[0].attn.c_attn.lora_B["second"].weight)
    wrapped.base_model.set_adapter(["default", "second"])
    update = dict(deltas(wrapped))["transformer.h.0.attn.c_attn"]
    assert (update.shape, update.rank) == ((96, 32), 5)
    layer = wrapped.base_model.model.transformer.h[0].attn.c_attn
    expected = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    assert update.dense() == near(expected.T, terms=5)


def test_weight_of_the_base_class_is_not_implemented():
    with pytest.raises(NotImplementedError, match=r"Delta .*weight"):
        Delta().weight()
