"""Test AdaLoRA against worked numbers, exact identities, its definition in Python loops, and PEFT's allocator."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from tiny import inputs, tiny
from tolerance import TINY, near, rounding
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorascope as ls
from lorascope.adapters import host_weights
from lorascope.adapters.delta import attach, attached_deltas, fold
from lorascope.adapters.weight_parts import find_host
from lorascope.inputs import models
from lorascope.methods import AdaLoRA
from lorascope.methods.adalora import AdaLoRADelta, Schedule, importance_terms, most_important, orthogonality, smooth
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import Step

SIX = ("q", "k", "v", "o", "ffn_in", "ffn_out")
SHORT = {"initial_steps": 2, "final_steps": 4, "mask_every": 2}


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> Step:
    """Build a step outside of a training run."""
    return Step(
        -1, total, model, optimizer, {}, pd.DataFrame(), lambda *_: torch.zeros(()), lambda *_: {}, lambda *_: None
    )


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Compute the loss of a batch that depends on the seed."""
    labels = torch.randint(2, (3,), generator=torch.Generator().manual_seed(seed))
    return model(**inputs(model, seed=seed), labels=labels).loss


def drive(model: nn.Module, method: AdaLoRA, total: int, kind: type = torch.optim.AdamW, clip: float = 1.0) -> Iterator:
    """Train in the loop's order; yield each step after clipping, after the optimizer and after ``after_step``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kind(trained, lr=0.05)
    step = step_of(model, optimizer, total)
    for index in range(total):
        step.index = index
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, index).backward()
        method.after_backward(step)
        torch.nn.utils.clip_grad_norm_(trained, clip)
        yield step, "clipped"
        optimizer.step()
        yield step, "moved"
        method.after_step(step)
        yield step, "done"


def started(method: AdaLoRA, **sizes: int) -> nn.Module:
    """Build an adapted tiny BERT in float64, with P and Q from a fixed seed."""
    model = tiny("bert", **sizes).double()
    torch.manual_seed(1)
    method.attach(model)
    return model


def filled(model: nn.Module) -> nn.Module:
    """Set lambda to values of both signs, as after training."""
    for seed, delta in enumerate(attached_deltas(model).values()):
        nn.init.normal_(delta.diagonal, generator=torch.Generator().manual_seed(seed))
    return model


# -- the form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_first_gradient_reaches_only_lambda(family):
    model = tiny(family).requires_grad_(False)
    before = model(**inputs(model)).logits
    AdaLoRA().attach(model)
    after = model(**inputs(model)).logits
    assert torch.equal(after, before)
    after.square().sum().backward()
    assert len(attached_deltas(model)) == 12
    for delta in attached_deltas(model).values():
        assert (delta.rank, tuple(delta.diagonal.shape)) == (12, (12, 1))
        assert not delta.weight().any()
        assert not delta.A.grad.any()
        assert not delta.B.grad.any()
        assert delta.diagonal.grad.all()


def test_initial_factors_are_normal_and_scale_uses_init_rank():
    delta = AdaLoRADelta(nn.Linear(768, 900), 12)
    for factor in (delta.A, delta.B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.03)
        assert factor.mean().item() == pytest.approx(0, abs=1e-3)
    model = tiny("bert")
    AdaLoRA(init_rank=6, target_rank=2, alpha=3).attach(model)
    assert {delta.scale for delta in attached_deltas(model).values()} == {3 / (6 + 1e-5)}


def test_lambda_has_weight_decay():
    method = AdaLoRA()
    model = started(method)
    decayed = [p for g in method.optimizer(model, 1.0, 1.0, 0.1).param_groups if g["weight_decay"] for p in g["params"]]
    assert {id(delta.diagonal) for delta in attached_deltas(model).values()} <= {id(p) for p in decayed}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_masked_model_equals_folded_and_sliced_models(family):
    """Some components are masked, in one module all; c still uses the initial rank."""
    model = tiny(family).double()
    AdaLoRA(init_rank=4, target_rank=2, alpha=5, targets=("q", "v", "ffn_in")).attach(model)
    filled(model)
    for number, delta in enumerate(attached_deltas(model).values()):
        delta.kept[: number % 5] = False
        delta.diagonal.data[: number % 5] = 0
    modules = attached_deltas(model).values()
    assert [delta.rank for delta in modules] == [4 - number % 5 for number in range(len(modules))]
    assert len(modules) == 6
    expected = model(**inputs(model)).logits
    folded = copy.deepcopy(model)
    fold(folded)
    sliced = tiny(family).double()
    parts = {}
    for name, delta in attached_deltas(model).items():
        if not delta.rank:
            continue
        parts[name] = LoRADelta(find_host(sliced, name), delta.rank, delta.scale)
        parts[name].A.data = delta.A.data[delta.kept]
        parts[name].B.data = (delta.B * delta.diagonal.T).data[:, delta.kept]
    attach(sliced, parts)
    plain = tiny(family).double()(**inputs(model)).logits
    assert (expected - plain).abs().max() > 1e-6
    for other in (folded, sliced):
        torch.testing.assert_close(other(**inputs(model)).logits, expected, rtol=1e-12, atol=1e-14)


def test_update_applies_to_embeddings_and_under_dropout():
    table = nn.Embedding(9, 5, padding_idx=0)
    delta = AdaLoRADelta(table, 3, scale=2)
    nn.init.normal_(delta.diagonal)
    ids = torch.tensor([[1, 8], [0, 3]])
    assert delta(ids).detach().numpy() == near(delta.weight().T[ids], terms=3 + 2)
    host, x = nn.Linear(400, 3), torch.randn(7, 400)
    dropping = AdaLoRADelta(host, 2, dropout=0.5)
    nn.init.ones_(dropping.diagonal)
    base = host(x)
    attach(host, {"": dropping})
    assert not torch.allclose(host(x), host(x))
    assert host.eval()(x).detach().numpy() == near(base + x @ dropping.weight().T, terms=400)


def test_update_of_a_snapshot_equals_the_weight():
    model = filled(started(AdaLoRA(init_rank=3, target_rank=1)))
    for delta in attached_deltas(model).values():
        update, factors = delta.update(), delta.factors()
        assert {name: tuple(f.shape) for name, f in factors.items()} == {
            "A": tuple(delta.A.shape),
            "B": tuple(delta.B.shape),
            "diagonal": (3,),
        }
        np.testing.assert_allclose(update.scale * update.B @ update.A, delta.weight().detach().numpy(), atol=1e-16)


# -- penalty --------------------------------------------------------------------------------------------------------


def test_penalty_matches_the_worked_example():
    eye, skew = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert orthogonality([eye, eye], [skew, eye], "sum-square").item() == 3
    assert orthogonality([eye, eye], [skew, eye], "mean-norm").item() == pytest.approx(math.sqrt(3) / 4, rel=1e-14)
    factors = [matrix.clone().requires_grad_() for matrix in (eye, eye, skew, eye)]
    orthogonality(factors[:2], factors[2:], "mean-norm").backward()
    assert not any(factor.grad.any() for factor in (*factors[:2], factors[3]))  # no division by a norm of zero
    assert factors[2].grad.any()


def test_penalty_equals_the_sum_over_matrices():
    model = started(AdaLoRA(init_rank=5, target_rank=1), intermediate_size=48)
    left, right = zip(*[(delta.B, delta.A) for delta in attached_deltas(model).values()], strict=True)
    norms = [torch.linalg.norm(M - torch.eye(5)) for M in [*(P.T @ P for P in left), *(Q @ Q.T for Q in right)]]
    assert len(norms) == 24
    assert orthogonality(list(left), list(right), "mean-norm").item() == pytest.approx(sum(norms).item() / 24)
    squares = sum(norm.item() ** 2 for norm in norms)
    assert orthogonality(list(left), list(right), "sum-square").item() == pytest.approx(squares)


@pytest.mark.parametrize("width", [768, 2500, 3072, 4096])
def test_penalty_of_initial_factors_matches_its_expectation(width):
    """One factor with standard deviation 0.02: the root of the expected square."""
    v, r = 0.02**2, 12
    expected = math.sqrt(r * ((width * v - 1) ** 2 + 2 * width * v**2) + r * (r - 1) * width * v**2)
    drawn = [AdaLoRADelta(nn.Linear(width, 1), r).A for _ in range(10)]
    mean = orthogonality([], drawn, "sum-square").item() / 10
    assert math.sqrt(mean) == pytest.approx(expected, rel=0.1)


# -- importance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 9, 20, 40])
def test_uncertainty_of_a_constant_sensitivity_decays(t):
    """Closed form for equal betas; after the first step 0.15 I, 0.1275 I and 0.019125 I^2."""
    sensitivity, uncertainty = [torch.zeros(1, 1, dtype=torch.float64)], [torch.zeros(1, 1, dtype=torch.float64)]
    weight, gradient, beta = torch.full((1, 1), -3.0), torch.full((1, 1), 0.5), 0.85
    for _ in range(t):
        smooth(sensitivity, uncertainty, [weight], [gradient], (beta, beta))
    assert sensitivity[0].item() == pytest.approx((1 - beta**t) * 1.5, rel=1e-12)
    assert uncertainty[0].item() == pytest.approx((1 - beta) * t * beta**t * 1.5, rel=1e-12)
    scores = {1: 0.019125, 9: 0.240260, 20: 0.111772, 40: 0.009000}
    assert sensitivity[0].item() * uncertainty[0].item() == pytest.approx(scores[t] * 1.5**2, abs=1e-6)


def test_beta1_smooths_sensitivity_and_beta2_uncertainty():
    sensitivity, uncertainty = [torch.zeros(1, 1, dtype=torch.float64)], [torch.zeros(1, 1, dtype=torch.float64)]
    smooth(sensitivity, uncertainty, [torch.ones(1, 1)], [torch.ones(1, 1)], (0.9, 0.6))
    assert sensitivity[0].item() == pytest.approx(0.1)
    assert uncertainty[0].item() == pytest.approx(0.4 * 0.9)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# P, lambda and Q of two matrices, and their gradients at two steps.
HAND = [
    *(matrix([1, 0], [0, 1]), matrix([2], [0.5]), matrix([1, 0], [0, 1])),
    *(matrix([0.6, 0.8], [-0.8, 0.6]), matrix([1], [-1]), matrix([0.8, 0.6], [-0.6, 0.8])),
]
GRADIENTS = [
    [
        *(matrix([0.1, 0.2], [0.3, 0.4]), matrix([0.5], [1]), matrix([0.2, 0.1], [0, 0.5])),
        *(matrix([0.5, 0.5], [0.5, -0.5]), matrix([0.3], [0.2]), matrix([0.1, 0.2], [0.3, -0.4])),
    ],
    [
        *(matrix([0.2, 0.1], [0.1, 0.2]), matrix([0.1], [0.4]), matrix([0.1, 0.3], [0.2, 0.1])),
        *(matrix([0.1, 0.3], [0.2, 0.1]), matrix([0.6], [0.9]), matrix([0.2, 0.2], [0.1, 0.1])),
    ],
]


def hand(steps: int) -> tuple[list[Tensor], list[Tensor]]:
    sensitivity, uncertainty = ([torch.zeros_like(weight) for weight in HAND] for _ in range(2))
    for gradients in GRADIENTS[:steps]:
        smooth(sensitivity, uncertainty, HAND, gradients, (0.85, 0.85))
    return sensitivity, uncertainty


def close(found: Tensor, expected: list) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=0)


def test_importance_matches_the_worked_example_after_one_step():
    parts = importance_terms(*hand(1))
    close(parts.sum(0), [[0.019603125, 0.008701875], [0.004310775, 0.00444465]])
    close(parts[:, 0], [[9.5625e-5, 0.00153], [0.019125, 0.00478125], [3.825e-4, 0.002390625]])


S = [[0.019428609375, 0.011311959375], [0.017066059875, 0.02638175175]]


def test_importance_matches_the_worked_example_after_two_steps():
    sensitivity, uncertainty = hand(2)
    for at, expected in ((1, [0.1575, 0.09375]), (4, [0.12825, 0.1605])):
        close(sensitivity[at][:, 0], expected)
    for at, expected in ((1, [0.11475, 0.070125]), (4, [0.103275, 0.1326])):
        close(uncertainty[at][:, 0], expected)
    close(importance_terms(sensitivity, uncertainty).sum(0), S)


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (4, [[2, 0.5], [1, -1]]),
        (3, [[2, 0], [1, -1]]),
        (2, [[2, 0], [0, -1]]),
        (1, [[0, 0], [0, -1]]),
        (0, [[0, 0], [0, 0]]),
    ],
)
def test_masks_match_the_worked_example(budget, left):
    """The method masks two linear maps that have the P, Q, lambda and gradients of the example."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    method = AdaLoRA(init_rank=2, target_rank=budget / 2, targets=("0", "1"), initial_steps=0, final_steps=1)
    method.attach(model)
    step = step_of(model, torch.optim.SGD(model.parameters()), 3)
    for step.index in range(2):
        for weight, value, gradient in zip(method._weights, HAND, GRADIENTS[step.index], strict=True):
            weight.data, weight.grad = value.clone(), gradient.clone()
        replace(method)  # a copy shares nothing
        method.after_step(step)
    step.index = 2
    method.after_step(step)
    assert [delta.diagonal.flatten().tolist() for delta in attached_deltas(model).values()] == left
    assert sum(delta.rank for delta in attached_deltas(model).values()) == budget
    factors = [number for number, value in enumerate(HAND) if value.shape != (2, 1)]  # the others are masked
    assert len(factors) == 4
    for number in factors:
        assert torch.equal(method._weights[number], HAND[number])


