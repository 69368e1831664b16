"""Test Adapprox: a worked step, full rank against a dense average, numerical guards, saving and resuming."""

from __future__ import annotations

import copy
import math

import killing
import numpy as np
import pytest
import torch
from tiny import tiny
from tolerance import rounding

import lorascope as ls
from lorascope.inputs import models
from lorascope.methods import Adapprox
from lorascope.methods.adapprox import AdapproxOptimizer
from lorascope.methods.method import Step, config, from_config
from lorascope.methods.optimizers import adapprox, subspace_iteration
from lorascope.runs.layout import identify


def parameter(*shape, seed=0, dtype=torch.float32):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def stepped(optimizer, parameters, steps=1, seed=0, scale=1.0):
    """Take steps with gradients drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        optimizer.step()


RATE = 1e-2


def regression(steps, dtype, clip=1.0, **options):
    """Train a tanh layer of 24 x 16 to match another."""
    draw = torch.Generator().manual_seed(0)
    W, truth = (torch.randn(24, 16, generator=draw, dtype=dtype) * 0.3 for _ in range(2))
    x = torch.randn(64, 16, generator=draw, dtype=dtype)
    W = torch.nn.Parameter(W)
    optimizer = AdapproxOptimizer([W], RATE, clip_threshold=clip, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        ((torch.tanh(x @ W.T) - torch.tanh(x @ truth.T)) ** 2).mean().backward()
        optimizer.step()
    return W.detach()


class Watched(AdapproxOptimizer):
    """Optimizer that stores V before it is factored."""

    def _factorize(self, V, state, group):
        self.V = V.clone()
        super()._factorize(V, state, group)


def worked(min_dim, **options):
    W = torch.nn.Parameter(torch.tensor([[1, -1], [0.5, 2]], dtype=torch.float64))
    optimizer = Watched(
        [W], 0.01, weight_decay=0.1, rank_rule="fixed", iterations=30, min_dim=min_dim, betas=(0.9, 0.999), **options
    )
    seen = []
    for gradient in ([[0.1, -0.2], [0.3, 0.4]], [[0.2, -0.1], [0.1, -0.3]]):
        W.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        seen.append((W.detach().clone(), copy.deepcopy(optimizer.state[W]) | {"V": getattr(optimizer, "V", None)}))
    return seen


def test_step_matches_the_worked_example():
    (W1, first), (W2, second) = worked(min_dim=1)
    assert W1.flatten().tolist() == pytest.approx([0.998, -0.998, 0.4985, 1.997], abs=1e-6)
    R = first["Q"] @ first["U"].T
    assert (1e5 * R).flatten().tolist() == pytest.approx([1.913004, 3.501139, 8.801560, 16.108427], abs=1e-5)
    assert first["error"] == pytest.approx(0.0565879, abs=1e-6)
    assert (1e5 * first["V"]).flatten().tolist() == pytest.approx([1, 4, 9, 16], abs=1e-9)
    assert (1e5 * second["V"]).flatten().tolist() == pytest.approx([5.911091, 4.497638, 9.792759, 25.092318], abs=1e-5)
    assert float(second["rms"]) == pytest.approx(18.437880, abs=1e-4)
    D = (second["exp_avg"] - 0.9 * first["exp_avg"]) / 0.1
    assert D.flatten().tolist() == pytest.approx([1.410862, -0.808716, 0.548070, -1.027164], abs=1e-5)
    assert second["exp_avg"].flatten().tolist() == pytest.approx([0.231086, -0.170872, 0.144807, -0.012716], abs=1e-5)
    assert W2.flatten().tolist() == pytest.approx([0.994691, -0.995293, 0.496553, 1.995130], abs=1e-6)


def test_step_without_factors_matches_the_worked_example():
    (_, first), (W2, second) = worked(min_dim=None)
    assert (1e5 * first["exp_avg_sq"]).flatten().tolist() == pytest.approx([1, 4, 9, 16], abs=1e-9)
    assert W2.flatten().tolist() == pytest.approx([0.994622, -0.995362, 0.496578, 1.995096], abs=1e-6)
    assert "Q" not in second


def test_cosine_is_recorded_without_guidance():
    """D and M are parallel at the first step; at the second they are the worked ones."""
    (_, first), (_, second) = worked(min_dim=1)  # the second step selects no rank
    D = torch.tensor([1.410862, -0.808716, 0.548070, -1.027164])
    M = torch.tensor([0.231086, -0.170872, 0.144807, -0.012716])
    assert float(first["cosine"]) == pytest.approx(1)
    assert float(second["cosine"]) == pytest.approx(float(D @ M / (D.norm() * M.norm())), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"betas": (0.0, 0.999)}, {"cosine": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_full_rank_equals_a_dense_average(dtype, options):
    """In float32 the median difference is below a tenth of a step.

    Entries of V far below the largest have no digits in float32 factors, and clipping spreads their error.
    """
    full = regression(20, dtype, rank_rule="fixed", init_rank=16, min_dim=1, **options)
    dense = regression(20, dtype, min_dim=None, **options)
    less = regression(20, dtype, rank_rule="fixed", init_rank=4, min_dim=1, **options)
    if dtype == torch.float64:
        assert float((full - dense).abs().max()) < 1e-11
    assert float((full - dense).abs().median()) < 0.1 * RATE
    assert float((less - dense).abs().median()) > RATE


def test_step_without_clipping_and_first_moment_equals_adam_without_bias_correction():
    p, q = parameter(12, 8, dtype=torch.float64), parameter(12, 8, dtype=torch.float64)
    optimizer = AdapproxOptimizer(
        [p],
        1e-3,
        betas=(0.0, 0.9),
        clip_threshold=math.inf,
        weight_decay=0.3,
        rank_rule="fixed",
        init_rank=8,
        min_dim=1,
    )
    stepped(optimizer, [p], 5)
    V = torch.zeros_like(q)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(5):
            g = torch.randn(12, 8, generator=generator).double()
            V = 0.9 * V + 0.1 * g**2
            q -= 1e-3 * (g / (V.sqrt() + 1e-8) + 0.3 * q)
    assert torch.allclose(p, q, atol=1e-9, rtol=0)


def test_denominator_selects_the_divisor_of_the_step():
    """The step divides by V before factoring ("pre") or by the product of the factors ("post")."""
    for denominator, expected in (("pre", "V"), ("post", "product")):
        p = parameter(16, 12, dtype=torch.float64)
        before = p.detach().clone()
        optimizer = AdapproxOptimizer(
            [p], 1.0, betas=(0, 0.999), clip_threshold=math.inf, weight_decay=0, min_dim=1, rank_rule="fixed",
            init_rank=2, denominator=denominator,
        )  # fmt: skip
        stepped(optimizer, [p])
        state = optimizer.state[p]
        products = {"V": 0.001 * p.grad**2, "product": (state["Q"] @ state["U"].T).clamp(min=0)}
        assert torch.allclose(before - p, p.grad / (products[expected].sqrt() + 1e-8), rtol=1e-9)


def test_rank_bytes_and_rms_stay_within_bounds():
    p, bias = parameter(96, 80), parameter(80, seed=1)
    optimizer = AdapproxOptimizer([p, bias], 1e-3, max_rank=7, reselect_every=4, clip_threshold=0.5, growth_scale=None)
    seen = []
    for step in range(1, 10):
        before = p.detach().clone()
        stepped(optimizer, [p, bias], seed=step)
        state = optimizer.state[p]
        rank = state["Q"].shape[1]
        seen.append(rank)
        assert 1 <= rank <= 7
        assert state["Q"].nbytes + state["U"].nbytes == 4 * rank * (96 + 80)
        assert float(state["rms"]) <= 1 / math.sqrt(0.001) + 1e-3
        assert state["trials"] >= 1
        change = (before - p.detach()) / 1e-3 - 0.1 * before
        assert float(change.square().mean().sqrt()) <= 0.5 + 1e-3
    assert seen[0] == seen[1] == seen[2] == seen[3]
    assert seen[4] == seen[5] == seen[6] == seen[7]
    assert "exp_avg_sq" in optimizer.state[bias]
    assert "Q" not in optimizer.state[bias]


@pytest.mark.parametrize("min_dim", [1, None])
def test_direction_entries_stay_within_their_bound(min_dim):
    """Every entry of V is at least (1 - beta_2) G^2, with equality at the first step."""
    p, bound = parameter(24, 20), 1 / math.sqrt(0.001)
    optimizer = AdapproxOptimizer(
        [p], 1.0, betas=(0, 0.999), clip_threshold=math.inf, weight_decay=0, min_dim=min_dim, rank_rule="fixed",
        init_rank=3,
    )  # fmt: skip
    for step in range(8):
        before = p.detach().clone()
        stepped(optimizer, [p], seed=step, scale=10.0 ** (step % 3))
        largest = float((before - p.detach()).abs().max())
        assert largest <= bound * (1 + 1e-4)
        assert step or largest == pytest.approx(bound, rel=1e-4)


def test_batched_parameters_equal_separate_updates():
    shapes, options = [(5,), (3, 4), (1,), (6, 2, 2)], {"clip_threshold": 0.5, "cosine": True, "min_dim": None}
    together, alone = ([parameter(*shape, seed=n) for n, shape in enumerate(shapes)] for _ in range(2))
    stepped(AdapproxOptimizer(together, 1e-2, **options), together, 4)
    optimizers = [AdapproxOptimizer([p], 1e-2, **options) for p in alone]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, optimizer in zip(alone, optimizers, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)


def test_matrix_is_factored_once_per_step_between_selections(monkeypatch):
    calls, once = [], subspace_iteration.s_rsi
    monkeypatch.setattr(
        subspace_iteration, "s_rsi", lambda A, rank, *given: calls.append(rank) or once(A, rank, *given)
    )
    p = parameter(80, 70)
    optimizer = AdapproxOptimizer([p], reselect_every=5, growth=(0, 0, 0, 3), tolerance=1e-6, max_rank=8)
    stepped(optimizer, [p], 6)
    assert calls == [1, 4, 7, 8, 8, 8, 8, 8, 1, 4, 7, 8]
    assert optimizer.state[p]["trials"] == 4


def test_selection_time_is_stored_until_the_next_selection(monkeypatch):
    """The clock advances by 1 at every reading and at every factorization."""
    now, once = [0.0], subspace_iteration.s_rsi

    def tick(*_):
        now[0] += 1
        return now[0]

    monkeypatch.setattr(adapprox.time, "perf_counter", tick)
    monkeypatch.setattr(subspace_iteration, "s_rsi", lambda A, rank, *given: (tick(), once(A, rank, *given))[1])
    p = parameter(80, 70)
    optimizer = AdapproxOptimizer([p], reselect_every=3, growth=(0, 0, 0, 3), tolerance=1e-6, max_rank=8)
    for seed, trials in enumerate((4, 4, 4, 4)):
        stepped(optimizer, [p], seed=seed)
        assert optimizer.state[p]["seconds"] == 1 + trials
    optimizer.param_groups[0]["max_rank"] = 4
    stepped(optimizer, [p], 2)
    assert optimizer.state[p]["seconds"] == 5  # no selection since
    stepped(optimizer, [p])
    assert optimizer.state[p]["seconds"] == 3


def test_negative_entries_are_recorded_and_set_to_zero():
    p = parameter(64, 64)
    optimizer = AdapproxOptimizer([p], rank_rule="fixed", init_rank=6, min_dim=1, reselect_every=1)
    stepped(optimizer, [p], 3)
    product = optimizer.state[p]["Q"] @ optimizer.state[p]["U"].T
    stepped(optimizer, [p])
    found = optimizer.state[p]["negative"], optimizer.state[p]["negative_mass"]
    expected = (product < 0).float().mean(), -product[product < 0].sum() / product.abs().sum()
    assert found == pytest.approx(tuple(map(float, expected)), rel=rounding(terms=64 * 64))
    assert 0 < found[1] < found[0] < 0.5
    assert torch.isfinite(p).all()


def test_zero_gradient_only_decays_and_delays_the_selection():
    p = parameter(70, 66)
    before = p.detach().clone()
    optimizer = AdapproxOptimizer([p], 0.1, weight_decay=0.5, reselect_every=10)
    stepped(optimizer, [p], 3, scale=0.0)
    assert torch.allclose(p, before * (1 - 0.05) ** 3, rtol=rounding(depth=3 * 2))
    assert "Q" not in optimizer.state[p]
    stepped(optimizer, [p])
    assert optimizer.state[p]["Q"].shape[1] == 16
    assert optimizer.state[p]["trials"] > 1
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("rule", ["restart", "colnorm"])
def test_second_moment_that_becomes_zero_keeps_its_rank(rule):
    """A zero matrix has no relative error; a positive random matrix has error 0.8 at rank 1."""
    p = parameter(72, 68)
    optimizer = AdapproxOptimizer([p], betas=(0.9, 0.0), reselect_every=1, rank_rule=rule, tolerance=0.9)
    stepped(optimizer, [p])
    state = optimizer.state[p]
    error = state["error"]
    assert (state["Q"].shape[1], "chosen" in state) == (1, True)
    stepped(optimizer, [p], scale=0.0)
    assert (state["Q"].shape[1], "chosen" in state) == (1, False)
    assert not state["U"].any()
    assert state["error"] == error
    stepped(optimizer, [p], seed=1)
    assert (state["Q"].shape[1], "chosen" in state) == (1, True)
    assert (state["negative"], state["negative_mass"]) == (0, 0)
    assert torch.isfinite(p).all()


def test_factors_do_not_depend_on_the_gradient_scale():
    p, q = parameter(72, 68), parameter(72, 68)
    for weight, scale in ((p, 1.0), (q, 2.0**-40)):
        optimizer = AdapproxOptimizer([weight], eps=0.0, weight_decay=0.0, rank_rule="fixed", init_rank=5)
        stepped(optimizer, [weight], 3, scale=scale)
    assert torch.equal(p, q)


def test_guidance_of_parallel_directions_divides_by_the_floor():
    p = parameter(70, 70)
    before = p.detach().clone()
    optimizer = AdapproxOptimizer([p], 1e-3, cosine=True, cosine_floor=0.2, weight_decay=0.0)
    stepped(optimizer, [p])
    direction = p.grad.sign() * (p.grad != 0)
    assert torch.allclose((before - p) / 1e-3, 0.1 * direction / 0.2, atol=1e-2)


def test_guidance_divides_by_one_minus_the_cosine():
    p = parameter(9, dtype=torch.float64)
    optimizer = AdapproxOptimizer([p], 1.0, cosine=True, cosine_floor=1e-3, weight_decay=0.0)
    stepped(optimizer, [p], 3)
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state[p])
    stepped(optimizer, [p], seed=9)
    V = 0.999 * state["exp_avg_sq"] + 0.001 * p.grad**2
    D = p.grad / (V.sqrt() + 1e-8)
    D = D / max(1.0, float(D.square().mean().sqrt()))
    M = 0.9 * state["exp_avg"] + 0.1 * D
    expected = M / (1 - float(D @ M / (D.norm() * M.norm())))
    assert torch.allclose(before - p.detach(), expected, rtol=1e-6)


def test_groups_with_different_settings_and_a_closure():
    p, q, r = parameter(70, 70), parameter(70, 70, seed=1), parameter(3, 3, seed=2)
    groups = [{"params": [p], "max_rank": 3}, {"params": [q], "min_dim": None, "lr": 0.0}, {"params": [r]}]
    optimizer = AdapproxOptimizer(groups, 1e-2, rank_rule="colnorm", tolerance=0)
    still = q.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum() + (q**2).sum() + (r**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert optimizer.state[p]["Q"].shape[1] == 3
    assert "exp_avg_sq" in optimizer.state[q]
    assert "exp_avg_sq" in optimizer.state[r]
    assert torch.equal(q, still)


def test_convolutions_are_matrices_and_frozen_weights_have_no_state():
    kernel, frozen = parameter(64, 8, 3, 3), parameter(64, 64)
    optimizer = AdapproxOptimizer([kernel, frozen])
    stepped(optimizer, [kernel])
    assert optimizer.state[kernel]["Q"].shape[0] == 64
    assert optimizer.state[kernel]["U"].shape[0] == 72
    assert frozen not in optimizer.state


def test_global_generator_is_unchanged_and_seed_sets_the_sketches():
    p = parameter(70, 70)
    optimizer = AdapproxOptimizer([p])
    before = torch.get_rng_state()
    stepped(optimizer, [p])
    assert torch.equal(torch.get_rng_state(), before)
    ends = []
    for seed in (1, 1, 2):
        q = parameter(70, 70)
        stepped(AdapproxOptimizer([q], seed=seed, rank_rule="fixed", init_rank=2, iterations=1), [q], 3)
        ends.append(q.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_optimizer_continues_bitwise(dtype):
    def fresh():
        weights = [parameter(80, 70, dtype=dtype), parameter(70, seed=1, dtype=dtype)]
        return weights, AdapproxOptimizer(weights, 1e-2, reselect_every=3, max_rank=9, growth_scale=None)

    weights, optimizer = fresh()
    stepped(optimizer, weights, 4)
    stored = copy.deepcopy(optimizer.state_dict())
    others, other = fresh()
    with torch.no_grad():
        for mine, theirs in zip(others, weights, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(stored)
    for mine, theirs in zip(others, weights, strict=True):
        assert other.state[mine].keys() == optimizer.state[theirs].keys()
        for key, value in optimizer.state[theirs].items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.state[mine][key].dtype == torch.float32
                assert torch.equal(value, other.state[mine][key])
    stepped(optimizer, weights, 4, seed=5)
    stepped(other, others, 4, seed=5)
    for mine, theirs in zip(others, weights, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.dtype == dtype


def test_loaded_optimizer_shares_no_state_with_its_source():
    """Both continue like an optimizer that was never saved."""

    def fresh():
        weights = [parameter(80, 70), parameter(70, seed=1)]
        return weights, AdapproxOptimizer(weights, 1e-2, rank_rule="fixed")

    (weights, optimizer), (others, other), (alone, single) = fresh(), fresh(), fresh()
    stepped(optimizer, weights, 2)
    stepped(single, alone, 2)
    with torch.no_grad():
        for mine, theirs in zip(others, weights, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(optimizer.state_dict())
    for moved, one in ((weights, optimizer), (others, other), (alone, single)):
        stepped(one, moved, 2, seed=5)
    for one, two, three in zip(weights, others, alone, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(two, three)


def test_state_of_another_optimizer_raises_one_line():
    p, q = parameter(70, 70), parameter(70, 70)
    optimizer, adam = AdapproxOptimizer([p]), torch.optim.AdamW([q])
    stepped(adam, [q])
    with pytest.raises(ValueError, match=r"no sketch generator.*AdapproxOptimizer") as raised:
        optimizer.load_state_dict(adam.state_dict())
    assert "\n" not in str(raised.value)
    stepped(optimizer, [p])


def test_sparse_gradient_raises_before_any_update():
    table, p = torch.nn.Embedding(70, 66, sparse=True), parameter(3)
    optimizer = AdapproxOptimizer([{"params": [p]}, {"params": [table.weight]}])
    before, p.grad = p.detach().clone(), torch.ones(3)
    table(torch.tensor([1, 5])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse gradient.*\(70, 66\).*sparse=False") as raised:
        optimizer.step()
    assert "\n" not in str(raised.value)
    assert torch.equal(p, before)
    assert not optimizer.state


class AcceleratorGenerator:
    """Generator with a state as long as an accelerator's."""

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)


