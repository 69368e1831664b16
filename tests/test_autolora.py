"""Test AutoLoRA against worked numbers and automatic differentiation of the whole look-ahead."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from tiny import inputs, tiny
from tolerance import forward, near, rounding
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForSequenceClassification

import lorascope as ls
from lorascope.adapters.delta import attach, attached_deltas, fold
from lorascope.cli import main
from lorascope.inputs import models, tasks
from lorascope.methods import AutoLoRA, LoRA
from lorascope.methods.autolora import RADIUS, AutoLoRADelta, adam, hypergradient, retained_mask
from lorascope.methods.method import Phase, config
from lorascope.training.session import Session
from lorascope.training.state import generators_state

FAST = {"steps": 4, "batch_size": 8, "eval_size": 8, "test_size": 8, "device": "cpu", "progress": False}
SUB = "bert.encoder.layer.0.attention.self.query"

# -- the worked example -----------------------------------------------------------------------------------------------

W0 = [[0.5, -0.2], [0.1, 0.3]]
U = [[0.4, -0.3, 0.1], [0.2, 0.6, -0.5]]
V = [[1, 0.5], [-0.5, 1], [0.3, -0.8]]
ETA = 0.1
DIRECT = [0.0611956261, -0.0031998637, -0.0579957624]
EXACT = [0.0712715059462726, -0.0108701942558418, -0.0604013116904304]
DIFFERENCE = [0.0712714810865644, -0.0108702085011285, -0.0604012725854364]
FIRST_ORDER = [0.0472185185, 0.0099962963, -0.0572148148]
BETTY = [0.1451998689, -0.0656193600, -0.0795805089]


class Toy:
    """Linear layer with the worked factors, and half the squared error of one row per split."""

    def __init__(self) -> None:
        self.host = nn.Linear(2, 2, bias=False).double()
        self.delta = AutoLoRADelta(self.host, rank=3)
        for tensor, value in ((self.host.weight, W0), (self.delta.A, V), (self.delta.B, U)):
            tensor.data = torch.tensor(value, dtype=torch.float64)
        attach(self.host, {"": self.delta})
        self.weights = {"delta.A": self.delta.A.detach(), "delta.B": self.delta.B.detach()}
        self.logits = {"delta.logits": self.delta.logits}

    def loss(self, x, y):
        x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
        return lambda w, b: (functional_call(self.host, {**w, **b}, (x,)) - y).square().sum() / 2

    @property
    def train(self):
        return self.loss([1, 2], [1, 0])

    @property
    def search(self):
        return self.loss([-1, 1], [0, 1])

    def gradient(self, form, eta=ETA):
        rates = eta if isinstance(eta, dict) else dict.fromkeys(self.weights, eta)
        return hypergradient(self.train, self.search, self.weights, self.logits, rates, form)

    def total(self, form, eta=ETA):
        found = self.gradient(form, eta)
        return (found.direct["delta.logits"] + found.indirect["delta.logits"]).tolist()

    def after_lookahead(self, logits, eta=ETA):
        """Compute the search loss after the look-ahead as one differentiable function of the logits."""
        rates = eta if isinstance(eta, dict) else dict.fromkeys(self.weights, eta)
        w, b = {name: t.detach().requires_grad_() for name, t in self.weights.items()}, {"delta.logits": logits}
        slopes = torch.autograd.grad(self.train(w, b), list(w.values()), create_graph=True)
        ahead = {name: w[name] - rates[name] * slope for name, slope in zip(w, slopes, strict=True)}
        return self.search(ahead, b)


def test_hypergradients_match_the_worked_example():
    toy = Toy()
    assert toy.train(toy.weights, toy.logits).item() == pytest.approx(1.252938888888889, rel=1e-14)
    assert toy.after_lookahead(toy.delta.logits).item() == pytest.approx(0.507695520064844, rel=1e-14)
    exact = toy.gradient("exact")
    assert exact.direct["delta.logits"].tolist() == pytest.approx(DIRECT, abs=1e-10)
    assert exact.norm == pytest.approx(0.6720024512, abs=1e-10)
    assert toy.total("exact") == pytest.approx(EXACT, abs=1e-14)
    assert toy.total("finite_difference") == pytest.approx(DIFFERENCE, abs=1e-14)
    assert toy.total("finite_difference") == pytest.approx(EXACT, abs=4e-8)
    assert toy.total("first_order") == pytest.approx(FIRST_ORDER, abs=1e-10)
    assert toy.total("betty") == pytest.approx(BETTY, abs=1e-9)


@pytest.mark.parametrize("eta", [0.1, 0.7, {"delta.A": 0.3, "delta.B": 0.05}], ids=["0.1", "0.7", "two rates"])
def test_exact_hypergradient_is_the_derivative_through_the_lookahead(eta):
    toy = Toy()
    toy.delta.logits.copy_(torch.tensor([0.3, -0.2, 0.5]))
    logits = toy.delta.logits.clone().requires_grad_()
    (whole,) = torch.autograd.grad(toy.after_lookahead(logits, eta), logits)
    assert toy.total("exact", eta) == pytest.approx(whole.tolist(), abs=1e-12)
    assert toy.total("finite_difference", eta) == pytest.approx(whole.tolist(), abs=1e-6)
    size = 1e-5
    numeric = []
    for j in range(3):
        shift = size * torch.eye(3, dtype=torch.float64)[j]
        values = [toy.after_lookahead(toy.delta.logits + sign * shift, eta).item() for sign in (1, -1)]
        numeric.append((values[0] - values[1]) / (2 * size))
    assert toy.total("exact", eta) == pytest.approx(numeric, abs=1e-9)


def test_error_of_the_difference_falls_with_the_square_of_the_radius(monkeypatch):
    toy, errors = Toy(), []
    for radius in (0.1, 0.01, 0.001):
        monkeypatch.setattr("lorascope.methods.autolora.RADIUS", radius)
        errors.append(np.abs(np.array(toy.total("finite_difference")) - toy.total("exact")).max())
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("form", ["exact", "finite_difference"])
def test_search_matches_the_worked_example(form):
    """After roll-back the weights take a plain gradient step with the new logits; the rank stays 2."""
    toy, expected = Toy(), {
        1: [0.32155, 0.33503, 0.34343],
        10: [0.22927, 0.35003, 0.42070],
        50: [0.14212, 0.48261, 0.37526],
    }  # fmt: skip
    for iteration in range(1, 51):
        toy.logits["delta.logits"].sub_(0.5 * torch.tensor(toy.total(form), dtype=torch.float64))
        w = {name: t.requires_grad_() for name, t in toy.weights.items()}
        slopes = torch.autograd.grad(toy.train(w, toy.logits), list(w.values()))
        with torch.no_grad():
            for weight, slope in zip(w.values(), slopes, strict=True):
                weight.sub_(ETA * slope)
        if iteration in expected:
            assert toy.delta.alpha.tolist() == pytest.approx(expected[iteration], abs=5.1e-6)
            assert toy.delta.rank == 2


@pytest.mark.parametrize("form", ["exact", "finite_difference", "betty", "first_order"])
def test_hypergradient_terms_sum_to_zero_and_arguments_do_not_change(form):
    toy = Toy()
    toy.delta.logits.copy_(torch.tensor([0.3, -0.2, 0.5]))
    before = {name: value.clone() for name, value in toy.host.state_dict().items()}
    found = toy.gradient(form)
    for part in (found.direct, found.indirect):
        assert part["delta.logits"].sum().item() == pytest.approx(0, abs=1e-12)
    assert found.direct["delta.logits"].any()
    assert all(torch.equal(value, before[name]) for name, value in toy.host.state_dict().items())
    assert all(parameter.grad is None for parameter in toy.host.parameters())
    assert not toy.delta.logits.requires_grad


@pytest.mark.parametrize("form", ["exact", "finite_difference"])
def test_hypergradient_at_learning_rate_zero_is_first_order(form):
    toy = Toy()
    found = toy.gradient(form, eta=0)
    assert torch.equal(found.direct["delta.logits"], toy.gradient("first_order").direct["delta.logits"])
    assert found.indirect["delta.logits"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("form", ["finite_difference", "betty"])
def test_zero_gradient_after_the_lookahead_gives_a_zero_indirect_term(form):
    toy = Toy()
    found = hypergradient(
        toy.train, lambda w, b: b["delta.logits"].sum(), toy.weights, toy.logits, dict.fromkeys(toy.weights, ETA), form
    )
    assert found.norm == 0
    assert found.direct["delta.logits"].tolist() == [1, 1, 1]
    assert found.indirect["delta.logits"].tolist() == [0, 0, 0]


def test_permuted_components_permute_the_hypergradient():
    toy, other, order = Toy(), Toy(), [2, 0, 1]
    toy.delta.logits.copy_(torch.tensor([0.3, -0.2, 0.5]))
    other.logits["delta.logits"].copy_(toy.delta.logits[order])
    other.delta.A.data, other.delta.B.data = toy.delta.A.data[order], toy.delta.B.data[:, order]
    other.weights = {"delta.A": other.delta.A.detach(), "delta.B": other.delta.B.detach()}
    assert other.delta.weight().detach().numpy() == pytest.approx(toy.delta.weight().detach().numpy(), abs=1e-15)
    assert torch.equal(other.delta.alpha, toy.delta.alpha[order])
    assert other.delta.rank == toy.delta.rank
    for form in ("exact", "finite_difference", "betty"):
        assert other.total(form) == pytest.approx([toy.total(form)[j] for j in order], abs=1e-12)


def test_adam_matches_torch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator)
    theirs = nn.Parameter(logits.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.01, betas=(0.5, 0.999))
    moments = {"steps": 0, "first": torch.zeros(4, 3), "second": torch.zeros(4, 3)}
    for _ in range(20):
        gradient = torch.randn(4, 3, generator=generator)
        move, moments = adam(gradient, moments, 0.01)
        logits = logits - move
        theirs.grad = gradient
        optimizer.step()
    assert logits.numpy() == near(theirs, depth=20 * 8)  # steps times rounding errors of moments and move


# -- the adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equal_logits_retain_all_components(dtype):
    for k in range(1, 65):
        for value in (0.0, 1.0, -3.7):
            assert retained_mask(torch.full((k,), value, dtype=dtype).softmax(0)).all(), k


@given(
    st.lists(st.floats(-30, 30, width=16), min_size=1, max_size=64), st.sampled_from(["float64", "float32", "bfloat16"])
)
def test_at_least_one_component_is_retained(logits, dtype):
    alpha = torch.tensor(logits, dtype=getattr(torch, dtype)).softmax(0)
    mask = retained_mask(alpha)
    assert 1 <= int(mask.sum()) <= len(logits)
    assert mask[alpha.argmax()]


def test_threshold_applies_to_alpha_not_logits():
    delta = AutoLoRADelta(nn.Linear(3, 3), rank=8)
    delta.logits.copy_(torch.tensor([2, 1.05, 1, 0.9, 1.1, 0.8, 0.7, 0.45]))
    assert delta.rank == 1
    assert int((delta.logits >= delta.logits.mean()).sum()) == 4


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_search_starts_at_the_base_with_zero_gradient_of_the_logits(family):
    model = tiny(family).requires_grad_(False)
    before = model(**inputs(model)).logits
    AutoLoRA(targets="all-linear", rank=3).attach(model)
    found = attached_deltas(model)
    assert len(found) >= 8
    assert all(not p.requires_grad for name, p in model.named_parameters() if name.endswith("logits"))
    logits = {f"{name}.delta.logits": delta.logits.requires_grad_() for name, delta in found.items()}
    after = functional_call(model, logits, (), inputs(model)).logits
    assert torch.equal(after, before)
    gradients = torch.autograd.grad(after.square().sum(), list(logits.values()))
    assert not any(gradient.any() for gradient in gradients)


def filled(model):
    for seed, delta in enumerate(attached_deltas(model).values()):
        generator = torch.Generator().manual_seed(seed)
        for tensor in (delta.A, delta.B, delta.logits):
            nn.init.normal_(tensor, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_model_equals_its_folded_model(family, dtype):
    model = tiny(family, tie_word_embeddings=False).to(dtype)
    AutoLoRA(targets=("all-linear", "embed"), rank=3).attach(model)
    folded = copy.deepcopy(filled(model))
    fold(folded)
    with torch.no_grad():
        one, other = model(**inputs(model)).logits, folded(**inputs(model)).logits
    bound = 1e-12 if dtype == torch.float64 else forward(folded, inputs(folded))
    assert (one - other).norm() <= bound * other.norm()


def test_update_and_factors_equal_the_weight():
    host = nn.Linear(6, 4)
    delta = AutoLoRADelta(host, rank=3, scale=2.5)
    nn.init.normal_(delta.B)
    delta.logits.copy_(torch.tensor([1.0, 0.0, -1.0]))
    weight = delta.weight().detach().numpy()
    alpha = np.exp([1, 0, -1]) / np.exp([1, 0, -1]).sum()
    A, B = delta.A.detach().numpy(), delta.B.detach().numpy()
    assert weight == near(sum(2.5 * alpha[j] * np.outer(B[:, j], A[j]) for j in range(3)), terms=9)
    assert delta.update().dense() == near(weight, terms=9)
    factors = {name: factor.detach().numpy() for name, factor in delta.factors().items()}
    assert delta.update().scale * (factors["B"] * factors["diagonal"]) @ factors["A"] == near(weight, terms=9)


@pytest.mark.parametrize(
    ("constraint", "alpha", "rank"),
    [("sigmoid", [0.5, 1 / (1 + np.exp(1)), 1 / (1 + np.exp(-2))], 2), ("none", [1 / 3, -2 / 3, 7 / 3], 1)],
)
def test_alpha_without_a_softmax(constraint, alpha, rank):
    delta = AutoLoRADelta(nn.Linear(6, 4), rank=3, constraint=constraint)
    nn.init.normal_(delta.B)
    delta.logits.copy_(torch.tensor([0.0, -1.0, 2.0]))
    np.testing.assert_allclose(delta.alpha, alpha, rtol=1e-6)
    A, B = delta.A.detach().numpy(), delta.B.detach().numpy()
    expected = sum(alpha[j] * np.outer(B[:, j], A[j]) for j in range(3))
    np.testing.assert_allclose(delta.weight().detach(), expected, rtol=1e-5, atol=1e-6)
    # Thresholds: 0.5 for the sigmoid, else the mean of alpha.
    assert delta.rank == rank


def test_sigmoid_may_remove_a_matrix_and_the_search_goes_on():
    delta = AutoLoRADelta(nn.Linear(3, 3), rank=2, constraint="sigmoid")
    delta.logits.fill_(-0.1)
    assert delta.rank == 0
    method = AutoLoRA(constraint="sigmoid", rank=2)
    assert "constraint" in config(method)
    assert "constraint" not in config(AutoLoRA(rank=2))  # earlier runs keep their ids
    model = tiny("bert")
    method.attach(model)
    assert {found.constraint for found in attached_deltas(model).values()} == {"sigmoid"}


def test_logits_are_float32_or_wider():
    assert AutoLoRADelta(nn.Linear(3, 3).bfloat16(), rank=2).logits.dtype == torch.float32
    assert AutoLoRADelta(nn.Linear(3, 3).double(), rank=2).logits.dtype == torch.float64
    half = nn.Linear(3, 3).bfloat16()
    attach(half, {"": AutoLoRADelta(half, rank=2)})
    assert half(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


# -- what the search finds --------------------------------------------------------------------------------------------


def searched(seed: int, twins: bool = False, steps: int = 150) -> tuple[AutoLoRADelta, torch.Tensor]:
    """Search over six components for a noisy teacher of rank 2, in float64; return adapter and teacher."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    teacher = draw(10, 2) @ draw(2, 8)
    X = [draw(24, 8) for _ in range(2)]
    Y = [x @ teacher.T + 0.3 * draw(24, 10) for x in X]
    host = nn.Linear(8, 10, bias=False).double().requires_grad_(False)
    nn.init.zeros_(host.weight)
    delta = AutoLoRADelta(host, rank=6, scale=2)
    nn.init.kaiming_uniform_(delta.A, a=5**0.5, generator=generator)
    if twins:
        delta.A.data[3] = delta.A.data[1]
    attach(host, {"": delta})
    weights, logits = {"delta.A": delta.A, "delta.B": delta.B}, {"delta.logits": delta.logits}

    def loss_of(split):
        return lambda w, b: (functional_call(host, {**w, **b}, (X[split],)) - Y[split]).square().mean()

    optimizer = torch.optim.Adam(weights.values(), lr=0.01)
    zeros = torch.zeros(1, 6, dtype=torch.float64)
    moments = {"steps": 0, "first": zeros, "second": zeros}
    for _ in range(steps):
        found = hypergradient(
            loss_of(0), loss_of(1), weights, logits, dict.fromkeys(weights, 0.01), "finite_difference"
        )
        move, moments = adam((found.direct["delta.logits"] + found.indirect["delta.logits"])[None], moments, 0.02)
        delta.logits.sub_(move[0])
        optimizer.zero_grad()
        loss_of(0)({}, logits).backward()
        optimizer.step()
    return delta, teacher