def test_most_important_with_ties_retains_exactly_the_earlier_ones():
    tied = torch.full((2, 2), 0.5, dtype=torch.float64)
    kept = [[[0, 0], [0, 0]], [[1, 0], [0, 0]], [[1, 1], [0, 0]], [[1, 1], [1, 0]], [[1, 1], [1, 1]]]
    assert [most_important(tied, budget).int().tolist() for budget in range(5)] == kept
    many = torch.arange(600, dtype=torch.float64).remainder(3).reshape(50, 12)  # long enough for an unstable sort
    chosen = most_important(many, 250).flatten()
    assert chosen.sum() == 250
    assert chosen[many.flatten() == 2].all()
    ones = (many.flatten() == 1).nonzero().flatten()
    assert chosen[ones].tolist() == [True] * 50 + [False] * 150


def test_mask_follows_permutations_and_ignores_the_scale_of_the_loss():
    sensitivity, uncertainty = hand(2)
    scores = importance_terms(sensitivity, uncertainty).sum(0)
    order = torch.tensor([2, 0, 3, 1])
    for budget in range(5):
        permuted = most_important(scores.flatten()[order].reshape(2, 2), budget)
        assert torch.equal(permuted.flatten(), most_important(scores, budget).flatten()[order])
    bigger = [[torch.zeros_like(weight) for weight in HAND] for _ in range(2)]
    for gradients in GRADIENTS:
        smooth(*bigger, HAND, [7 * gradient for gradient in gradients], (0.85, 0.85))
    close(importance_terms(*bigger).sum(0), (49 * scores).tolist())


