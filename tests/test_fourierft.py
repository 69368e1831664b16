"""Test FourierFT against the paper's formula, worked numbers and PEFT's layers."""

from __future__ import annotations

import copy
import pickle

import killing
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import inputs, tiny
from tolerance import TINY, amplification, forward, near, rounding
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorascope as ls
from lorascope import export, plots
from lorascope.adapters.delta import attach, attached_deltas, deltas, detach, fold, host_weight
from lorascope.analysis import initial_update, subspace_similarity
from lorascope.diagnosis.inspection import inspect
from lorascope.inputs import models
from lorascope.methods import FourierFT
from lorascope.methods.fourierft import (
    BasisDelta,
    FourierDelta,
    analysis,
    fourier_factors,
    synthesis,
    synthesize,
    use_basis_form,
)
from lorascope.updates import fourier, stable_rank
from lorascope.updates.fourier import Fourier, entries


def drawn(shape: tuple[int, int], n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw coefficients in float64, and entries."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dtype=torch.float64, generator=generator), torch.from_numpy(entries(shape, n, seed))


def by_definition(c: torch.Tensor, places: torch.Tensor, shape: tuple[int, int], alpha: float) -> torch.Tensor:
    """Compute the update by the paper's algorithm 1."""
    spectrum = torch.zeros(shape, dtype=c.dtype).index_put(tuple(places), c)
    return torch.fft.ifft2(spectrum).real * alpha


SHAPES = [(4, 6), (6, 4), (5, 7), (7, 5), (8, 8), (1, 6), (6, 1), (1, 1), (2, 2), (9, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
def test_half_transform_equals_the_full_one(shape, share):
    c, places = drawn(shape, max(1, round(share * shape[0] * shape[1])))
    expected = by_definition(c, places, shape, 7)
    assert (synthesis(c, places, shape, 7) - expected).abs().max() < 1e-12
    single = synthesis(c.float(), places, shape, 7)
    assert single.dtype == torch.float32
    assert (single - expected).norm() <= rounding(terms=sum(shape)) * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_factors_give_the_same_update(shape):
    c, places = drawn(shape, max(1, shape[0] * shape[1] // 2))
    left, right = fourier_factors(places, shape)
    both = 7 / (shape[0] * shape[1]) * torch.cat([c, c])
    assert (left * both @ right.T - by_definition(c, places, shape, 7)).abs().max() < 1e-12


def test_fourier_factors_of_wide_weights_are_accurate():
    """Phases of 4096 x 4095 turns match integer arithmetic."""
    left, right = fourier_factors(torch.tensor([[4095, 2049], [4095, 3]]), (4096, 4096))
    turns = np.outer(np.arange(4096, dtype=object), [4095, 3]) % 4096
    assert np.abs(right[:, :2].numpy() - np.cos(turns.astype(float) * 2 * np.pi / 4096)).max() < 1e-12
    assert left[4000, 2].item() == pytest.approx(-np.sin(2 * np.pi * (4000 * 4095 % 4096) / 4096), abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_transform_of_the_weight_gradient(shape):
    c, places = drawn(shape, max(1, shape[0] * shape[1] // 2))
    c.requires_grad_(True)
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = 7 / G.numel() * torch.fft.fft2(G).real[tuple(places)]
    assert (torch.autograd.grad((synthesize(c, places, shape, 7) * G).sum(), c)[0] - expected).abs().max() < 1e-10
    assert (torch.autograd.grad((by_definition(c, places, shape, 7) * G).sum(), c)[0] - expected).abs().max() < 1e-10
    assert (analysis(G, places, shape, 7) - expected).abs().max() < 1e-10


def test_synthesize_is_twice_differentiable():
    c, places = drawn((5, 6), 12)
    c.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda c: synthesize(c, places, (5, 6), 30).tanh(), c)
    assert torch.autograd.gradgradcheck(lambda c: synthesize(c, places, (5, 6), 30).tanh(), c)


def test_two_threads_give_the_same_update_of_size_2048():
    """Some builds scale multithreaded float32 transforms of exactly this size twice."""
    shape, threads = (2048, 2048), torch.get_num_threads()
    c, places = drawn(shape, 100)
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, right = fourier_factors(places, shape)
    expected = left * (7 / 2048**2 * torch.cat([c, c])) @ right.T
    gradient = 7 / 2048**2 * ((left.T @ G.double()) * right.T).sum(1).view(2, -1).sum(0)
    torch.set_num_threads(2)
    try:
        found, back = synthesis(c.float(), places, shape, 7), analysis(G, places, shape, 7)
    finally:
        torch.set_num_threads(threads)
    bound = rounding(depth=2 * 11 * 4)  # sides, stages, rounding errors of a butterfly
    assert (found - expected).norm() < bound * expected.norm()
    assert (back - gradient).norm() < bound * gradient.norm()


def hosted(host: nn.Module, n: int, alpha: float = 50) -> nn.Module:
    shape = tuple(host_weight(host).shape)
    c, places = drawn(shape, n)
    attach(host, {"": FourierDelta(c.to(host.weight.dtype), places, shape, alpha)})
    return host


HOSTS = {
    "square": lambda: nn.Linear(40, 40),
    "wide": lambda: nn.Linear(48, 32),
    "tall": lambda: nn.Linear(32, 48, bias=False),
    "Conv1D": lambda: Conv1D(48, 32),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("n", [3, 200])
def test_forward_equals_the_folded_weight(host, n):
    """Basis form is used with 3 coefficients, the sum of weights with 200."""
    host = hosted(HOSTS[host]().double(), n)
    assert use_basis_form(n, host.delta.shape) == (n == 3)
    x = torch.randn(2, 5, host_weight(host).shape[1], dtype=torch.float64, requires_grad=True)
    bias = host.bias
    before, W = F.linear(x, host_weight(host), bias), host_weight(host).detach().clone()
    y = host(x)
    c = host.delta.coefficients
    update = by_definition(c, host.delta.entries, host.delta.shape, 50)
    assert (y - before - F.linear(x, update)).abs().max() < 1e-12
    assert (host.delta(x) - F.linear(x, update)).abs().max() < 1e-12
    target = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad((y * target).sum(), (x, c)),
        torch.autograd.grad(((before + F.linear(x, update)) * target).sum(), (x, c)),
        strict=True,
    ):
        assert (found - wanted).abs().max() < 1e-10
    dW = host.delta.weight().detach()
    fold(host)
    assert (host(x) - y).abs().max() < 1e-12
    with torch.no_grad():
        host_weight(host).sub_(dW)
    assert (host_weight(host) - W).abs().max() < 1e-14


def trained_steps(model: nn.Module, method: FourierFT, steps: int = 3) -> nn.Module:
    method.attach(model)
    optimizer = method.optimizer(model, method.lr, method.head_lr, 0.0)
    for step in range(steps):
        optimizer.zero_grad()
        model(**inputs(model, seed=step)).logits.square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_trained_update_is_symmetric_and_differs_from_the_initial_one(family):
    method = FourierFT(targets="all-linear")
    torch.manual_seed(0)
    model = trained_steps(tiny(family).double(), method, 0)
    start = {name: update.dense() for name, update in deltas(model)}
    torch.manual_seed(0)
    model = trained_steps(tiny(family).double(), method)
    found = dict(deltas(model))
    assert len(found) >= 8
    for name, update in found.items():
        assert isinstance(update, Fourier)
        dense = attached_deltas(model)[name].weight().detach().numpy()
        assert np.abs(dense - np.roll(dense[::-1, ::-1], (1, 1), (0, 1))).max() < 1e-12
        assert np.abs(update.dense() - dense).max() < 1e-12
        assert update.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-10)
        assert np.linalg.norm(dense - start[name]) > 0
        assert update.rank <= min(*update.shape, 2 * len(update.coefficients))


def test_only_coefficients_and_head_train():
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained_steps(model, FourierFT())
    deltas_held = [name for name in model.state_dict() if ".delta." in name]
    assert {name.rpartition(".")[2] for name in deltas_held} == {"coefficients", "entries"}
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value) != name.startswith("classifier.")
    groups = FourierFT().optimizer(model, 5e-2, 5e-3, 0.1).param_groups
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("adapter", 0.0), ("head", 0.1), ("head", 0.0),
    ]  # fmt: skip


def test_zero_coefficients_start_at_the_base():
    model = tiny("bert").requires_grad_(False)
    before = model(**inputs(model)).logits
    FourierFT(init="zeros").attach(model)
    assert torch.equal(model(**inputs(model)).logits, before)
    model(**inputs(model)).logits.square().sum().backward()
    assert all(delta.coefficients.grad.any() for delta in attached_deltas(model).values())


def test_default_targets_sizes_and_entries():
    model = tiny("llama")
    FourierFT().attach(model)
    found = attached_deltas(model)
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "v_proj"}
    for name, delta in found.items():
        shape = (32, 32) if name.endswith("q_proj") else (16, 32)  # grouped queries
        assert delta.shape == shape
        assert len(delta.coefficients) == 4 * min(shape)
        assert delta.entries.tolist() == entries(shape, 4 * min(shape), 2024).tolist()


def test_entries_use_entry_seed_and_coefficients_the_seed_of_the_run():
    def attached(global_seed, **fields):
        model = tiny("bert")
        torch.manual_seed(global_seed)
        FourierFT(**fields).attach(model)
        return next(iter(attached_deltas(model).values()))

    one, other = attached(1), attached(2)
    assert torch.equal(one.entries, other.entries)
    assert not torch.equal(one.coefficients, other.coefficients)
    assert torch.equal(one.coefficients, attached(1, entry_seed=3).coefficients)
    assert not torch.equal(one.entries, attached(1, entry_seed=3).entries)
    biased = attached(1, center=4, width=2)
    assert biased.entries.tolist() == entries((32, 32), 128, 2024, 4, 2).tolist()
    for basis in ("random", "orthogonal"):
        one, same = (attached(seed, entry_seed=3, basis=basis) for seed in (1, 2))
        for side, matrix in zip(("left", "right"), fourier.bases((32, 32), 3, basis), strict=True):
            assert torch.equal(getattr(one, side), getattr(same, side))
            assert torch.equal(getattr(one, side), torch.from_numpy(matrix).float())
            assert not torch.equal(getattr(one, side), getattr(attached(1, basis=basis), side))


def test_restored_entries_take_effect():
    """This includes the waves, which are cached between calls."""
    for n in (2, 100):
        host, other = hosted(nn.Linear(32, 32).double(), n), hosted(nn.Linear(32, 32).double(), n)
        x = torch.randn(3, 32, dtype=torch.float64)
        host(x)
        with torch.no_grad():
            host.delta.entries.copy_(other.delta.entries.flip(0))
        expected = by_definition(host.delta.coefficients, other.delta.entries.flip(0), (32, 32), 50)
        assert (host.delta(x) - F.linear(x, expected)).abs().max() < 1e-12


def gradients(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    model(**inputs(model)).logits.square().mean().backward()
    return torch.cat([delta.coefficients.grad for delta in attached_deltas(model).values()])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("coefficients", [3, 150])
@pytest.mark.filterwarnings("ignore")
def test_update_and_gradients_match_peft(family, coefficients):
    ours, theirs = tiny(family), tiny(family)
    torch.manual_seed(0)
    FourierFT(targets="all-linear", coefficients=coefficients, alpha=60, entry_seed=777).attach(ours)
    options = {"n_frequency": coefficients, "scaling": 60.0, "random_loc_seed": 777}
    options |= {"target_modules": list(attached_deltas(ours)), "fan_in_fan_out": family == "gpt2"}
    theirs = peft.get_peft_model(theirs, peft.FourierFTConfig(**options))
    pairs = []
    for name, delta in attached_deltas(ours).items():
        layer = theirs.get_base_model().get_submodule(name)
        other = layer.fourierft_spectrum["default"]
        other.data.copy_(delta.coefficients.data)
        assert (delta.weight() - layer.get_delta_weight("default")).norm() <= rounding(
            terms=TINY
        ) * delta.weight().norm()
        assert torch.equal(delta.entries, layer.indices["default"])
        pairs.append((delta.coefficients, other))

    found = []
    for model, which in ((ours, 0), (theirs, 1)):
        logits = model(**inputs(ours)).logits
        logits.double().square().mean().backward()
        found.append((logits.detach().double(), torch.cat([pair[which].grad for pair in pairs])))
    (logits, mine), (expected, other) = found
    assert (logits - expected).norm() <= forward(ours, inputs(ours)) * expected.norm()
    assert (mine - other).norm() <= rounding(terms=TINY, growth=amplification(ours, gradients)) * other.norm()


@pytest.mark.parametrize("n", [3, 200])
def test_layer_under_autocast_has_bfloat16_accuracy(n):
    host = hosted(nn.Linear(64, 64), n)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    target = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    found = []
    for autocast in (False, True):
        host.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = host(x)
        (y.float() * target).sum().backward()
        found.append((y.detach().float(), host.delta.coefficients.grad.clone()))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() < 2**-6 * exact.norm()


@pytest.mark.parametrize("coefficients", [5, 150])
def test_bfloat16_model_equals_its_folded_model(coefficients):
    """Coefficients of a bfloat16 model stay float32, and the folded model equals the adapted one."""
    model = tiny("bert").to(torch.bfloat16)
    FourierFT(coefficients=coefficients).attach(model)
    assert {delta.coefficients.dtype for delta in attached_deltas(model).values()} == {torch.float32}
    logits = model(**inputs(model)).logits
    logits.float().square().sum().backward()
    folded = copy.deepcopy(model)
    fold(folded)
    error = (folded(**inputs(model)).logits - logits).float().norm() / logits.float().norm()
    assert error < 2**-6
    model.to(torch.bfloat16)  # converts the coefficients too; the transform still uses float32
    assert model(**inputs(model)).logits.isfinite().all()


def test_model_equals_its_folded_model_under_autocast():
    model = tiny("bert")
    FourierFT(targets="all-linear").attach(model)
    folded = copy.deepcopy(model)
    fold(folded)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one, other = (m(**inputs(m), output_hidden_states=True).hidden_states[-1].double() for m in (model, folded))
    assert (one - other).norm() / other.norm() < 2**-7


def test_model_can_be_detached_copied_and_pickled():
    model = tiny("bert")
    keys = set(model.state_dict())
    FourierFT(coefficients=3).attach(model)
    before = model(**inputs(model)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs(twin)).logits, before)
        next(iter(attached_deltas(twin).values())).coefficients.data.add_(1)
        assert not torch.equal(twin(**inputs(twin)).logits, before)
    assert torch.equal(model(**inputs(model)).logits, before)
    detach(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(model(**inputs(model)).logits, tiny("bert")(**inputs(model)).logits)


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 128)])
def test_norm_of_other_bases_matches_the_fourier_basis(kind, shape):
    """E |dW|^2 = alpha^2 n / (2 d1 d2), averaged over bases and coefficients."""
    n, alpha = 300, 80
    expected = alpha**2 * n / (2 * shape[0] * shape[1])
    squares = {"fourier": [], kind: []}
    for seed in range(30):
        c, places = drawn(shape, n, seed)
        squares["fourier"].append(Fourier(c.numpy(), places.numpy(), shape, alpha).norm() ** 2)
        squares[kind].append(BasisDelta(c, places, *fourier.bases(shape, seed, kind), alpha).update().norm() ** 2)
    for values in squares.values():
        assert np.mean(values) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
def test_random_and_orthogonal_bases_match_their_definition(kind):
    drawn_bases = fourier.bases((24, 32), 5, kind)
    c, places = drawn((24, 32), 50)
    delta = BasisDelta(c, places, *drawn_bases, 80)
    left, right = map(torch.from_numpy, drawn_bases)
    j, k = places
    expected = sum(c[i] * torch.outer(left[:, j[i]], right[:, k[i]]) for i in range(50)) * 80 / (2 * 24 * 32) ** 0.5
    assert (delta.weight() - expected).abs().max() < 1e-12
    if kind == "orthogonal":
        assert (left.T @ left - torch.eye(24)).abs().max() < 1e-12
    else:
        assert fourier.bases((500, 2), 5, kind)[0].std() == pytest.approx(500**-0.5, rel=0.01)
    assert all(map(np.array_equal, fourier.bases((24, 32), 5, kind), drawn_bases))
    model = tiny("bert")
    FourierFT(basis=kind, targets="all-linear").attach(model)
    before = model(**inputs(model)).logits
    before.square().sum().backward()
    assert all(delta.coefficients.grad.any() for delta in attached_deltas(model).values())
    fold(model)
    assert (model(**inputs(model)).logits - before).norm() <= forward(model, inputs(model)) * before.norm()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("embed", "q")}, "embedding .*word_embeddings'.* FourierFT"),
        ({"coefficients": 0}, "query': number of coefficients must be from 1 to 1024.* got 0"),
        ({"coefficients": 1025}, "query': number of coefficients must be .*, got 1025"),
        ({"alpha": 0}, "alpha must be .*, got 0"),
        ({"alpha": float("nan")}, "alpha must be .*, got nan"),
        ({"center": 30}, "query': center .*22.63.* 32 x 32.* got 30"),
        (
            {"center": 2, "width": 0.01, "coefficients": 30},
            "number of coefficients .*center 2 .* got 30",
        ),
        ({"entry_seed": -1}, "entry_seed .*got -1"),
        ({"center": 1, "width": 0}, "center .*got center 1 and width 0"),
    ],
)
def test_invalid_input_raises_one_line(fields, message):
    model = tiny("bert")
    with pytest.raises(ValueError, match=message) as raised:
        FourierFT(**fields).attach(model)
    assert "\n" not in str(raised.value)
    assert not attached_deltas(model)