def explained(delta: AutoLoRADelta, mask: torch.Tensor, teacher: torch.Tensor) -> float:
    """Compute the fraction of the teacher that a combination of these components explains."""
    A, B = delta.A.detach(), delta.B.detach()
    terms = torch.stack([torch.outer(B[:, j], A[j]).flatten() for j in mask.nonzero()[:, 0]], dim=1)
    target = teacher.flatten()[:, None]
    rest = target - terms @ torch.linalg.lstsq(terms, target).solution
    return 1 - float((rest.norm() / target.norm()) ** 2)


def test_retained_components_span_a_planted_teacher_of_rank_two():
    """They explain more of it than the other components, which are never fewer."""
    for seed in range(3):
        delta, teacher = searched(seed)
        mask = retained_mask(delta.alpha)
        assert mask.sum() <= 3
        assert explained(delta, mask, teacher) > explained(delta, ~mask, teacher) + 0.05
        left, _, right = torch.linalg.svd(teacher)
        inside = torch.ones(6, dtype=torch.float64)
        for factor, basis in ((delta.B.detach(), left[:, :2]), (delta.A.detach().T, right[:2].T)):
            inside *= (basis.T @ factor).norm(dim=0) / factor.norm(dim=0)
        assert inside[mask].mean() > inside[~mask].mean()