# -- budget ---------------------------------------------------------------------------------------------------------

TABLE = {0: 864, 100: 864, 101: 862, 110: 849, 250: 697, 400: 612, 550: 580, 690: 576, 699: 576, 700: 576, 999: 576}


def test_budget_matches_the_table_of_the_paper():
    schedule = Schedule(1000, 100, 300, 10, 864, 576)
    budgets = [schedule.budget(t) for t in range(1000)]
    assert {t: budgets[t] for t in TABLE} == TABLE
    assert set(budgets[:101]) == {864}
    assert set(budgets[700:]) == {576}
    assert max(budgets[101:]) < 864
    assert all(b <= a for a, b in itertools.pairwise(budgets))
    assert [t for t in range(1000) if schedule.chooses(t)] == list(range(110, 701, 10))
    assert [t for t in range(1000) if schedule.masks(t)] == [*range(110, 701, 10), *range(701, 1000)]


@pytest.mark.parametrize(
    "case", [(60, 5, 20, 7, 24, 8), (37, 0, 1, 1, 30, 0), (500, 123, 7, 9, 432, 431), (9, 2, 3, 2, 6, 6)]
)
def test_budget_matches_peft(case):
    total, initial, final, every, start, target = case
    schedule = Schedule(*case)
    theirs = object.__new__(RankAllocator)
    theirs.init_bgt, theirs.target_bgt = start, target
    theirs.peft_config = peft.AdaLoraConfig(total_step=total, tinit=initial, tfinal=final, deltaT=every)
    for t in range(total):
        budget, masked = theirs.budget_schedule(t)
        assert schedule.budget(t) == budget
        assert schedule.masks(t) == (masked or t == total - final)


