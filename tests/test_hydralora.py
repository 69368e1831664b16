"""Test HydraLoRA against the paper's arithmetic, LoRA with the same factors, and gate weights of single tokens."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tiny import inputs, tiny
from tolerance import TEXT, TINY, forward, near, rounding
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorascope as ls
from lorascope import observe, plots
from lorascope.adapters.delta import attach, attached_deltas, deltas, fold
from lorascope.analysis.head_count import choose_num_experts, chord_distance, cluster_selection, repeated_selection
from lorascope.analysis.head_similarity import cosines, update_inner
from lorascope.diagnosis import inspection
from lorascope.inputs import models
from lorascope.methods import HydraLoRA, LoRA
from lorascope.methods.hydralora import HydraDelta, RoutedDelta, head_similarity
from lorascope.methods.hydralora_routing import Routing, watch
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import config, from_config
from lorascope.runs.run import Run
from lorascope.updates import effective_rank

FAST = {"steps": 5, "batch_size": 8, "eval_every": 2, "eval_size": 16, "progress": False, "device": "cpu"}
FFN = ("ffn_in", "ffn_out")


def double(kind=RoutedDelta, number=3, split=False, seed=0, dropout=0.0):
    """Build a linear 6 -> 4 in float64 with experts of rank 2 and random factors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        host = nn.Linear(6, 4).double()
        delta = kind(host, 2, number, 1.5, dropout, split)
        nn.init.normal_(delta.B)
    attach(host, {"": delta})
    return host


def heads(delta: HydraDelta) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Slice B_i and its A out of the parameters."""
    rank = delta.B.shape[1] // delta.number
    shared = len(delta.A) == rank
    return [
        (delta.B[:, i * rank : (i + 1) * rank], delta.A if shared else delta.A[i * rank : (i + 1) * rank])
        for i in range(delta.number)
    ]


def by_loop(host: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute equation 3 in a loop over the experts."""
    delta = host.delta
    gates = torch.softmax(x @ delta.router.T, -1)
    added = sum(gates[..., i, None] * (x @ A.T @ B.T) for i, (B, A) in enumerate(heads(delta)))
    return x @ host.weight.T + host.bias + delta.scale * added