def test_identical_components_keep_equal_alpha():
    delta, _ = searched(0, twins=True, steps=40)
    assert delta.alpha[1].item() == pytest.approx(delta.alpha[3].item(), abs=1e-9)
    assert len({round(value, 6) for value in delta.alpha.tolist()}) == 5


# -- in training ------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CheckedSearch(AutoLoRA):
    """Search phase that checks what the outer problem changes."""

    def phases(self, base):
        yield Phase(self)

    def before_step(self, step):
        before = copy_all_but_logits(step)
        logits = [delta.logits.clone() for delta in attached_deltas(step.model).values()]
        super().before_step(step)
        after = copy_all_but_logits(step)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
        assert all(p.grad is None for p in step.model.parameters()) or step.index
        assert step.model.training
        moved = [
            not torch.equal(old, delta.logits)
            for old, delta in zip(logits, attached_deltas(step.model).values(), strict=True)
        ]
        assert all(moved) == bool(self.selection_lr and (step.index or self.hypergradient != "first_order"))


def copy_all_but_logits(step):
    """Copy parameters, buffers, gradients, optimizer state and the state of the torch generator."""
    found = {name: tensor.clone() for name, tensor in step.model.state_dict().items() if not name.endswith("logits")}
    for name, parameter in step.model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
        for key, value in step.optimizer.state.get(parameter, {}).items():
            found[f"{key} of {name}"] = value.clone()
    return found | {"generator": generators_state()["torch"]}