def test_budget_without_a_final_phase_ends_at_the_target():
    schedule = Schedule(20, 2, 0, 7, 100, 3)
    assert [t for t in range(20) if schedule.masks(t)] == [7, 14, 19]
    assert schedule.budget(19) == 3


def test_default_phases_are_fractions_of_the_run():
    method = AdaLoRA(init_rank=12, target_rank=8)
    started(method)
    assert method.schedule(1000) == Schedule(1000, 100, 300, 10, 144, 96)
    assert method.schedule(300) == Schedule(300, 30, 90, 3, 144, 96)
    for total in range(1, 60):
        assert method.schedule(total).budget(total - 1) == 96


# -- training -------------------------------------------------------------------------------------------------------


def by_hand(
    averages: dict, weights: dict, gradients: dict, b1: float, b2: float, smoothed: bool = True
) -> dict[tuple[str, int], float]:
    """Compute equations 9 to 13 element by element, or 9 with 10 in place of 13."""
    scores = {}
    for key, weight in weights.items():
        for at in np.ndindex(weight.shape):
            now = abs(float(weight[at]) * float(gradients[key][at]))
            mean, spread = averages.get((key, at), (0.0, 0.0))
            mean = b1 * mean + (1 - b1) * now
            averages[key, at] = mean, b2 * spread + (1 - b2) * abs(now - mean)
            score = math.prod(averages[key, at]) if smoothed else now
            scores.setdefault((key, at[1 if key[1] == "B" else 0]), []).append(score)
    total: dict[tuple[str, int], float] = {}
    for ((module, _), rank), values in scores.items():
        total[module, rank] = total.get((module, rank), 0.0) + sum(values) / len(values)
    return total


@pytest.mark.parametrize(
    ("kind", "order", "form", "score"),
    [
        (torch.optim.AdamW, "after", "mean-norm", "smoothed"),
        (torch.optim.AdamW, "before", "sum-square", "smoothed"),
        (torch.optim.SGD, "after", "mean-norm", "smoothed"),
        (torch.optim.AdamW, "after", "mean-norm", "sensitivity"),
        (torch.optim.AdamW, "after", "mean-norm", "magnitude"),
    ],
    ids=["as the code", "as the paper", "by plain descent", "by sensitivity", "by size"],
)
def test_training_follows_the_definition_step_by_step(kind, order, form, score):
    """Masks, lambdas, and unchanged P and Q match scores from Python loops; components return before the end."""
    method = AdaLoRA(
        init_rank=3, target_rank=1, targets=("q", "ffn_out"), beta1=0.7, beta2=0.6, gamma=0.5, scores=order,
        penalty=form, importance=score, initial_steps=2, final_steps=4, mask_every=2,
    )  # fmt: skip
    model = started(method)
    deltas = attached_deltas(model)
    schedule = method.schedule(20)
    averages: dict = {}
    scores: dict = {}
    kept = {(module, rank) for module in deltas for rank in range(3)}
    revived = dropped = 0

    def state(gradient: bool = False) -> dict:
        pairs = [(name, f, getattr(delta, f)) for name, delta in deltas.items() for f in ("B", "diagonal", "A")]
        return {(name, f): (p.grad if gradient else p.detach()).clone() for name, f, p in pairs}

    for step, moment in drive(model, method, 20, kind):
        if moment == "clipped":
            before, gradients = state(), state(gradient=True)
        elif moment == "moved":
            moved = state()
        else:
            t, after = step.index, state()
            if t < 16:
                weights = moved if order == "after" else before
                scores = by_hand(averages, weights, gradients, 0.7, 0.6, score == "smoothed")
            if score == "magnitude":
                sizes = {name: moved[name, "diagonal"].flatten().abs().tolist() for name in deltas}
                scores = {(name, rank): size for name in deltas for rank, size in enumerate(sizes[name])}
            if t in (4, 6, 8, 10, 12, 14, 16):
                ranked = sorted(scores, key=lambda key: -scores[key])
                chosen = set(ranked[: schedule.budget(t)])
                revived, dropped = revived + len(chosen - kept), dropped + len(kept - chosen)
                kept = chosen
            masked = t in (4, 6, 8, 10, 12, 14) or t >= 16
            for name, delta in deltas.items():
                assert delta.kept.tolist() == [(name, rank) in kept for rank in range(3)]
                assert delta.rank == sum(module == name for module, _ in kept)
                expected = moved[name, "diagonal"] * delta.kept[:, None] if masked else moved[name, "diagonal"]
                assert torch.equal(after[name, "diagonal"], expected)
                assert expected.all() or masked
                for factor in "AB":
                    assert torch.equal(after[name, factor], moved[name, factor])
            assert method.settled(step) == (t >= 16)
    assert len(kept) == 4
    assert dropped - revived == 3 * 4 - 4
    # A lambda that was set to zero grows too slowly to return by its size.
    assert revived > 0 or kind is torch.optim.SGD or score == "magnitude"


