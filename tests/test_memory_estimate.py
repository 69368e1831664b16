"""Computed memory, compared with the published tables of LISA and Adapprox and with live optimizers."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import pytest
import torch
from tiny import tiny

from lorascope.analysis import memory_estimate as acc
from lorascope.methods import Full
from lorascope.methods.optimizers.adapprox import AdapproxOptimizer
from lorascope.schema.module_table import describe, match

MIB = 2**20
SMALL, MEDIUM = acc.gpt2(12, 768), acc.gpt2(24, 1024)
TINYLLAMA = acc.llama(22, 2048, 5632, 256)


@pytest.mark.parametrize(
    ("shapes", "block", "outside", "total"),
    [
        (acc.LLAMA2["70B"], 855_654_400, {"model.embed_tokens": 262_144_000, "lm_head": 262_144_000}, 68_976_648_192),
        (acc.LLAMA2["7B"], 202_383_360, {"model.embed_tokens": 131_072_000, "lm_head": 131_072_000}, 6_738_415_616),
        (TINYLLAMA, 44_044_288, {"model.embed_tokens": 65_536_000, "lm_head": 65_536_000}, 1_100_048_384),
        (SMALL, 7_087_872, {"transformer.wte": 38_597_376, "transformer.wpe": 786_432}, 124_439_808),
        (MEDIUM, None, {}, 354_823_168),
    ],
)
def test_shapes_have_the_published_parameter_counts(shapes, block, outside, total):
    assert acc.count_parameters(shapes) == total
    for name, count in outside.items():
        assert math.prod(shapes[f"{name}.weight"]) == count
    if block:
        assert {acc.count_parameters(tensors) for tensors in acc.shapes_by_block(shapes).values()} == {block}


@pytest.mark.parametrize(
    ("shapes", "active", "millions", "share"),
    [
        (acc.LLAMA2["7B"], 0, 262.15, 3.89),
        (acc.LLAMA2["7B"], 2, 666.91, 9.90),
        (acc.LLAMA2["7B"], 4, 1071.68, 15.90),
        (acc.LLAMA2["7B"], 8, 1881.21, 27.92),
        (TINYLLAMA, 0, 131.07, None),
        (TINYLLAMA, 2, 219.16, None),
        (SMALL, 0, 39.39, None),
        (SMALL, 2, 53.56, None),
    ],
)
def test_lisa_trains_the_expected_fraction(shapes, active, millions, share):
    memory = acc.lisa(shapes, active, width=2)
    trained = memory.gradients / 2
    assert round(trained / 1e6, 2) == millions
    assert share is None or round(100 * trained / acc.count_parameters(shapes), 2) == share
    assert memory.parameters == 2 * acc.count_parameters(shapes)
    drawn = list(acc.shapes_by_block(shapes).values())
    tensors = len(shapes) - sum(map(len, drawn)) + sum(map(len, drawn[:active]))
    assert memory.optimizer == 8 * trained + 4 * tensors  # two moments per parameter, one step count per tensor


def test_lisa_policies_match_a_toy_model():
    """The model has four blocks of 88 parameters and 192 outside; one block is active, three have been drawn."""
    shapes = {"embed.weight": (8, 12), "head.weight": (8, 12)} | {f"h.{i}.up.weight": (8, 11) for i in range(4)}
    assert acc.count_parameters(shapes) == 544
    moments = {
        policy: (acc.lisa(shapes, 1, policy, visited=3).optimizer - 4 * tensors) / 8
        for policy, tensors in {"reset": 3, "reset_all": 3, "keep": 5}.items()
    }
    assert moments == {"reset": 280, "reset_all": 280, "keep": 456}
    assert acc.lisa(shapes, 1, "keep").optimizer == acc.full(shapes).optimizer  # by default all blocks count as drawn
    assert acc.lisa(shapes, 4) == acc.full(shapes)
    with pytest.raises(ValueError, match=r"policy.*'keep', 'reset', 'reset_all'.*got 'drop'"):
        acc.lisa(shapes, 1, "drop")
    with pytest.raises(ValueError, match=r"active.*0 to 4.*got 5"):
        acc.lisa(shapes, 5, "keep")
    for visited in (1, 5):
        with pytest.raises(ValueError, match=f"visited.* 2 .*to 4 .*got {visited}"):
            acc.lisa(shapes, 2, "keep", visited=visited)


def test_lisa_by_default_trains_two_blocks_or_the_only_one():
    """The default is the same as that of the method."""
    one = acc.gpt2(1, 768)
    assert acc.lisa(one) == acc.lisa(one, 1) == acc.full(one)
    assert acc.lisa(SMALL) == acc.lisa(SMALL, 2)
    cells = acc.compare_methods(one).set_index(["method", "part"])["bytes"]
    assert cells["LISA, 1 block", "optimizer"] == acc.full(one).optimizer
    with pytest.raises(ValueError, match=r"active.*0 to 1.*got 2"):
        acc.compare_methods(one, active=2)


@pytest.mark.parametrize(("intervals", "blocks"), [(1, 2), (5, 8.8), (10, 15.2), (50, 30.7)])
def test_expected_number_of_visited_blocks_matches_the_formula(intervals, blocks):
    assert round(acc.expect_visited_blocks(32, 2, intervals), 1) == blocks


@pytest.mark.parametrize(
    ("shapes", "adamw", "first", "most", "first_alone", "most_alone", "adafactor", "came", "savings"),
    [
        (SMALL, 949.4, 475.9, 621.8, 1.2, 147.1, 475.9, 476.7, (49.87, 34.50, 99.87, 84.50)),
        (MEDIUM, 2707.1, 1356.5, 1790.8, 2.9, 437.3, 1356.5, 1358.2, (49.89, 33.85, 99.89, 83.85)),
    ],
)
def test_optimizers_match_the_published_table_of_adapprox(
    shapes, adamw, first, most, first_alone, most_alone, adafactor, came, savings
):
    def mib(memory):
        return round(memory.optimizer / MIB, 1)

    def savings_percent(memory):
        return round(100 * (1 - memory.optimizer / acc.full(shapes).optimizer), 2)

    columns = [acc.adapprox(shapes, rank, first=moment) for moment in (True, False) for rank in (1, None)]
    assert mib(acc.full(shapes)) == adamw
    assert [mib(memory) for memory in columns] == [first, most, first_alone, most_alone]
    assert tuple(savings_percent(memory) for memory in columns) == savings
    assert (mib(acc.adafactor(shapes)), mib(acc.came(shapes))) == (adafactor, came)
    assert acc.adafactor(shapes, first=False).optimizer == acc.adapprox(shapes, 1, first=False).optimizer
    table = acc.compare_optimizers(shapes)
    state = table[table["part"] == "optimizer"].set_index("method")["bytes"] / MIB
    assert state.round(1).to_dict() == {
        "AdamW": adamw, "Adapprox, rank 1": first, "Adapprox, largest rank": most, "Adafactor": adafactor, "CAME": came,
        "Adapprox, rank 1, β₁ = 0": first_alone, "Adapprox, largest rank, β₁ = 0": most_alone,
        "Adafactor, β₁ = 0": first_alone,
    }  # fmt: skip


def test_adapprox_accepts_a_rank_per_module_and_does_not_factor_small_matrices():
    shapes = {"a.weight": (100, 80), "b.weight": (100, 80), "score.weight": (2, 100), "score.bias": (2,)}
    dense = 200 + 2
    assert acc.adapprox(shapes, {"a.weight": 3, "b.weight": 5}, first=False).optimizer == 4 * (8 * 180 + dense)
    assert acc.adapprox(shapes, None, first=False).optimizer == 4 * (2 * 20 * 180 + dense)
    assert acc.adapprox(shapes, 1, first=False, min_dim=0).optimizer == 4 * (2 * 180 + 102 + 2)
    assert acc.adapprox({"a.weight": (64, 64)}, 100, first=False).optimizer == 32_768
    assert acc.adapprox({"a.weight": (64, 64)}, {"a.weight": 100}, first=False).optimizer == 32_768


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_full_matches_a_live_adamw(family):
    model = tiny(family)
    shapes = acc.shapes_of(model)
    computed = acc.full(shapes)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    assert computed.parameters == computed.gradients == sum(p.nbytes for p in parameters)
    assert computed.optimizer == sum(t.nbytes for state in optimizer.state.values() for t in state.values())


ODD = {"kernel": (12, 3, 4, 4), "places": (1, 9, 12), "matrix": (8, 6), "row": (7,), "scale": ()}


@pytest.mark.parametrize(("computed", "made"), [
    (acc.adafactor, lambda p: Full(optimizer_name="adafactor").optimizer(p, 1e-3, 1e-3, 0.0)),
    (acc.came, lambda p: Full(optimizer_name="came").optimizer(p, 1e-3, 1e-3, 0.0)),
    (partial(acc.adapprox, min_dim=1), lambda p: AdapproxOptimizer(p.parameters(), min_dim=1, rank_rule="fixed")),
    (
        partial(acc.adapprox, rank=100, first=False, min_dim=1),
        lambda p: AdapproxOptimizer(p.parameters(), betas=(0, 0.9), min_dim=1, rank_rule="fixed", init_rank=100),
    ),
    (partial(acc.adapprox, min_dim=None), lambda p: AdapproxOptimizer(p.parameters(), min_dim=None)),
], ids=["adafactor", "came", "adapprox", "adapprox, more than there is", "adapprox, dense"])  # fmt: skip
def test_factored_memory_matches_live_optimizers(computed, made):
    """The shapes are a convolution kernel, the positions of an image model, a matrix, a vector and a scalar."""
    model = torch.nn.ParameterDict({name: torch.ones(shape) for name, shape in ODD.items()})
    optimizer = made(model)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    keys = {"exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "Q", "U"}
    live = sum(state[key].nbytes for state in optimizer.state.values() for key in keys & state.keys())
    assert computed(ODD).optimizer == live


def test_adapprox_saves_memory_by_size_as_documented():
    """The numbers are KiB of a square matrix: dense, with factors of the largest rank, and with factors of rank 1."""
    for side, dense, most, one in ((64, 16, 8, 0.5), (256, 256, 128, 2)):
        shapes = {"h.0.q.weight": (side, side)}
        sizes = [acc.adapprox(shapes, k, first=False, min_dim=m).optimizer for k, m in ((1, 999), (None, 64), (1, 64))]
        assert [size / 1024 for size in sizes] == [dense, most, one]
    long = {"h.0.q.weight": (64, 64_000)}
    assert 0.25 < acc.adapprox(long, None, first=False).optimizer / (4 * 64 * 64_000) < 0.26


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_blocks_match_the_live_model(family):
    model = tiny(family)
    found = acc.shapes_by_block(acc.shapes_of(model))
    rows = describe(model).query("role == 'block'")
    live = defaultdict(int)
    for name, parameter in model.named_parameters():
        live[next((block for block in rows["module"] if name.startswith(f"{block}.")), "")] += parameter.numel()
    live.pop("")
    assert sorted(acc.count_parameters(tensors) for tensors in found.values()) == sorted(live.values())


@pytest.mark.parametrize("targets", ["all-linear", ("q", "v"), ("q", "k", "embed", "head")])
def test_lora_adapts_the_targets_only(targets):
    model = tiny("llama")
    modules = {name: model.get_submodule(name).weight for name in match(describe(model), targets)}
    computed = acc.lora(acc.shapes_of(model), 4, targets)
    trained = 4 * sum(4 * sum(weight.shape) for weight in modules.values())
    assert computed.gradients == trained
    assert computed.parameters == sum(p.nbytes for p in model.parameters()) + trained
    assert computed.optimizer == 2 * trained + 4 * 2 * len(modules)


def test_lora_counts_parameters_trained_without_an_adapter():
    shapes = {"h.0.q.weight": (8, 8), "score.weight": (2, 8), "score.bias": (2,)}
    computed = acc.lora(shapes, 1, ("q",), beside=("score.weight", "score.bias"))
    assert computed == acc.MemoryUse(4 * (82 + 16), 4 * (16 + 18), 8 * (16 + 18) + 4 * 4)


def test_table_adapts_a_tied_head_once():
    """The models are GPT-2, whose head is tied, and one without a head."""
    table = acc.compare_methods(SMALL, rank=1).set_index(["method", "part"])["bytes"]
    linear = 12 * 768 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    assert table["LoRA, rank 1", "gradients"] == 4 * (linear + 50_257 + 768)
    assert len(acc.compare_methods({"h.0.q.weight": (8, 8), "h.1.q.weight": (8, 8)})) == 3 * 7


def test_table_of_llama_matches_the_functions():
    table = acc.compare_methods(acc.LLAMA2["7B"], width=2)
    cells = table.set_index(["method", "part"])["bytes"]
    assert cells["AdamW", "parameters"] == 2 * 6_738_415_616
    assert cells["LISA, 2 blocks", "optimizer"] == acc.lisa(acc.LLAMA2["7B"], 2, width=2).optimizer
    assert set(table["source"]) == {"computed"}
    assert set(table["part"]) == {"parameters", "gradients", "optimizer"}  # activations are not computed