@pytest.mark.parametrize("form", ["finite_difference", "exact", "first_order", "betty"])
def test_outer_problem_changes_only_the_logits(form, bert, task, tmp_path):
    """Model and adapter have dropout, so that the generator is used."""
    method = CheckedSearch(hypergradient=form, dropout=0.2, lr=1e-2, head_lr=1e-2)
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **FAST)
    table = run.table
    assert set(table.loc[table["quantity"] == "logit", "index"]) == set(range(8))


def test_logits_follow_equation_5(bert, task, tmp_path):
    """The oracle differentiates the whole search loss after the look-ahead and uses torch's Adam."""
    model = models.load(bert, task=task).double()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    theirs = []

    class Compared(AutoLoRA):
        def phases(self, base):
            yield Phase(self)

        def before_step(self, step):
            rows = step.validation()
            names = [f"{module}.delta.logits" for module in attached_deltas(step.model)]
            if not theirs:
                theirs.extend(nn.Parameter(step.model.get_buffer(name).clone()) for name in names)
                self.outer = torch.optim.Adam(theirs, lr=0.05, betas=(0.5, 0.999))
            weights = {
                name: p.detach().requires_grad_() for name, p in step.model.named_parameters() if p.requires_grad
            }
            rates = {id(p): group["lr"] for group in step.optimizer.param_groups for p in group["params"]}
            rates = {name: rates[id(p)] for name, p in step.model.named_parameters() if p.requires_grad}
            logits = dict(zip(names, theirs, strict=True))
            loss = functional_call(step.model, {**weights, **logits}, (), step.batch).loss
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            ahead = {name: w - rates[name] * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
            self.outer.zero_grad()
            functional_call(step.model, {**ahead, **logits}, (), rows).loss.backward(inputs=theirs)
            self.outer.step()
            super().before_step(replace(step, draw=lambda size, fixed: rows))
            for name, tensor in logits.items():
                distance, size = (step.model.get_buffer(name) - tensor).abs().max(), tensor.abs().max()
                assert distance <= 1e-6 * size, (step.index, name)
            assert step.index < 2 or size > 1e-3

    method = Compared(hypergradient="exact", targets="all-linear", selection_lr=0.05, lr=0.3, head_lr=0.2)
    ls.train(model, task, method, out=tmp_path / "run", **FAST | {"schedule": "constant", "warmup": 0, "clip": 0.5})


@dataclass(kw_only=True)
class DifferencesAndExact(CheckedSearch):
    """Search that solves the outer problem by differences and exactly, from the same state and rows."""

    def before_step(self, step):
        rows = step.validation()
        still = replace(step, draw=lambda size, fixed: rows)
        deltas, moments = attached_deltas(step.model).values(), self.moments_
        logits = [delta.logits.clone() for delta in deltas]
        answers = {}
        for form in ("exact", "finite_difference"):
            for delta, value in zip(deltas, logits, strict=True):
                delta.logits.copy_(value)
            self.moments_ = moments
            self.hypergradient = form
            AutoLoRA.before_step(self, still)
            answers[form] = self._terms
        for part in ("direct", "indirect"):
            one, other = (torch.cat(list(getattr(answers[form], part).values())) for form in answers)
            assert (one - other).norm() <= 2e-2 * one.norm()
            assert step.index == 0 or one.any()


def test_both_sides_of_a_difference_use_the_same_dropout_masks(bert, task, tmp_path):
    """Different masks would add noise of size 1 / epsilon."""
    method = DifferencesAndExact(dropout=0.5, lr=0.3, head_lr=0.1)
    ls.train(
        models.load(bert, task=task), task, method, out=tmp_path / "run", **FAST | {"schedule": "constant", "clip": 0.1}
    )


@pytest.mark.parametrize(("form", "passes"), [("finite_difference", 5), ("exact", 3), ("first_order", 2), ("betty", 5)])
def test_search_step_runs_the_stated_number_of_passes(form, passes, bert, task, tmp_path):
    counts = []

    class Counted(AutoLoRA):
        def phases(self, base):
            yield Phase(self)

        def before_step(self, step):
            if not step.index:
                step.model.classifier.register_forward_pre_hook(lambda *_: counts.append(step.index))
            super().before_step(step)

    settings = FAST | {"steps": 3, "eval_every": 0}
    ls.train(models.load(bert, task=task), task, Counted(hypergradient=form), out=tmp_path / "run", **settings)
    assert [counts.count(index) for index in (0, 1)] == [passes, passes]


def flip_search_labels(task: tasks.Task, share: float) -> tasks.Task:
    """Return the task with the other label on every row of the search split."""
    table = task.table.copy()
    search = (table["split"] == "train") & (table["draw"] < share)
    assert 60 < search.sum() < 150
    other = dict(zip(task.labels, task.labels[::-1], strict=True))
    table.loc[search, "label"] = table.loc[search, "label"].map(other)
    return replace(task, table=table, hash=task.hash[::-1])


def test_search_labels_affect_the_weights_only_through_the_logits(bert, task, tmp_path):
    def weights(data, rate):
        out = tmp_path / f"{data.hash[:4]}-{rate}"
        model = models.load(bert, task=data)
        ls.train(model, data, CheckedSearch(selection_lr=rate, lr=1e-2), out=out, **FAST)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    other = flip_search_labels(task, 0.5)
    for rate, equal in ((0, True), (0.1, False)):
        one, two = weights(task, rate), weights(other, rate)
        assert all(torch.equal(one[name], two[name]) for name in one) == equal
        assert any("delta.B" in name and tensor.any() for name, tensor in one.items())


def test_each_phase_trains_on_its_own_rows(bert, task, tmp_path, monkeypatch):
    seen = {"search": set(), "retrain": set(), "held out": set()}

    def rows(batch):
        return {
            tuple(ids[mask.bool()].tolist())
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }

    batch, draw = Session.batch, Session._draw_validation

    def watched(self, index):
        found = batch(self, index)
        seen[self.plan.phase.name] |= rows(found)
        return found

    def drawn(self, size, fixed):
        found = draw(self, size, fixed)
        assert len(found["input_ids"]) == 32
        seen["held out"] |= rows(found)
        return found

    monkeypatch.setattr(Session, "batch", watched)
    monkeypatch.setattr(Session, "_draw_validation", drawn)
    run = ls.train(
        models.load(bert, task=task), task, AutoLoRA(hypergradient="first_order"), out=tmp_path / "run",
        **FAST | {"steps": 8, "batch_size": 32},
    )  # fmt: skip
    tokens = models.tokenizer(models.load(bert, task=task))

    def texts(split, share=0.5):
        encoded = task.encode(tokens, task.split(split, share))
        return rows(encoded.batch(list(range(len(encoded)))))

    assert not texts("train") & texts("search")
    assert seen["search"] == texts("train")
    assert seen["held out"] <= texts("search")
    assert len(seen["held out"]) > 0.8 * len(texts("search"))
    assert seen["retrain"] == texts("train", 0) == texts("train") | texts("search")
    assert run.meta.phase == ["retrain", "train+search"]


@pytest.fixture(scope="module")
def trained(bert, task, tmp_path_factory):
    """Return the folder of the base, the model and the run of a search with retraining."""
    model, out = models.load(bert, task=task), tmp_path_factory.mktemp("autolora") / "run"
    method = AutoLoRA(rank=5, lr=1e-2, head_lr=1e-2, selection_lr=0.05, targets="all-linear")
    run = ls.train(model, task, method, out=out, **FAST | {"steps": 13})
    return bert, model, run


def test_retraining_uses_the_ranks_of_the_search(trained, task):
    _, model, run = trained
    (search,) = run.parents
    assert json.loads((run.path.parent / "recipe.json").read_text(encoding="utf-8"))["phases"] == [
        "1-search",
        "2-retrain",
    ]
    assert ls.load(run.path.parent).id == run.id
    assert run.meta.recipe == search.meta.recipe == search.meta.method
    assert run.meta.method["name"] == "lora"
    assert run.ranks() == search.ranks()
    assert len(set(run.ranks().values())) > 1
    table = search.table[search.table["step"] == 13]
    alpha = table[table["quantity"] == "alpha"].groupby("module", observed=True)["value"]
    assert run.ranks() == alpha.agg(lambda values: int((values >= 1 / 5).sum())).to_dict()
    for module, delta in attached_deltas(model).items():
        assert (delta.A.shape[0], delta.scale) == (run.ranks()[module], 16 / run.ranks()[module])
    start = run.table.query("step == 0 and quantity == 'update_norm'").set_index("module")["value"]
    assert not start[list(run.ranks())].any()
    assert run.meta.parameters.trained - run.meta.parameters.head == sum(
        rank * sum(model.get_submodule(module).weight.shape) for module, rank in run.ranks().items()
    )
    config = run.lora_config()
    peft_config = peft.LoraConfig(**config)
    targets = {name for name, _ in model.named_modules() if check_target_module_exists(peft_config, name)}
    assert targets == run.ranks().keys()
    assert config["lora_alpha"] == 16
    assert not config["alpha_pattern"]


def test_search_steps_set_only_the_length_of_the_search(trained, bert, task, tmp_path):
    """A search of three steps before six of retraining is the search of a run of three steps."""
    *_, default = trained
    assert [run.meta.settings["steps"] for run in (*default.parents, default)] == [13, 13]
    same = {"rank": 5, "targets": "all-linear", "selection_lr": 0.05}
    assert config(AutoLoRA(**same)) == config(AutoLoRA(**same, search_steps=None))
    assert "search_steps" not in config(AutoLoRA())
    runs = {}
    for name, search_steps, steps in (("short", 3, 6), ("long", None, 3)):
        method = AutoLoRA(**same, search_steps=search_steps)
        settings = FAST | {"steps": steps}
        runs[name] = ls.train(models.load(bert, task=task), task, method, out=tmp_path / name, **settings)
    short, long = runs["short"], runs["long"]
    assert [run.meta.settings["steps"] for run in (*short.parents, short)] == [3, 6]
    assert short.parents[0].ranks() == long.parents[0].ranks() == short.ranks()
    for name, tensor in long.parents[0].tensors().items():
        np.testing.assert_array_equal(short.parents[0].tensors()[name], tensor)
    assert short.table["step"].max() == 6


def test_search_restores_its_recorded_logits(trained, task):
    bert, _, run = trained
    (search,) = run.parents
    fresh = models.load(bert, task=task)
    search.restore(fresh)
    updates = search.updates()
    logit = search.table.query("quantity == 'logit' and step == 13")
    for module, delta in attached_deltas(fresh).items():
        assert isinstance(delta, AutoLoRADelta)
        assert updates[module].dense() == near(delta.weight(), terms=5 + 3)  # components + alpha + scale
        assert delta.logits.tolist() == logit.loc[logit["module"] == module, "value"].tolist()


def test_search_records_selection_and_hypergradients(trained):
    *_, run = trained
    table = run.parents[0].table
    many = table[table["index"].notna() & (table["quantity"] != "test_metric_group")]
    wide = {
        name: rows.pivot(index=["step", "module"], columns="index", values="value")
        for name, rows in many.groupby("quantity", observed=True)
    }
    steps = {name: sorted(set(frame.index.get_level_values("step"))) for name, frame in wide.items()}
    gradients = [f"hypergradient_{part}" for part in ("direct", "indirect")]
    assert steps == {
        "alpha": [0, 10, 13],
        "logit": [0, 10, 13],
        "importance": [13],
        **{name: [10, 13] for name in gradients},
    }
    for name, frame in wide.items():
        assert list(frame.columns) == list(range(5)), name
        assert frame.notna().all(axis=None)
    alpha = wide["alpha"]
    assert alpha.sum(axis=1).to_numpy() == near(1, terms=5, depth=2)
    assert ((alpha > 0) & (alpha < 1)).all(axis=None)
    powers = np.exp(wide["logit"])
    assert powers.div(powers.sum(axis=1), axis=0).to_numpy() == near(alpha.to_numpy(), terms=5, depth=2)
    for name in gradients:
        growth = 1 if "_direct" in name else 1 / RADIUS  # a difference over that distance amplifies rounding errors
        bound = rounding(terms=5, depth=4, growth=growth) * wide[name].abs().max(axis=None)
        assert wide[name].sum(axis=1).abs().max() < bound
        assert (wide[name].abs().max(axis=1) > 0).all()
    assert wide["importance"].equals(alpha.loc[[13]])
    scalars = {
        name: rows.set_index(["step", "module"])["value"] for name, rows in table.groupby("quantity", observed=True)
    }
    entropy = -(alpha * np.log(alpha)).sum(axis=1)
    assert scalars["alpha_entropy"].loc[entropy.index].to_numpy() == near(entropy.to_numpy(), terms=5, depth=3)
    assert scalars["rank"].loc[alpha.index].equals((alpha >= 1 / 5).sum(axis=1).astype(float).rename("value"))
    assert scalars["lookahead_gradient_norm"].index.tolist() == [(10, ""), (13, "")]
    assert "budget" not in scalars


def test_lookahead_uses_the_scheduled_learning_rates(bert, task, tmp_path):
    """eta is the scheduled learning rate of each parameter at the step."""
    seen = []

    class Spied(AutoLoRA):
        def phases(self, base):
            yield Phase(self)

        def before_step(self, step):
            import lorascope.methods.autolora as module

            real = module.hypergradient
            module.hypergradient = lambda *a: seen.append(a[4]) or real(*a)
            super().before_step(step)
            module.hypergradient = real
            assert self.moments_["steps"] == step.finished
            groups = {group["name"]: group["lr"] for group in step.optimizer.param_groups}
            assert seen[-1] == {
                name: groups["head" if name.startswith("classifier") else "adapter"]
                for name, p in step.model.named_parameters()
                if p.requires_grad
            }

    run = ls.train(models.load(bert, task=task), task, Spied(lr=1e-2, head_lr=3e-2), out=tmp_path / "run", **FAST)
    rates = run.table.query("quantity == 'lr'")["value"].tolist()
    assert [next(rate for name, rate in step.items() if "delta" in name) for step in seen] == rates
    assert len(set(rates)) == 4


# Ranks of q and v of the first block, then of the second, and so on.
COLA = [3, 2, 4, 4, 5, 3, 3, 4, 5, 3, 5, 4, 3, 3, 5, 4, 2, 5, 4, 4, 3, 3, 3, 4]


def test_parameter_count_of_the_published_ranks():
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta"))
    names = ls.module_table.match(ls.module_table.describe(model), ("q", "v"))
    method = AutoLoRA(dropout=0.1, head_lr=2e-4)
    phases = method.phases({})
    assert next(phases) == Phase(method, "search")
    ranks = dict(zip(names, COLA, strict=True))
    retrain = phases.send(SimpleNamespace(ranks=lambda: ranks))
    assert retrain.method == LoRA(rank=ranks, alpha=16, dropout=0.1, lr=1e-4, head_lr=2e-4, search_share=0.5)
    assert (retrain.name, retrain.split, retrain.steps) == ("retrain", "train+search", None)
    retrain.method.attach(model)
    assert (
        sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()) == 88 * 1536 == 135_168
    )