def test_penalty_changes_the_gradient_but_not_the_loss():
    """``after_backward`` adds gamma times the gradient of the penalty to the gradient of the loss."""
    method = AdaLoRA(init_rank=3, target_rank=1, gamma=0.7, penalty="sum-square")
    model = filled(started(method))
    loss_of(model, 0).backward()
    task = [weight.grad.clone() for weight in method._weights]
    method.after_backward(step_of(model, torch.optim.SGD(model.parameters()), 9))
    for (P, own, Q), (dP, down, dQ) in zip(
        zip(*[iter(method._weights)] * 3, strict=True), zip(*[iter(task)] * 3, strict=True), strict=True
    ):
        eye = torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(P.grad - dP, 0.7 * 4 * (P @ (P.T @ P - eye)))
        torch.testing.assert_close(Q.grad - dQ, 0.7 * 4 * ((Q @ Q.T - eye) @ Q))
        assert torch.equal(own.grad, down)


def test_module_without_gradients_loses_its_rank():
    method = AdaLoRA(init_rank=2, target_rank=1, targets=("q",), **SHORT)
    model = started(method)
    unused = next(iter(attached_deltas(model).values()))
    for _, moment in drive(model, method, 12):
        if moment == "moved":
            unused.diagonal.grad = unused.A.grad = unused.B.grad = None
    assert [delta.rank for delta in attached_deltas(model).values()] == [0, 2]


# -- cost -----------------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counter of operations, and of those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
        return func(*args, **(kwargs or {}))


def count_selection(monkeypatch: pytest.MonkeyPatch, blocks: int, rank: int) -> Counting:
    """Count operations after the optimizer's step in a step that selects components, including its records."""
    method = AdaLoRA(init_rank=rank, target_rank=rank / 2, **SHORT)
    model = started(method, num_hidden_layers=blocks)
    mode = Counting()
    for step, moment in drive(model, method, 12):
        if moment == "moved" and step.index == 6:
            break
    with monkeypatch.context() as patched:
        for owner, name in ((Tensor, "cpu"), (Tensor, "tolist"), (host_weights, "_transfer")):
            original = getattr(owner, name)

            def fetched(tensor, *args, original=original):
                mode.waits += 1
                return original(tensor, *args)

            patched.setattr(owner, name, fetched)
        with mode:
            method.after_step(step)
            assert mode.waits == 0
            told = list(method.records(step))
    assert len(told) == 2 + 10 * 6 * blocks
    return mode


def test_selection_waits_for_the_device_three_times_at_any_depth_and_rank(monkeypatch):
    small, deep, wide = (count_selection(monkeypatch, *sizes) for sizes in ((2, 4), (12, 4), (2, 40)))
    assert small.waits == deep.waits == wide.waits == 3
    assert small.operations == wide.operations
    assert small.operations < deep.operations


# -- PEFT -----------------------------------------------------------------------------------------------------------


def with_peft(ours: nn.Module, family: str, method: AdaLoRA, total: int, dtype: torch.dtype) -> tuple[nn.Module, list]:
    """Build PEFT's AdaLoRA with the same factors; return it with the pairs of parameters."""
    schedule = method.schedule(total)
    theirs = peft.get_peft_model(
        tiny(family).to(dtype),
        peft.AdaLoraConfig(
            init_r=method.init_rank, target_r=method.target_rank, lora_alpha=method.alpha, beta1=method.beta1,
            beta2=method.beta2, orth_reg_weight=method.gamma, tinit=schedule.initial, tfinal=schedule.final,
            deltaT=schedule.every, total_step=total, target_modules=list(attached_deltas(ours)),
            fan_in_fan_out=family == "gpt2",
        ),
    )  # fmt: skip
    pairs = []
    for name, delta in attached_deltas(ours).items():
        layer = theirs.get_base_model().get_submodule(name)
        for mine, key in ((delta.B, "lora_B"), (delta.diagonal, "lora_E"), (delta.A, "lora_A")):
            other = getattr(layer, key)["default"]
            other.data.copy_(mine.data)
            pairs.append((mine, other))
    return theirs.eval().to(dtype), pairs


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_match_peft(family, autocast):
    # PEFT adapts the whole matrix of queries, keys and values.
    targets = ("qkv", "o", "ffn_in", "ffn_out") if family == "gpt2" else AdaLoRA.targets
    method = AdaLoRA(init_rank=3, target_rank=2, alpha=5, targets=targets)
    dtype = torch.float32 if autocast else torch.float64
    ours = tiny(family).to(dtype)
    method.attach(ours)
    theirs, pairs = with_peft(filled(ours), family, method, 10, dtype)
    losses = []
    for model in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(model(**inputs(ours)).logits.double().square().mean())
        losses[-1].backward()
    bound = rounding(torch.bfloat16, depth=6) if autocast else 1e-10  # in the order of factors and scale
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=bound)
    # Gradients of queries and keys nearly cancel; bfloat16 rounds their terms, which are as large as the largest.
    largest = max(other.grad.norm() for _, other in pairs)
    for mine, other in pairs:
        assert mine.grad.any()
        assert (mine.grad - other.grad).norm() <= bound * (largest if autocast else other.grad.norm())