FAST = killing.SETTINGS | {"observe": killing.observers()}
METHOD = FourierFT(coefficients=200, targets="all-linear", lr=0.1)


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("fourier") / "run"
    return ls.train(models.load(bert, task=task), task, METHOD, out=out, **FAST)


def test_run_stores_coefficients_and_entries_and_returns_its_updates(run, bert, task):
    model = models.load(bert, task=task)
    run.restore(model)
    stored, first = run.updates(), run.updates(step=0)
    last = run.table[run.table["step"] == 5].set_index(["quantity", "module"])["value"]
    summary = run.summary().set_index("module")
    assert set(stored) == set(attached_deltas(model))
    for name, delta in attached_deltas(model).items():
        dense, base = delta.weight().detach().numpy(), host_weight(model.get_submodule(name)).detach().numpy()
        assert isinstance(stored[name], Fourier)
        assert stored[name].dense() == near(dense, terms=TINY)
        learned = dense - first[name].dense()
        expected = {
            "update_norm": np.linalg.norm(dense),
            "learned_norm": np.linalg.norm(learned),
            "weight_norm": np.linalg.norm(base + dense),
            "relative_update": np.linalg.norm(dense) / np.linalg.norm(base),
        }
        growth = expected["update_norm"] / expected["learned_norm"]
        for quantity, value in expected.items():
            assert last[quantity, name] == near(value, terms=TINY, growth=growth)
            assert summary.loc[name, quantity] == near(value, terms=TINY, growth=growth)
        assert last["step_norm", name] > 0
        assert last["adapter_norm", name] == near(delta.coefficients.detach().norm(), terms=200)
        assert last["stable_rank", name] == near(stable_rank(stored[name].singular_values()), terms=TINY)
        assert last["rank", name] == run.ranks()[name] == summary.loc[name, "rank"] == np.linalg.matrix_rank(dense)
        assert run.factors()[name].keys() == {"coefficients", "entries", "shape"}
    assert summary["exact"].all()