def test_attention_without_second_derivatives_raises_one_line(llama, task, tmp_path):
    kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    method = AutoLoRA(hypergradient="exact")
    prompts = task.fit(models.load(llama))
    with kernel, pytest.raises(ValueError, match=r'hypergradient.*exact.*"eager"') as caught:
        ls.train(models.load(llama), prompts, method, out=tmp_path / "run", **FAST)
    assert "\n" not in str(caught.value)


WRONG = [
    ({"rank": 0}, "rank must be an integer >= 1, got 0"),
    ({"search_steps": 0}, "search_steps must be an integer >= 1, got 0"),
    ({"selection_lr": -1e-3}, "selection_lr must be .*>= 0, got -0.001"),
    ({"selection_lr": float("nan")}, "selection_lr must be .*, got nan"),
    ({"search_share": 0}, r"search_share must be in \(0, 1\), got 0"),
    ({"search_share": 1}, "search_share must be .*, got 1"),
]


@pytest.mark.parametrize(("given", "line"), WRONG)
def test_invalid_settings_raise_one_line(given, line):
    with pytest.raises(ValueError, match=line) as caught:
        AutoLoRA(**given)
    assert "\n" not in str(caught.value)


def test_invalid_setting_on_the_command_line_exits_with_2(capsys):
    assert main.main(["train", "autolora", "--steps", "3", "--search-share", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_finite_difference_of_narrow_weights_raises(dtype):
    for form in ("finite_difference", "betty"):
        model = tiny("bert").to(dtype)
        with pytest.raises(ValueError, match=f'hypergradient .*{form}.* {dtype} .*"exact"$'):
            AutoLoRA(hypergradient=form).attach(model)
        assert not attached_deltas(model)
    AutoLoRA(hypergradient="exact").attach(model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # the name before transformers 5.24
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_gradient_checkpointing_raises(is_reentrant):
    """Recomputed passes use other weights than the look-ahead, so that the hypergradient would be wrong."""
    model = tiny("bert")
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    with pytest.raises(ValueError, match=r"^cannot checkpoint the search of AutoLoRA: it differentiates at other"):
        AutoLoRA().attach(model)
    assert not attached_deltas(model)
    model.gradient_checkpointing_disable()
    AutoLoRA().attach(model)


def test_negative_learning_rate_raises(bert, task, tmp_path):
    with pytest.raises(ValueError, match=r"lr .*got -1"):
        ls.train(models.load(bert, task=task), task, AutoLoRA(lr=-1), out=tmp_path / "run", **FAST)