@pytest.mark.filterwarnings("ignore")
def test_masks_match_peft_at_every_step():
    """PEFT computes its own penalty, scores and masks on the same batches; its stored patterns are the masks here."""
    method = AdaLoRA(init_rank=4, target_rank=2, gamma=0.3, initial_steps=3, final_steps=7, mask_every=3)
    ours = started(method)
    theirs, pairs = with_peft(ours, "bert", method, 30, torch.float64)
    for name, parameter in theirs.named_parameters():
        # The head trains here as well, and PEFT would also train the rank by which it divides.
        parameter.requires_grad_("classifier" in name or ("lora_" in name and "ranknum" not in name))
    adapters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=0.05)
    seen = set()
    for step, moment in drive(ours, method, 30, clip=0.5):
        if moment != "done":
            continue
        optimizer.zero_grad()
        loss_of(theirs.base_model, step.index).backward()  # the PeftModel around it would leave out the penalty
        torch.nn.utils.clip_grad_norm_(adapters, 0.5)
        optimizer.step()
        theirs.base_model.update_and_allocate(step.index)
        pattern = theirs.peft_config["default"].rank_pattern
        if method.schedule(30).chooses(step.index):
            stored = {key.partition(".lora_E")[0]: mask for key, mask in pattern.items()}
            masks = {name: delta.kept.tolist() for name, delta in attached_deltas(ours).items()}
            assert masks == stored
            seen.add(str(masks))
        for mine, other in pairs:
            torch.testing.assert_close(mine.data, other.data, rtol=1e-7, atol=1e-9)
    assert len(seen) > 4
    assert sum(delta.rank for delta in attached_deltas(ours).values()) == 24


# -- runs -----------------------------------------------------------------------------------------------------------

FAST = {
    "steps": 12, "batch_size": 4, "eval_every": 3, "eval_size": 16, "test_size": 16, "device": "cpu", "progress": False,
    "lr": 0.05,
}  # fmt: skip
METHOD = AdaLoRA(init_rank=3, target_rank=0.75, **SHORT)
CHOICES = [5, 7, 9]  # finished steps of the selections at 4, 6 and 8; the final phase starts at 8


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    """Train a run; return it with its model and the model's updates at each snapshot."""
    model = models.load(bert, task=task)
    living = {}

    class Looking(ls.observe.Observer):
        def __call__(self, step):
            living[step.finished] = {name: delta.update() for name, delta in attached_deltas(step.model).items()}
            return ()

    observers = [ls.observe.norms(every=1), ls.observe.factors(every=1), Looking()]
    run = ls.train(model, task, METHOD, out=tmp_path_factory.mktemp("ada") / "run", observe=observers, **FAST)
    return run, model, living


def rows(run, quantity: str) -> pd.DataFrame:
    return run.table[run.table["quantity"] == quantity]


def test_recorded_ranks_add_up_to_the_budget(trained):
    run, _, _ = trained
    budgets = rows(run, "budget").set_index("step")["value"].to_dict()
    assert list(budgets) == [0, *CHOICES, 12]
    schedule = Schedule(12, 2, 4, 2, 36, 9)
    assert budgets == {0: 36, 12: 9} | {finished: schedule.budget(finished - 1) for finished in CHOICES}
    ranks = rows(run, "rank")
    assert len(ranks) == 13 * 12
    by_step = ranks.groupby("step")["value"].sum()
    in_force = pd.Series(budgets).reindex(range(13)).ffill()
    assert by_step.tolist() == in_force.tolist()
    assert sum(run.ranks().values()) == 9
    assert 0 in run.ranks().values()
    assert run.ranks() == ranks[ranks["step"] == 12].set_index("module")["value"].to_dict()