def test_step_zero_of_the_table_is_the_initial_update(run):
    start = run.table[run.table["step"] == 0].set_index(["quantity", "module"])["value"]
    updates = run.updates(step=0)
    assert set(updates) == set(run.ranks())
    for name, update in updates.items():
        assert start["update_norm", name] == pytest.approx(update.norm())
        assert start["learned_norm", name] == 0


def test_radius_energy_matches_the_spectrum(run):
    shares = run.table[run.table["quantity"] == "radius_energy"]
    assert set(shares["step"]) == {0, 5}
    for (step, name), rows in shares.groupby(["step", "module"], observed=True):
        update = run.updates(step=step)[name]
        j, k = update.entries
        spectrum = np.zeros(update.shape)
        np.add.at(spectrum, (j, k), update.coefficients)
        even = (spectrum + np.roll(spectrum[::-1, ::-1], (1, 1), (0, 1))) / 2
        across, down = np.nonzero(even)
        folded = [np.minimum(i, side - i) for i, side in zip((across, down), update.shape, strict=True)]
        edges = np.arange(9) / 8 * np.hypot(update.shape[0] // 2, update.shape[1] // 2)
        whole = np.histogram(np.hypot(*folded), edges, weights=even[across, down] ** 2)[0]
        assert rows.sort_values("index")["value"].to_numpy() == near(whole / whole.sum(), terms=200)


@pytest.mark.parametrize("basis", ["random", "orthogonal"])
def test_other_bases_record_norms_and_the_learned_update(basis, gpt2, task, tmp_path):
    """Conv1D is included; the run stores its shape as (out, in)."""
    method = FourierFT(coefficients=20, basis=basis, targets="all-linear")
    found = ls.train(models.load(gpt2, task=task), task, method, out=tmp_path / "run", **FAST)
    assert not found.updates()
    assert "radius_energy" not in set(found.table["quantity"])
    summary = found.summary().set_index("module")
    learned = summary["learned_norm"]
    assert learned.gt(0).all()
    added = initial_update.learned_updates(found)
    assert {update.shape for update in added.values()} == {(32, 32), (96, 32), (128, 32), (32, 128)}
    assert {name: update.norm() for name, update in added.items()} == pytest.approx(
        dict(learned), rel=rounding(terms=TINY, growth=10)
    )
    drawn = plots.spectrum(found, added=True).data["value"].to_numpy()
    assert np.count_nonzero(drawn > 1e-6 * drawn[0]) <= 20
    assert np.linalg.norm(drawn) == near(learned[summary["update_norm"].idxmax()], terms=TINY, growth=10)


@pytest.mark.parametrize(
    "method",
    [FourierFT(coefficients=3), FourierFT(basis="random", coefficients=30), FourierFT(center=4, width=2)],
)
def test_restored_run_gives_the_same_logits(method, bert, task, tmp_path):
    model = models.load(bert, task=task)
    found = ls.train(model, task, method, out=tmp_path / "run", **FAST)
    again = models.load(bert, task=task)
    found.restore(again)
    assert torch.equal(again(**inputs(again)).logits, model.eval()(**inputs(again)).logits)
    for name, delta in attached_deltas(model).items():
        assert torch.equal(attached_deltas(again)[name].entries, delta.entries)


def test_exports_to_lora_raise_one_line(run):
    updates = run.updates()
    module = next(iter(updates))
    for refused in (
        run.lora_config,
        lambda: export.rank_pattern(run, 0.5),
        lambda: subspace_similarity.similarity_of_runs(updates, updates, module),
    ):
        with pytest.raises(ValueError, match=r"is not a product B A|has no factor A") as raised:
            refused()
        assert "\n" not in str(raised.value)
    alike = subspace_similarity.similarity_of_runs(updates, updates, module, side="update")
    assert alike["phi"].iloc[-1] == pytest.approx(1)


def test_run_can_be_inspected_and_plotted(run):
    found = inspect(run)
    adapted_ones = found.modules[found.modules["rank"].notna()]
    assert adapted_ones["parameters"].tolist() == [200] * len(run.updates())
    assert adapted_ones["effective_rank"].gt(1).all()
    for figure in ("update_norm", "spectrum", "norm_over_steps", "training_curves"):
        getattr(plots, figure)(run)


def test_bfloat16_run_on_conv1d_trains(gpt2, task, tmp_path):
    method = FourierFT(targets="all-linear")
    found = ls.train(models.load(gpt2, task=task), task, method, out=tmp_path / "run", precision="bf16", **FAST)
    assert len(found.updates()) == 8
    assert found.summary()["learned_norm"].gt(0).all()