def test_cpu_sketches_continue_on_an_accelerator_but_not_the_reverse():
    (p, q), ends = (parameter(80, 70) for _ in range(2)), []
    optimizer, other = (AdapproxOptimizer([weight], rank_rule="fixed", iterations=1) for weight in (p, q))
    stepped(optimizer, [p], 2)
    stored = copy.deepcopy(optimizer.state_dict())
    q.data.copy_(p.data)
    other.param_groups[0]["generator"] = AcceleratorGenerator()
    other.load_state_dict(stored)
    for weight, one in ((p, optimizer), (q, other)):
        stepped(one, [weight], 2, seed=1)
        ends.append(weight.detach())
    assert torch.equal(*ends)
    stored["param_groups"][0]["generator"] = AcceleratorGenerator().get_state()
    with pytest.raises(ValueError, match=r"CPU.*accelerator") as raised:
        optimizer.load_state_dict(stored)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lr": -1e-3}, "lr must be >= 0, got -0.001"),
        ({"oversampling": -1}, "oversampling must be >= 0, got -1"),
        ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"clip_threshold": 0}, "clip_threshold must be > 0, got 0"),
        ({"cosine_floor": 0}, "cosine_floor must be > 0, got 0"),
        ({"rank_rule": "grow"}, "rank_rule must be one of 'restart', .*, got 'grow'"),
        ({"denominator": "mid"}, "denominator must be one of .*, got 'mid'"),
        ({"sketch_multiple": 0}, "sketch_multiple must be >= 1, got 0"),
        ({"init_rank": 0}, "init_rank must be >= 1, got 0"),
        ({"betas": (0.9,)}, r"betas must be two .*, got \(0.9,\)"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas must be two .*, got \(0.9, 0.99, 0.999\)"),
        ({"growth": (200, -10, 2.5)}, r"growth must be four .*, got \(200, -10, 2.5\)"),
        ({"betas": (0.9, 1.0)}, r"betas must be .*, got \(0.9, 1.0\)"),
        ({"betas": (0.0, 0.9), "cosine": True}, r"betas\[0\] must be > 0 .*, got 0.0"),
    ],
)
def test_invalid_options_raise_one_line(options, line):
    with pytest.raises(ValueError, match=line) as raised:
        AdapproxOptimizer([parameter(2, 2)], **options)
    assert "\n" not in str(raised.value)
    optimizer = AdapproxOptimizer([parameter(2, 2)])
    with pytest.raises(ValueError, match=line):
        optimizer.add_param_group({"params": [parameter(3, 3)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"iterations": 0}, "^iterations must be >= 1, got 0$"),
        ({"eps": -1e-8}, "^eps must be >= 0, got -1e-08$"),
        ({"cosine_floor": 0.0}, "^cosine_floor must be > 0, got 0.0$"),
        ({"growth": (200.0, -10.0)}, r"^growth must be four .*, got \(200.0, -10.0\)$"),
        ({"betas": (0.0, 0.9), "cosine": True}, r"^betas\[0\] must be > 0 .*, got 0.0$"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_method_rejects_the_options_that_its_optimizer_rejects(fields, line):
    with pytest.raises(ValueError, match=line):
        Adapprox(**fields)


# -- the method ----------------------------------------------------------------------------------------------------

METHOD = Adapprox(lr=1e-2, min_dim=8, reselect_every=2, growth_scale=None)
FAST = killing.SETTINGS | {"observe": killing.observers()}


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapprox") / "run"
    return ls.train(models.load(bert, task=task), task, METHOD, out=out, **FAST)


def test_table_contains_ranks_errors_and_bytes(run):
    table = run.table.set_index(["step", "module"])
    ranks = table[table["quantity"] == "factor_rank"]["value"]
    held, shares = (table[table["quantity"] == f"factor_{name}"]["value"] for name in ("bytes", "share"))
    assert sorted(set(ranks.index.get_level_values("step"))) == [1, 3, 5]
    shapes = {row.module: (row.out_features, row.in_features) for row in run.meta.modules}
    modules = set(ranks.index.get_level_values("module"))
    assert "encoder.layer.0.attention.self.query" in {name.removeprefix("bert.") for name in modules}
    for key, rank in ranks.items():
        if key[1] in shapes:
            m, n = shapes[key[1]]
            assert 1 <= rank <= min(m, n) // 4
            assert held[key] == 4 * rank * (m + n)
            assert shares[key] == rank / (min(m, n) // 4)
    for quantity in (
        "factor_error", "factor_trials", "factor_seconds", "factor_norm", "negative_share", "negative_mass",
        "direction_rms", "direction_cosine",
    ):  # fmt: skip
        values = run.table.loc[run.table["quantity"] == quantity, "value"]
        assert len(values) == len(ranks)
        assert np.isfinite(values).all()
    # every weight trains, so the norms cover all of them
    assert run.summary()["update_norm"].gt(0).all()


@pytest.mark.parametrize(("rule", "share"), [("fixed", 1), ("colnorm", 1), ("restart", 1)])
def test_factor_share_is_relative_to_the_largest_rank_of_the_rule(rule, share):
    """A fixed rank has no cap: rank 16 of 24 x 16 is four times a quarter of the smaller side."""
    model, method = torch.nn.Linear(16, 24, bias=False), Adapprox(rank_rule=rule, init_rank=16)
    optimizer = AdapproxOptimizer(model.parameters(), rank_rule=rule, init_rank=16, min_dim=1, tolerance=0)
    stepped(optimizer, [model.weight])
    found = recorded(method, optimizer, model, 1)
    assert (found["factor_rank"], found["factor_share"]) == (16 if rule == "fixed" else 4, share)


def recorded(method, optimizer, model, finished, total=9):
    """Return the method's records of a step by quantity."""
    step = object.__new__(Step)
    step.index, step.total, step.model, step.optimizer = finished - 1, total, model, optimizer
    return {record.quantity: record.value for record in method.records(step)}


def test_records_of_a_selection_match_their_definitions():
    """Negative entries are those of the factors before the step; V has them set to zero."""
    model, options = torch.nn.Linear(16, 24, bias=False), {"rank_rule": "fixed", "init_rank": 3, "min_dim": 1}
    optimizer = Watched([model.weight], betas=(0.9, 0.99), reselect_every=1, **options)
    stepped(optimizer, [model.weight], 2)
    state = optimizer.state[model.weight]
    before, momentum = state["Q"] @ state["U"].T, state["exp_avg"].clone()
    stepped(optimizer, [model.weight], seed=1)
    found = recorded(Adapprox(**options), optimizer, model, 3)
    V = 0.99 * before.clamp(min=0) + 0.01 * model.weight.grad**2
    product, bound = state["Q"] @ state["U"].T, rounding(terms=24, depth=3)
    direction = (state["exp_avg"] - 0.9 * momentum) / 0.1
    expected = {
        "factor_rank": 3,
        "factor_bytes": 4 * 3 * (24 + 16),
        "factor_share": 1,
        "factor_norm": product.norm(),
        "factor_error": (V - product).norm() / V.norm(),
        "factor_trials": 1,
        "negative_share": (before < 0).float().mean(),
        "negative_mass": -before[before < 0].sum() / before.abs().sum(),
        "direction_cosine": torch.cosine_similarity(direction.flatten(), state["exp_avg"].flatten(), dim=0),
    }
    assert 0 < expected["negative_share"] < 1
    for quantity, value in expected.items():
        assert found[quantity] == pytest.approx(float(value), rel=10 * bound), quantity
    assert found.keys() == expected.keys() | {"direction_rms", "factor_seconds"}


def test_selection_cost_is_recorded_only_at_its_step():
    """A zero V delays the first selection; the last step records the stored factors, but not the selection again."""
    model, method = torch.nn.Linear(16, 24, bias=False), Adapprox(reselect_every=3, min_dim=1)
    optimizer = AdapproxOptimizer(model.parameters(), reselect_every=3, min_dim=1)
    of_a_selection = {"factor_error", "factor_trials", "factor_seconds", "negative_share", "negative_mass"}
    held, chosen, seen = [], [], set()
    for finished, scale in enumerate((0, 1, 1, 1, 1, 1), 1):
        stepped(optimizer, [model.weight], seed=finished, scale=scale)
        found = recorded(method, optimizer, model, finished, 6).keys()
        held += [finished] * ("factor_rank" in found)
        chosen += [finished] * (of_a_selection <= found)
        seen |= found if finished in chosen else set()
        assert found & of_a_selection in (set(), of_a_selection)
    assert (held, chosen) == ([2, 4, 6], [2, 4])
    assert seen == of_a_selection | {
        "factor_rank", "factor_bytes", "factor_norm", "factor_share", "direction_rms", "direction_cosine"
    }  # fmt: skip
    stepped(optimizer, [model.weight])
    assert of_a_selection <= recorded(method, optimizer, model, 7).keys()
    model.weight.grad = None
    optimizer.step()
    assert not of_a_selection & recorded(method, optimizer, model, 8, 8).keys()


def test_sketch_multiple_rounds_the_columns_up(monkeypatch):
    """A sketch of 1 + 5 columns rounds up to 1 + 15 columns; no sketch is wider than the matrix."""
    widths, once = [], subspace_iteration.sketch

    def sketch_widths(*given):
        widths.append(once(*given).shape[1])
        return once(*given)

    p, q, r = parameter(80, 70), parameter(80, 70), parameter(30, 20)
    stepped(AdapproxOptimizer([p], rank_rule="fixed", sketch_multiple=16), [p], 3)
    stepped(AdapproxOptimizer([q], rank_rule="fixed", oversampling=15), [q], 3)
    assert torch.equal(p, q)
    monkeypatch.setattr(subspace_iteration, "sketch", sketch_widths)
    for weight, options in ((p, {"sketch_multiple": 1}), (p, {"sketch_multiple": 16}), (r, {"sketch_multiple": 32})):
        stepped(AdapproxOptimizer([weight], rank_rule="fixed", init_rank=2, min_dim=1, **options), [weight])
    assert widths == [7, 16, 20]


def test_runs_without_sketch_multiple_keep_their_id_and_resume(fresh_bert):
    stored = config(Adapprox())
    assert identify(stored) == "819e5e397433"  # as computed before the field existed
    assert from_config(stored) == Adapprox()
    wide = Adapprox(min_dim=8, sketch_multiple=16)
    wide.attach(fresh_bert)
    assert {g["sketch_multiple"] for g in wide.optimizer(fresh_bert, 1e-3, 1e-3, 0.0).param_groups} == {16}
    optimizer = AdapproxOptimizer([p := parameter(70, 70)])
    stepped(optimizer, [p])
    old = copy.deepcopy(optimizer.state_dict())
    del old["param_groups"][0]["sketch_multiple"]
    optimizer.load_state_dict(old)
    stepped(optimizer, [p])


def test_dense_roles_are_stored_without_factors(fresh_bert):
    method = Adapprox(min_dim=8, dense=("embed", "q"))
    method.attach(fresh_bert)
    optimizer = method.optimizer(fresh_bert, 1e-3, 1e-3, 0.01)
    minima = {id(p): group["min_dim"] for group in optimizer.param_groups for p in group["params"]}
    kept = {name for name, p in fresh_bert.named_parameters() if minima[id(p)] is None}
    assert {name.split(".")[-2] for name in kept} == {"word_embeddings", "token_type_embeddings", "query"}
    decays = {group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if p.ndim == 1}
    assert decays == {0.0}
    assert len(minima) == len(list(fresh_bert.parameters()))


@pytest.mark.parametrize(
    ("dense", "line"),
    [
        (("embed", "pos_embed"), "^dense: 'pos_embed' matches no module "),
        ("lay(ers", r"^dense must be .*got 'lay\(ers'"),
    ],
)
def test_invalid_dense_error_names_the_option(dense, line):
    with pytest.raises(ValueError, match=line):
        Adapprox(dense=dense).optimizer(tiny("llama"), 1e-3, 1e-3, 0.0)


def test_accumulation_gives_the_same_update(bert, task, tmp_path):
    trained = []
    for parts in (1, 2):
        model = models.load(bert, task=task)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        ls.train(model, task, METHOD, out=tmp_path / str(parts), accumulate=parts, **FAST | {"steps": 2})
        trained.append(dict(model.named_parameters()))
    base = models.load(bert, task=task)
    for name, start in base.bert.encoder.named_parameters(prefix="bert.encoder"):
        if name.endswith("key.bias"):  # the loss does not depend on it
            continue
        one, two = (found[name].detach() - start.detach() for found in trained)
        assert float((one - two).norm()) <= 0.02 * float(one.norm()), name


def test_training_works_under_bfloat16_autocast(gpt2, task, tmp_path):
    found = ls.train(models.load(gpt2, task=task), task, METHOD, out=tmp_path / "run", precision="bf16", **FAST)
    assert found.summary()["learned_norm"].gt(0).all()
    assert found.table.query("quantity == 'factor_rank'")["value"].between(1, 8).all()