def test_every_selection_records_its_scores(trained):
    run, _, _ = trained
    for quantity in (
        *("importance", "importance_lambda", "importance_left", "importance_right"),
        *("sensitivity", "uncertainty", "kept"),
    ):
        found = rows(run, quantity)
        assert sorted(found["step"].unique()) == [*CHOICES, 12]
        assert found.groupby("step").size().tolist() == [36] * 4
        assert sorted(found["index"].unique()) == [0, 1, 2]
    assert rows(run, "penalty")["step"].tolist() == list(range(1, 13))
    told = run.table[run.table["index"].notna() & run.table["step"].isin([*CHOICES, 12])]
    told = told[told["quantity"] != "test_metric_group"]
    wide = told.pivot_table(index=["step", "module", "index"], columns="quantity", values="value", observed=True)
    parts = wide["importance_lambda"] + wide["importance_left"] + wide["importance_right"]
    np.testing.assert_allclose(wide["importance"], parts, rtol=1e-12)
    np.testing.assert_allclose(
        wide["importance_lambda"], wide["sensitivity"] * wide["uncertainty"], rtol=rounding(depth=3)
    )
    for _, at in wide.groupby(level="step"):
        assert at["importance"][at["kept"] == 1].min() > at["importance"][at["kept"] == 0].max()
    assert wide["kept"].groupby(level=["step"]).sum().tolist() == rows(run, "budget")["value"].tolist()[1:]
    assert (wide.loc[9].to_numpy() == wide.loc[12].to_numpy()).all()  # scores and selection are fixed


@pytest.mark.parametrize("importance", ["smoothed", "sensitivity"])
def test_only_smoothed_importance_records_an_uncertainty(importance):
    """Without smoothing, the average is the sensitivity of the step, so its distance from it is 0."""
    method = AdaLoRA(init_rank=3, target_rank=1, importance=importance, **SHORT)
    for step, _ in drive(started(method), method, 12):  # noqa: B007
        pass
    recorded = {record.quantity for record in method.records(step)}
    assert ("uncertainty" in recorded) == (importance == "smoothed")
    assert {"importance", "importance_left", "importance_lambda", "importance_right", "sensitivity", "kept"} < recorded


def test_resumption_after_the_last_selection_records_the_same_last_step():
    """Only the averages are restored, and the run resumes from them."""
    method = AdaLoRA(init_rank=3, target_rank=1, **SHORT)
    whole = started(method)
    for step, _ in drive(whole, method, 12):  # noqa: B007
        pass
    told = {(r.quantity, r.module): r.value for r in method.records(step)}
    resumed = AdaLoRA(init_rank=3, target_rank=1, **SHORT)
    model = started(resumed)
    model.load_state_dict(whole.state_dict())
    resumed.restore(method.state())
    last = step_of(model, torch.optim.SGD(model.parameters()), 12)
    last.index = 11
    resumed.after_backward(last)
    resumed.after_step(last)
    again = {(r.quantity, r.module): r.value for r in resumed.records(last)}
    assert again.keys() == told.keys()
    for key in told.keys() - {("penalty", "")}:
        np.testing.assert_array_equal(again[key], told[key])


def test_recorded_penalty_uses_the_weights_of_the_step(trained):
    run, _, _ = trained
    factors = [run.factors(step=8)[name] for name in run.ranks()]  # the state at the start of step 9
    left, right = ([torch.tensor(f[key]) for f in factors] for key in "BA")
    told = rows(run, "penalty").set_index("step")["value"][9]
    assert told == near(orthogonality(left, right, "mean-norm").item(), terms=TINY)


def test_penalty_of_each_factor_is_the_brute_force_one_at_every_step(trained):
    """Also in the warm-up, at the initial weights and after the last selection: equation 4 before its sum."""
    run, _, _ = trained
    left, right = (rows(run, f"penalty_{side}").set_index(["step", "module"])["value"] for side in ("left", "right"))
    assert sorted(set(left.index)) == sorted(set(right.index)) == sorted(itertools.product(range(13), run.ranks()))
    for step in range(13):
        for name, factors in run.factors(step=step).items():
            for told, columns in ((left, factors["B"].T), (right, factors["A"])):
                expected = 0.0
                for i, one in enumerate(columns.astype(np.float64)):
                    for j, two in enumerate(columns.astype(np.float64)):
                        expected += (sum(x * y for x, y in zip(one, two, strict=True)) - (i == j)) ** 2
                assert told[step, name] == pytest.approx(expected, rel=1e-12)


def test_recorded_penalty_follows_from_that_of_the_factors_a_step_earlier(trained):
    run, _, _ = trained
    factors = run.table[run.table["quantity"].isin(["penalty_left", "penalty_right"])]
    means = factors["value"].pow(0.5).groupby(factors["step"]).mean()
    told = rows(run, "penalty").set_index("step")["value"]
    np.testing.assert_allclose(told, means.loc[0:11], rtol=1e-5)  # R is computed in float32


def test_penalty_of_factors_is_recorded_a_hundred_times_in_a_long_run():
    """At a hundredth of the run and at every selection, also if selections are rarer than the steps of the warm-up."""
    method = AdaLoRA(init_rank=2, target_rank=1, initial_steps=20, final_steps=60, mask_every=50, targets=("q",))
    steps, scalars = [], []
    for step, moment in drive(started(method), method, 200):
        if moment == "done":
            told = {record.quantity for record in method.records(step)}
            steps += [step.finished] * ("penalty_left" in told)
            scalars += [step.finished] * ("penalty" in told)
    assert scalars == list(range(1, 201))
    assert steps == sorted({*range(1, 201, 2), 51, 101, 141, 200})