def filled(model: nn.Module) -> nn.Module:
    """Set B to random values, as after training."""
    for seed, delta in enumerate(attached_deltas(model).values()):
        nn.init.normal_(delta.B, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model


# -- the map ----------------------------------------------------------------------------------------------------------


def test_gates_and_output_match_the_worked_example():
    host = nn.Linear(3, 2, bias=False).double()
    delta = RoutedDelta(host, 1, 2, 2)
    host.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double()
    delta.A.data = torch.tensor([[0.5, -1, 1]]).double()
    delta.B.data = torch.tensor([[1.0, 0], [0, 2]]).double()
    delta.router.data = torch.tensor([[0.0, 1, 0], [1, 0, 1]]).double()
    attach(host, {"": delta})
    x = torch.tensor([[1.0, 2, -1]]).double()
    assert delta.gates(x)[0].tolist() == pytest.approx([0.8807970780, 0.1192029220], abs=1e-10)
    assert host(x)[0].tolist() == pytest.approx([-3.4039853899, 0.8079707798], abs=1e-10)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_output_equals_a_loop_and_the_merged_weight_per_token(split, shape):
    host = double(split=split)
    x = torch.randn(*shape, dtype=torch.float64)
    y, delta = host(x), host.delta
    assert y.shape == (*shape[:-1], 4)
    assert torch.allclose(y, by_loop(host, x), rtol=0, atol=1e-12)
    assert torch.allclose(host.weight.new_tensor(0) + delta(x), y - nn.functional.linear(x, host.weight, host.bias))
    for token, found in zip(x.reshape(-1, 6), y.reshape(-1, 4), strict=True):
        merged = host.weight + delta.weight(gates=torch.softmax(delta.router @ token, 0))
        assert torch.allclose(merged @ token + host.bias, found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [False, True])
def test_update_without_router_is_the_mean_of_the_experts(split):
    host = double(HydraDelta, split=split)
    x = torch.randn(5, 6, dtype=torch.float64)
    mean = sum(B @ A for B, A in heads(host.delta)) / 3
    assert torch.allclose(host.delta.weight(), host.delta.scale * mean, rtol=0, atol=1e-12)
    assert torch.allclose(host.delta(x), x @ host.delta.weight().T, rtol=0, atol=1e-12)
    assert host.delta.linear
    assert host.delta.update().exact
    assert dict(host.delta.named_parameters()).keys() == {"A", "B"}


@pytest.mark.parametrize("kind", [HydraDelta, RoutedDelta])
def test_single_expert_equals_lora_bitwise(kind):
    for autocast in (False, True):
        host, plain = nn.Linear(6, 4), nn.Linear(6, 4)
        delta, lora = kind(host, 2, 1, 1.5), LoRADelta(plain, 2, 1.5)
        nn.init.normal_(delta.B)
        plain.load_state_dict(host.state_dict())
        lora.A.data, lora.B.data = delta.A.data.clone(), delta.B.data.clone()
        attach(host, {"": delta})
        attach(plain, {"": lora})
        x = torch.randn(2, 5, 6)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            one, other = host(x), plain(x)
        assert torch.equal(one, other)
        for output in (one, other):
            output.square().sum().backward()
        assert torch.equal(delta.A.grad, lora.A.grad)
        assert torch.equal(delta.B.grad, lora.B.grad)


def lora_of(host: nn.Module, B: torch.Tensor) -> nn.Module:
    plain = nn.Linear(6, 4).double()
    plain.load_state_dict({name: value for name, value in host.state_dict().items() if "delta" not in name})
    lora = LoRADelta(plain, 2, host.delta.scale)
    lora.A.data, lora.B.data = host.delta.A.data, B.data
    attach(plain, {"": lora})
    return plain


def test_equal_experts_equal_lora():
    host = double()
    host.delta.B.data = host.delta.B.data[:, :2].repeat(1, 3)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.allclose(host(x), lora_of(host, host.delta.B[:, :2])(x), rtol=0, atol=1e-12)


def test_zero_router_equals_lora_with_the_mean_expert():
    host = double()
    nn.init.zeros_(host.delta.router)
    mean = host.delta.B.unflatten(1, (3, 2)).mean(1)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.allclose(host(x), lora_of(host, mean)(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [False, True])
def test_output_ignores_expert_order_and_a_shift_of_all_logits(split):
    host = double(split=split)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    before, delta, order = host(x), host.delta, [2, 0, 1]
    delta.B.data = delta.B.data.unflatten(1, (3, 2))[:, order].flatten(1)
    delta.router.data = delta.router.data[order]
    if split:
        delta.A.data = delta.A.data.unflatten(0, (3, 2))[order].flatten(0, 1)
    assert torch.allclose(host(x), before, rtol=0, atol=1e-12)
    delta.router.data += torch.randn(6, dtype=torch.float64)
    assert torch.allclose(host(x), before, rtol=0, atol=1e-12)


def test_other_factorization_changes_only_the_cosines_of_b():
    """The factors R A and B_i R^-1 have the same updates and row space, but other cosines of B."""
    host = double()
    x, delta = torch.randn(2, 5, 6, dtype=torch.float64), host.delta
    R = torch.tensor([[1.0, 3], [-2, 0.5]]).double()

    def seen() -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
        held = {name: factor.detach().numpy() for name, factor in delta.factors().items()}
        rows = np.linalg.pinv(held["A"]) @ held["A"]
        return host(x), cosines(update_inner(held["A"], held["B"])), rows, head_similarity(held["B"])

    before = seen()
    delta.A.data = R @ delta.A.data
    delta.B.data = (delta.B.data.unflatten(1, (3, 2)) @ torch.linalg.inv(R)).flatten(1)
    *same, raw = seen()
    assert torch.allclose(same[0], before[0], rtol=0, atol=1e-12)
    for found, expected in zip(same[1:], before[1:3], strict=True):
        assert found == pytest.approx(expected, abs=1e-12)
    assert np.abs(raw - before[3]).max() > 0.05


def test_gates_sum_to_one_and_entropy_is_between_0_and_ln_n():
    delta = RoutedDelta(nn.Linear(6, 4), 2, 5)
    delta.router.data *= 20
    gates = delta.gates(3 * torch.randn(50, 7, 6))
    assert (gates >= 0).all()
    assert gates.sum(-1).detach().numpy() == near(torch.ones(50, 7), terms=5, depth=2)
    entropy = torch.distributions.Categorical(gates).entropy()
    assert entropy.min() >= 0
    assert entropy.max() <= math.log(5) * (1 + rounding(terms=5, depth=3))
    assert entropy.max() > 10 * entropy.min()


def test_router_uses_float32_under_autocast_and_in_half_precision():
    x = torch.randn(4, 6)
    delta = RoutedDelta(nn.Linear(6, 4), 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        gates = delta.gates(x)
        y = delta(x)
    assert torch.equal(gates, delta.gates(x))
    assert (gates.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    small = RoutedDelta(nn.Linear(6, 4, dtype=torch.bfloat16), 2, 3)
    assert (small.A.dtype, small.router.dtype) == (torch.float32, torch.float32)
    assert small(x.bfloat16()).dtype == torch.float32  # the host rounds the sum
    assert small.gates(x.bfloat16()).dtype == torch.float32


def test_dropout_excludes_the_router_and_is_shared_by_the_experts():
    host = double(dropout=0.5)
    x = torch.randn(50, 6, dtype=torch.float64)
    delta = host.delta.train()
    torch.manual_seed(3)
    y = delta(x)
    torch.manual_seed(3)
    kept = nn.functional.dropout(x, 0.5)
    gates = torch.softmax(x @ delta.router.T, -1)
    expected = sum(gates[:, i, None] * (kept @ A.T @ B.T) for i, (B, A) in enumerate(heads(delta)))
    assert torch.allclose(y, delta.scale * expected, rtol=0, atol=1e-12)
    assert torch.equal(delta.eval()(x), delta(x))


# -- start and symmetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("shared_a", [True, False])
def test_first_gradient_reaches_only_b(family, shared_a):
    model = tiny(family).requires_grad_(False)
    before = model(**inputs(model)).logits
    HydraLoRA(targets="all-linear", shared_a=shared_a).attach(model)
    after = model(**inputs(model)).logits
    assert torch.equal(after, before)
    after.square().sum().backward()
    for delta in attached_deltas(model).values():
        assert not delta.A.grad.any()
        assert not delta.router.grad.any()
        assert all(B.any() for B in delta.B.grad.unflatten(1, (3, 4)).unbind(1))
        assert delta.A.any()
        assert delta.router.any()


def test_initial_a_and_router_are_kaiming_uniform():
    delta = RoutedDelta(nn.Linear(768, 10), 32, 64, split=True)
    for start in (delta.A.detach(), delta.router.detach()):
        assert 0.99 * 768**-0.5 < start.abs().max() <= 768**-0.5
        assert start.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.01)


def test_default_router_breaks_the_symmetry_that_a_zero_router_preserves():
    torch.manual_seed(0)
    x = torch.randn(256, 6, dtype=torch.float64)
    kinds = torch.arange(256) % 3
    goals = torch.randn(3, 4, 6, dtype=torch.float64)
    y = torch.einsum("nof,nf->no", goals[kinds], x + 3 * torch.eye(3, 6)[kinds])
    loss = {}
    for start in ("zero", "default"):
        host = double(seed=1)
        nn.init.zeros_(host.delta.B)
        if start == "zero":
            nn.init.zeros_(host.delta.router)
        host.requires_grad_(False)
        optimizer = torch.optim.Adam(host.delta.requires_grad_(True).parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            error = (host(x + 3 * torch.eye(3, 6)[kinds]) - y).square().mean()
            error.backward()
            optimizer.step()
        apart = host.delta.B.unflatten(1, (3, 2)).std(1).max().item()
        loss[start] = error.item()
        if start == "zero":
            assert apart < 1e-12
            assert host.delta.router.abs().max() < 1e-6
        else:
            assert apart > 0.1
    assert loss["default"] < 0.9 * loss["zero"]


# -- method -----------------------------------------------------------------------------------------------------------

LLAMA = 6_738_415_616
COUNTS = [
    (("q", "v"), 8, 3, 8_388_608, 0.124, 0.136),
    (("q", "v"), 8, 10, 23_068_672, 0.342, 0.381),
    (("q", "v"), 4, 4, 5_242_880, 0.078, 0.093),
    (None, 8, 3, 24_969_216, 0.371, 0.398),
    (None, 8, 10, 71_761_920, 1.065, 1.156),
    (None, 4, 4, 15_826_944, 0.235, 0.271),
]


@pytest.mark.parametrize(("targets", "rank", "number", "count", "share", "with_router"), COUNTS)
def test_parameter_counts_match_the_paper(targets, rank, number, count, share, with_router):
    """LLaMA2-7B, counted from one of its 32 equal blocks; the paper's fractions exclude the router."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
        HydraLoRA(targets=targets, rank=rank, num_experts=number).attach(model)
    found = attached_deltas(model).values()
    factors = 32 * sum(delta.A.numel() + delta.B.numel() for delta in found)
    whole = 32 * sum(p.numel() for delta in found for p in delta.parameters())
    assert factors == count
    assert (round(100 * factors / LLAMA, 3), round(100 * whole / LLAMA, 3)) == (share, with_router)


def test_parameter_count_of_lora_split_matches_the_paper():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=1, num_attention_heads=32)
        )
        HydraLoRA(targets=("q", "v"), rank=8, num_experts=4, shared_a=False, router="uniform").attach(model)
    assert 32 * sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()) == 16_777_216


@pytest.mark.parametrize(("family", "count"), [("bert", 4), ("llama", 6), ("gpt2", 4)])
def test_default_targets_are_the_feed_forward_modules(family, count):
    model = tiny(family)
    HydraLoRA().attach(model)
    assert len(attached_deltas(model)) == count
    assert {type(delta) for delta in attached_deltas(model).values()} == {RoutedDelta}


def test_scale_is_alpha_over_the_rank_of_an_expert():
    for shared_a in (True, False):
        model = tiny("bert")
        HydraLoRA(rank=4, alpha=6, shared_a=shared_a, dropout=0.25).attach(model)
        assert {(delta.scale, delta.dropout) for delta in attached_deltas(model).values()} == {(1.5, 0.25)}


def test_single_expert_or_uniform_gates_have_no_router():
    for method in (HydraLoRA(num_experts=1), HydraLoRA(router="uniform")):
        model = tiny("bert")
        method.attach(model)
        assert {type(delta) for delta in attached_deltas(model).values()} == {HydraDelta}
        before = filled(model)(**inputs(model)).logits
        fold(model)
        after = model(**inputs(model)).logits
        assert (after - before).norm() <= forward(model, inputs(model)) * before.norm()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rank": 0}, "^rank must be an integer >= 1, got 0$"),
        ({"num_experts": 0}, "^num_experts must be an integer >= 1, got 0"),
        ({"num_experts": -3}, "^num_experts must be an integer >= 1, got -3"),
        ({"gates_every": 0}, "^gates_every must be an integer >= 1, got 0"),
        ({"gate_rows": 0}, "^gate_rows must be an integer >= 1, got 0"),
        ({"alpha": 0.0}, "^alpha must be .*, got 0.0$"),
        ({"alpha": math.nan}, "^alpha must be .*, got nan"),
        ({"dropout": 1.0}, r"^dropout must be in \[0, 1\), got 1.0$"),
        ({"dropout": -0.1}, "^dropout must be .*, got -0.1"),
    ],
)
def test_invalid_settings_raise_one_line(fields, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        HydraLoRA(**fields)
    assert "\n" not in str(raised.value)


def test_embedding_raises_and_attaches_nothing():
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"embedding .*word_embeddings'.* router") as raised:
        HydraLoRA(targets=("q", "embed")).attach(model)
    assert "\n" not in str(raised.value)
    assert not attached_deltas(model)


def test_default_gate_rows_does_not_change_the_run_id():
    assert "gate_rows" not in config(HydraLoRA())
    assert config(HydraLoRA(gate_rows=128))["gate_rows"] == 128
    assert from_config(config(HydraLoRA(gate_rows=128))) == HydraLoRA(gate_rows=128)


def test_weight_of_a_routed_update_raises():
    model = tiny("bert")
    HydraLoRA().attach(model)
    delta = next(iter(attached_deltas(model).values()))
    with pytest.raises(ValueError, match="depends on its input"):
        delta.weight()
    with pytest.raises(ValueError, match=r"cannot fold .* RoutedDelta"):
        fold(model)


@pytest.mark.parametrize("shared_a", [True, False])
def test_update_uses_the_mean_gates(shared_a):
    model = tiny("bert")
    HydraLoRA(shared_a=shared_a, targets="all-linear").attach(model)
    filled(model)
    found = dict(deltas(model))
    assert len(found) == 12
    for name, delta in attached_deltas(model).items():
        delta.mean_gates_.copy_(torch.tensor([0.5, 0.2, 0.3]))
        update = delta.update()
        assert update.dense() == near(delta.weight(gates=delta.mean_gates_), terms=12 + 2)
        assert update.rank == delta.rank == (4 if shared_a else 12)
        assert not update.exact
        even = delta.weight(gates=torch.full((3,), 1 / 3))
        assert found[name].dense() == near(even, terms=12 + 2)


def test_copy_is_independent_of_the_model():
    model = tiny("bert")
    HydraLoRA().attach(model)
    before = filled(model)(**inputs(model)).logits
    twin = copy.deepcopy(model)
    for delta in attached_deltas(twin).values():
        nn.init.zeros_(delta.B)
    assert torch.equal(model(**inputs(model)).logits, before)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_output_ignores_padding_and_row_order(family):
    model = tiny(family)
    HydraLoRA(targets="all-linear", rank=2).attach(model)
    filled(model)
    batch = inputs(model)
    found = model(**batch).logits
    turned = model(**{name: values.flip(0) for name, values in batch.items()}).logits
    bound = forward(model, batch) * found.norm()
    assert (turned.flip(0) - found).norm() <= bound
    padded = {name: nn.functional.pad(values, (0, 4)) for name, values in batch.items()}
    wider = model(**padded).logits
    assert ((wider[:, : found.shape[1]] if family == "gpt2" else wider) - found).norm() <= bound


# -- what is recorded -------------------------------------------------------------------------------------------------


def routers(model: nn.Module):
    return {name: delta.gates for name, delta in attached_deltas(model).items()}


def by_hand(model: nn.Module, name: str, batch: dict, counted: torch.Tensor):
    """Compute the gate weights of a module token by token, as one list per row."""
    inputs_of: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, given, __: inputs_of.append(given[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    router = attached_deltas(model)[name].router.detach()
    return [
        [torch.softmax(router @ vector, 0).double().numpy() for vector, real in zip(row, keep, strict=True) if real]
        for row, keep in zip(inputs_of[0], counted, strict=True)
    ]


def test_gates_exclude_padding():
    model = tiny("bert")
    HydraLoRA(targets="all-linear").attach(model)
    for delta in attached_deltas(filled(model)).values():
        delta.router.data *= 10
    batch = inputs(model)
    batch["attention_mask"][0, 3:] = 0
    batch["attention_mask"][2, 5:] = 0
    sharp = {"scale": 1, "terms": TINY, "growth": 10}
    seen = watch(model, routers(model), batch, lambda: model(**batch))
    assert set(seen) == set(attached_deltas(model)) != set()
    for name in seen:
        rows = by_hand(model, name, batch, batch["attention_mask"].bool())
        every = np.array([gates for row in rows for gates in row])
        assert len(every) == 3 + 7 + 5
        assert every.std(0).max() > 1e-2  # gates differ between tokens
        assert seen[name].mean == near(every.mean(0), **sharp)
        assert seen[name].statistics()["gate_entropy"] == near(-(every * np.log(every)).sum(1).mean(), **sharp)
        first, second = np.array([*rows[0], *rows[2]]).mean(0), np.array(rows[1]).mean(0)
        assert seen[name].group_means(np.array(["b", "a", "b"])) == near(np.stack([second, first]), **sharp)


def test_encoder_and_decoder_use_separate_padding():
    model = tiny("t5")
    HydraLoRA(targets=("ffn_in", "k", "cross_k")).attach(model)
    filled(model)
    batch = inputs(model, length=6)
    batch["labels"] = batch.pop("decoder_input_ids").clone()
    batch["attention_mask"][:, 4:] = 0
    batch["labels"][:, 1:] = -100
    seen = watch(model, routers(model), batch, lambda: model(**batch))
    assert set(seen) == set(attached_deltas(model)) != set()
    for name, gates in seen.items():
        decoded = name.startswith("decoder") and "EncDecAttention" not in name
        assert gates.tokens.tolist() == ([1.0] * 3 if decoded else [4.0] * 3), name


def test_module_with_one_vector_per_row_counts_rows():
    model = tiny("bert")
    HydraLoRA(targets=("bert.pooler.dense",)).attach(model)
    batch = inputs(model)
    seen = watch(model, routers(model), batch, lambda: model(**batch))
    assert seen["bert.pooler.dense"].tokens.tolist() == [1.0] * 3


def test_watch_leaves_mode_generator_and_hooks_unchanged():
    model = tiny("bert").train()
    HydraLoRA().attach(model)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batch = inputs(model)
    watch(model, routers(model), batch, lambda: model(**batch))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError):
        watch(model.eval(), routers(model), batch, lambda: 1 / 0)
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def routing(weights, tokens) -> Routing:
    """Return summed gate weights without statistics of single tokens."""
    rows, heads = np.zeros(len(tokens)), np.zeros((len(tokens), len(weights[0])))
    return Routing(np.array(weights), rows, np.array(tokens), heads, heads, heads, rows, rows)


def test_information_matches_the_joint_table():
    """The expected value is I = sum p ln(p / (p_group p_expert)) of the joint table."""
    gates = routing([[3.0, 1], [1, 3], [3, 1], [1, 3]], [4.0] * 4)
    joint = np.array([[3, 1], [1, 3]]) / 8
    expected = (joint * np.log(joint / 0.25)).sum()
    assert gates.information(["a", "b", "a", "b"]) == pytest.approx(expected)
    assert gates.information(["a", "a", "b", "b"]) == pytest.approx(0, abs=1e-12)
    # A random grouping pairs equal rows in one of three cases.
    assert gates.information_by_chance(["a", "b", "a", "b"]) == pytest.approx(expected / 3, abs=0.03)
    certain = routing(np.eye(3), [1.0] * 3)
    assert certain.information(["a", "b", "c"]) == pytest.approx(math.log(3))


def test_information_weights_groups_equally_for_any_number_of_tokens():
    gates = routing([[9.0, 0], [0, 1]], [9.0, 1])
    assert gates.mean.tolist() == [0.9, 0.1]
    assert gates.information(["a", "b"]) == pytest.approx(math.log(2))


def test_head_similarity_is_the_cosine_of_b():
    B = np.array([[[1.0], [0]], [[3], [3]], [[0], [0]], [[-2], [0]]])
    found = head_similarity(B)
    assert found[:2, :2] == pytest.approx(np.array([[1, 0.5**0.5], [0.5**0.5, 1]]))
    assert found[0, 3] == -1
    assert np.isnan(found[2]).all()


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory) -> Run:
    """Train HydraLoRA for five steps on reviews of two domains, recording gate weights every second step."""
    model = models.load(bert, task=task)
    return ls.train(
        model, task, HydraLoRA(gates_every=2), out=tmp_path_factory.mktemp("runs") / "run",
        observe=[observe.norms(every=1)], **FAST,
    )  # fmt: skip


def restored(run: Run, bert: str, task) -> nn.Module:
    model = models.load(bert, task=task)
    run.restore(model)
    return model


def test_run_records_gates_at_the_expected_steps(run, bert, task):
    table = run.table
    gate = table[table["quantity"] == "gate"]
    assert sorted(gate["step"].unique()) == [0, 2, 4, 5]
    assert set(gate["index"]) == {0, 1, 2}
    assert gate.groupby(["step", "module"], observed=True)["value"].sum().to_numpy() == near(1, terms=3, depth=2)
    assert gate["module"].nunique() == 4
    for quantity in ("gate_entropy", "gate_information", "gate_chance"):
        assert sorted(table.loc[table["quantity"] == quantity, "step"].unique()) == [0, 2, 4, 5]
    assert (table.loc[table["quantity"] == "gate_information", "value"] > 0).all()
    model = restored(run, bert, task)
    for name, delta in attached_deltas(model).items():
        last = gate[(gate["module"] == name) & (gate["step"] == 5)].sort_values("index")["value"]
        assert delta.mean_gates_.numpy() == near(last.to_numpy(), terms=TINY, growth=TEXT)


def test_gate_rows_sets_the_number_of_recorded_rows(bert, task, tmp_path):
    model = models.load(bert, task=task)
    table = ls.train(model, task, HydraLoRA(gate_rows=3), out=tmp_path / "run", **FAST).table
    last = table[(table["quantity"] == "gate") & (table["step"] == 5)].set_index(["module", "index"])
    found = ls.mean_gates(model, task.split("validation").head(3)["text"].tolist())
    assert set(found) == set(attached_deltas(model)) == set(last.index.get_level_values("module"))
    for name, gates in found.items():
        assert gates == near(last.loc[name, "value"].sort_index().to_numpy(), terms=TINY, growth=TEXT)


def test_gates_of_a_run_match_the_held_out_text(run, bert, task):
    model = restored(run, bert, task)
    rows = task.encode(models.tokenizer(model), task.split("validation").head(16))
    batch = rows.batch(range(16))
    name = "bert.encoder.layer.1.output.dense"
    tokens = by_hand(model, name, batch, batch["attention_mask"].bool())
    film = np.array([gates for row, group in zip(tokens, rows.groups, strict=True) for gates in row if group == "film"])
    found = run.snapshot(f"{name}/gate_by_domain", 5)
    assert found.columns.tolist() == ["domain", "head", "step", "value"]
    assert found.loc[found["domain"] == "film", "value"].to_numpy() == near(film.mean(0), terms=TINY, growth=TEXT)
    assert run.snapshot_steps(f"{name}/gate_by_domain") == run.snapshot_steps(f"{name}/head_similarity") == [0, 5]
    heads = attached_deltas(model)[name].B.detach().unflatten(1, (3, 4)).transpose(0, 1).flatten(1)
    cosine = nn.functional.cosine_similarity(heads[0], heads[2], 0).item()
    similarity = run.snapshot(f"{name}/head_similarity", 5).set_index(["head", "other_head"])["value"]
    assert similarity[0, 2] == near(cosine, 1, terms=4 * 32)
    assert run.snapshot(f"{name}/head_similarity", 0)["value"].isna().all()


def test_norms_and_ranks_use_the_update_at_mean_gates(run, bert, task):
    model = restored(run, bert, task)
    stored, summary = run.updates(), run.summary().set_index("module")
    at_end = run.table[run.table["step"] == 5].set_index(["quantity", "module"])["value"]
    assert run.ranks() == {name: 4 for name in attached_deltas(model)}
    for name, delta in attached_deltas(model).items():
        update = delta.update()
        assert np.array_equal(stored[name].dense(), update.dense())
        assert stored[name].exact is update.exact is False
        assert not summary.loc[name, "exact"]
        assert summary.loc[name, "update_norm"] == near(update.norm(), terms=TINY)
        assert at_end["effective_rank", name] == near(effective_rank(update.singular_values()), terms=TINY)
        squares = sum(float(p.detach().double().square().sum()) for p in delta.parameters())
        assert at_end["adapter_norm", name] == near(squares**0.5, terms=TINY)


def test_best_state_stores_the_gates_of_its_records(run):
    summary = run.summary(state="best").dropna(subset="rank").set_index("module")
    updates = run.updates(state="best")
    assert set(updates) == set(summary.index)
    for name, update in updates.items():
        assert summary.loc[name, "update_norm"] == near(update.norm(), terms=TINY)


def test_restored_run_of_separate_factors_gives_the_same_logits(bert, task, tmp_path):
    model = models.load(bert, task=task)
    method = HydraLoRA(shared_a=False, router="uniform")
    found = ls.train(model, task, method, out=tmp_path / "run", **FAST)
    again = restored(found, bert, task)
    batch = inputs(again)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    for name, delta in attached_deltas(model).items():
        assert torch.equal(attached_deltas(again)[name].mean_gates_, delta.mean_gates_)


def test_gpt2_trains_under_bfloat16_autocast(gpt2, task, tmp_path):
    model = models.load(gpt2, task=task)
    found = ls.train(model, task, HydraLoRA(targets="all-linear"), out=tmp_path / "run", precision="bf16", **FAST)
    entropy = found.table[found.table["quantity"] == "gate_entropy"]
    assert entropy["module"].nunique() == 8
    assert entropy["value"].between(0, math.log(3) + 1e-6).all()
    assert all(update.norm() > 0 for update in found.updates().values())


def test_inspection_counts_experts_and_routers(run, bert, task):
    model = models.load(bert, task=task)
    run.restore(model)
    counted = {name: sum(p.numel() for p in one.parameters()) for name, one in attached_deltas(model).items()}
    modules = inspection.inspect(run).modules.set_index("module")
    assert modules.loc[list(counted), "parameters"].to_dict() == counted
    assert not modules.loc[list(counted), "exact"].any()


def test_captions_of_updates_mention_mean_gates(run, bert, task, tmp_path):
    note = "at mean gates"
    assert note in plots.update_norm(run).caption
    assert note in plots.spectrum(run).caption
    plain = ls.train(models.load(bert, task=task), task, LoRA(), out=tmp_path / "plain", **FAST)
    assert note not in plots.update_norm(plain).caption
    assert note in plots.update_norm({"hydra": run, "plain": plain}).caption


# -- the number of heads ----------------------------------------------------------------------------------------------

TOPICS = ("law court judge appeal verdict", "cell gene protein enzyme blood", "guitar drum melody chorus piano")


def corpus(kinds: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(TOPICS[number % kinds].split(), 4)) for number in range(40 * kinds)]


def test_three_vocabularies_give_three_experts():
    found = cluster_selection(corpus(3))
    assert found["k"].tolist() == list(range(1, 11))
    assert choose_num_experts(corpus(3)) == 3
    assert ls.choose_num_experts(corpus(2)) == 2
    assert found.loc[found["chosen"], "k"].tolist() == [3]
    assert found["sse"].is_monotonic_decreasing


def test_error_is_the_squared_distance_to_the_centers():
    """For one cluster the error is n - |sum of the unit vectors|^2 / n."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = corpus(3)
    vectors = TfidfVectorizer().fit_transform(texts).toarray()
    assert cluster_selection(texts, most=3)["sse"][0] == pytest.approx(120 - np.square(vectors.sum(0)).sum() / 120)


def test_chord_distance_matches_worked_numbers():
    assert chord_distance(np.array([4.0, 1, 0.5, 0])) == pytest.approx(
        np.array([0, (1 - 1 / 3 - 1 / 4), (1 - 2 / 3 - 1 / 8), 0]) / 2**0.5
    )
    assert chord_distance(np.array([1.0, 1])).tolist() == [0, 0]


def test_ends_of_the_curve_are_not_selected_and_most_below_3_raises():
    """Both ends are on the chord, so only the middle of a curve over 1, 2 and 3 can be selected."""
    assert cluster_selection(corpus(3), most=4).query("chosen")["k"].tolist() == [3]
    assert choose_num_experts(corpus(3), most=3) == 2
    for choose in (choose_num_experts, cluster_selection, repeated_selection):
        with pytest.raises(ValueError, match=r"^most.*3.*got 2$"):
            choose(corpus(2), most=2)


def test_few_distinct_texts_give_few_clusters():
    assert cluster_selection(["one apple", "two pears"] * 5)["k"].tolist() == [1, 2]
    assert choose_num_experts(["the same words"] * 5) == 1


def test_norm_from_small_gram_matrices_matches_the_dense_norm():
    """|B A|^2 = tr((B^T B)(A A^T)), as for any product."""
    host = double()
    update = host.delta.update()
    gram = np.trace((update.B.T @ update.B) @ (update.A @ update.A.T))
    assert update.norm() ** 2 == pytest.approx(update.scale**2 * gram, rel=1e-10)
    assert update.norm() == pytest.approx(np.linalg.norm(update.dense()), rel=1e-10)