def test_recording_changes_no_weight(bert, task, tmp_path, monkeypatch):
    states = {}
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(AdaLoRA, "records", lambda *_: ())
        model = models.load(bert, task=task)
        run = ls.train(model, task, METHOD, out=tmp_path / name, **FAST)
        assert rows(run, "penalty_left").empty == (name == "without")
        states[name] = model.state_dict()
    assert all(torch.equal(states["with"][name], tensor) for name, tensor in states["without"].items())


def test_exactly_the_masked_lambdas_end_at_zero(trained):
    _, model, _ = trained
    for delta in attached_deltas(model).values():
        assert torch.equal(delta.diagonal[:, 0] != 0, delta.kept)


def test_updates_of_snapshots_equal_those_of_the_model(trained):
    run, _, living = trained
    assert set(living) == set(range(13))
    for step, updates in living.items():
        stored = run.updates(step=step)
        for name, update in updates.items():
            np.testing.assert_array_equal(stored[name].B, update.B)
            np.testing.assert_array_equal(stored[name].A, update.A)
            assert stored[name].scale == update.scale
    regrown = [update.B.any(axis=0).sum() for update in living[6].values()]
    assert sum(regrown) == 36  # every lambda trains between two selections


def test_best_state_has_the_final_selection(trained):
    assert trained[0].meta.states["best"].step in (9, 12)


def test_norms_handle_modules_of_rank_zero(trained):
    run, model, _ = trained
    summary = run.summary().set_index("module")
    for name, delta in attached_deltas(model).items():
        dense = delta.weight().detach().double()
        assert summary["update_norm"][name] == near(dense.norm(), terms=TINY)
        sigma = torch.linalg.svdvals(dense)[: delta.rank]
        expected = (sigma.square().sum() / sigma[0].square()).item() if delta.rank else 0
        assert summary["stable_rank"][name] == near(expected, terms=TINY)


def test_recorded_loss_excludes_the_penalty(bert, task, tmp_path):
    told = {}
    for name, gamma, parts in (("without", 0.0, 1), ("with", 5.0, 1), ("parts", 5.0, 2)):
        settings = FAST | {"steps": 1, "eval_every": 0, "accumulate": parts, "lr": 1e-3}
        run = ls.train(
            models.load(bert, task=task), task, AdaLoRA(gamma=gamma, dropout=0.0), out=tmp_path / name, **settings
        )
        told[name] = {quantity: rows(run, quantity)["value"].iloc[-1] for quantity in ("loss", "grad_norm")}
    assert told["with"]["loss"] == told["without"]["loss"]
    assert told["with"]["grad_norm"] > told["without"]["grad_norm"] + 0.01


def test_training_works_under_autocast_and_in_bfloat16(bert, task, tmp_path):
    model = models.load(bert, task=task)
    run = ls.train(model, task, METHOD, out=tmp_path / "run", precision="bf16", **FAST)
    assert sum(run.ranks().values()) == 9
    method = AdaLoRA(init_rank=2, target_rank=1, **SHORT)
    model = tiny("bert").to(torch.bfloat16)
    method.attach(model)
    for _, _moment in drive(model, method, 12):
        pass
    assert {s.dtype for s in (*method.sensitivity_, *method.uncertainty_)} == {torch.float32}
    assert all(s.unique().numel() > 20 for s in method.sensitivity_[0::3])
    assert sum(delta.rank for delta in attached_deltas(model).values()) == 12


def test_target_rank_of_all_or_zero_retains_all_or_no_components(bert, task, tmp_path):
    for target, rank in ((2, 2), (0, 0)):
        model = models.load(bert, task=task)
        method = AdaLoRA(init_rank=2, target_rank=target, **SHORT)
        run = ls.train(model, task, method, out=tmp_path / str(target), **FAST)
        assert set(run.ranks().values()) == {rank}
        assert all(
            delta.diagonal.all() if rank else not delta.diagonal.any() for delta in attached_deltas(model).values()
        )
    with pytest.raises(ValueError, match="no factored update of rank >= 1"):
        run.lora_config()


# -- wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"target_rank": 13}, r"target_rank must be .*12.*, got 13"),
        ({"target_rank": -1}, r"target_rank must be .*12.*, got -1"),
        ({"init_rank": 0, "target_rank": 0}, r"init_rank must be an integer >= 1, got 0"),
        ({"alpha": 0}, r"alpha must be > 0 and finite in float32, got 0"),
        ({"beta1": 1.0}, r"beta1 must be .*, got 1.0"),
        ({"beta2": 0}, r"beta2 must be .*, got 0"),
        ({"mask_every": 0}, r"mask_every must be an integer >= 1, got 0"),
        ({"initial_steps": -1}, r"initial_steps must be an integer >= 0, got -1"),
        ({"final_steps": -2}, r"final_steps must be an integer >= 0, got -2"),
    ],
)
def test_invalid_fields_raise_one_line(fields, line):
    with pytest.raises(ValueError, match=f"^{line}$"):
        AdaLoRA(**fields)


def test_phases_longer_than_the_run_raise_before_the_first_step(bert, task, tmp_path):
    model = models.load(bert, task=task)
    with pytest.raises(ValueError, match=r"^initial_steps \+ final_steps .* 12.*, got 8 \+ 4$"):
        ls.train(model, task, replace(METHOD, initial_steps=8), out=tmp_path / "run", **FAST)
    assert all(not delta.diagonal.any() for delta in attached_deltas(model).values())
