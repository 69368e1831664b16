"""Observers of second moments compared with averages and decompositions that are computed here."""

from __future__ import annotations

from dataclasses import dataclass

import killing
import numpy as np
import pytest
import torch
from tolerance import TEXT, TINY, near, rounding

import lorascope as ls
from lorascope import observe
from lorascope.analysis import optimizer_moments
from lorascope.inputs import models
from lorascope.methods import Adapprox, Full
from lorascope.observe import optimizer_moments as moving

FAST = killing.SETTINGS | {"steps": 4}


def test_rank_one_factors_have_the_row_and_column_sums():
    A = np.array([[4, 2, 1], [2, 2, 1], [1, 1, 3], [0, 1, 2]], float)
    assert optimizer_moments.rank_one(A).sum(0) == pytest.approx(A.sum(0))
    assert optimizer_moments.rank_one(A).sum(1) == pytest.approx(A.sum(1))
    assert optimizer_moments.frobenius_error(A, optimizer_moments.rank_one(A)) == pytest.approx(0.461095, abs=1e-6)
    assert not optimizer_moments.rank_one(np.zeros((2, 3))).any()


def test_tail_of_worked_spectrum():
    sigma = np.array([6.0671, 2.9191, 0.8183])
    assert optimizer_moments.tail_error(sigma, 1) == pytest.approx(0.44698, abs=1e-4)
    assert optimizer_moments.tail_error(sigma, 2) == pytest.approx(0.120645, abs=1e-4)
    assert optimizer_moments.tail_error(sigma, 3) == 0


def test_same_marginals_keeps_the_sums_but_not_the_singular_vectors():
    draw = np.random.default_rng(0)
    rank_one = np.outer(draw.random(60), draw.random(40))
    hidden = rank_one * (1 + 0.9 * np.outer(np.sign(draw.standard_normal(60)), np.sign(draw.standard_normal(40))))
    hidden[5] = 0
    shuffled = optimizer_moments.same_marginals(hidden, seed=1)
    assert shuffled.sum(0) == pytest.approx(hidden.sum(0), rel=1e-6)
    assert shuffled.sum(1) == pytest.approx(hidden.sum(1), rel=1e-6, abs=1e-12)
    assert (shuffled >= 0).all()
    own, other = (np.linalg.svd(matrix, compute_uv=False) for matrix in (hidden, shuffled))
    assert optimizer_moments.tail_error(own, 3) < 1e-6
    assert optimizer_moments.tail_error(other, 3) > 0.3
    # A matrix of rank one is determined by its sums, so it is unchanged.
    assert optimizer_moments.same_marginals(rank_one, seed=1) == pytest.approx(rank_one)


@pytest.fixture(scope="module")
def adam(bert, task, tmp_path_factory):
    model = models.load(bert, task=task)
    kept = {}

    class Keeping(observe.Observer):
        def __call__(self, step):
            if step.last:
                for name, parameter in step.model.named_parameters():
                    kept[name.removesuffix(".weight")] = step.optimizer.state[parameter]["exp_avg_sq"].double().numpy()
            return ()

    seen = [observe.second_moments(every=3), Keeping()]
    run = ls.train(model, task, Full(lr=1e-3), out=tmp_path_factory.mktemp("adam") / "run", **FAST | {"observe": seen})
    return run, kept


def test_singular_values_and_errors_match_adams_second_moment(adam):
    run, kept = adam
    found = run.table[run.table["quantity"].str.startswith("moment")]
    assert set(found["step"]) == {3, 4}
    assert found["layer"].notna().all()
    assert set(found["role"]) == {"q", "k", "v", "o", "ffn_in", "ffn_out"}
    last = found[found["step"] == 4]
    for module, rows in last.groupby("module", observed=True):
        V = kept[module]
        sigma = np.linalg.svd(V, compute_uv=False)
        values = rows.set_index(["quantity", "index"])["value"]
        assert values["moment_sigma"].to_numpy() == near(sigma / sigma[0], terms=TINY)
        assert values["moment_sigma"].index[0] == 1
        for rank, error in values["moment_error"].items():
            assert error == near(optimizer_moments.tail_error(sigma, int(rank)), 1, terms=TINY)
            assert values["moment_error_s_rsi", rank] >= error - rounding(terms=TINY)
            assert values["moment_error_s_rsi", rank] <= 1.3 * error + rounding(terms=TINY)
        rank_one = rows.loc[rows["quantity"] == "moment_error_rank_one", "value"].item()
        assert rank_one == near(optimizer_moments.frobenius_error(V, optimizer_moments.rank_one(V)), terms=TINY)
        assert rank_one >= values["moment_error", 1] - rounding(terms=TINY)


def test_factorization_methods_are_measured_on_one_block(bert, task, tmp_path):
    """Errors are compared with the SVD of the stored second moment; the global generator is unchanged."""
    kept = {}

    class Keeping(observe.Observer):
        def __call__(self, step):
            for name, parameter in step.model.named_parameters():
                if step.finished and "layer.1" in name and parameter.ndim == 2:
                    kept[name.removesuffix(".weight")] = step.optimizer.state[parameter]["exp_avg_sq"].double().numpy()
            return ()

    runs = [
        ls.train(models.load(bert, task=task), task, Full(lr=1e-3), out=tmp_path / name, **FAST | {"observe": seen})
        for name, seen in (("plain", []), ("seen", [observe.factorings(every=3, layer=1), Keeping()]))
    ]
    found = runs[1].table[runs[1].table["quantity"].str.startswith("factoring")]
    assert set(found["step"]) == {3, 4}
    assert set(found["module"]) == set(kept)
    assert len(kept) == 6
    for module, rows in found[found["step"] == 4].groupby("module", observed=True):
        values = rows.set_index(["quantity", "index"])["value"]
        sigma = np.linalg.svd(kept[module], compute_uv=False)
        least = [optimizer_moments.tail_error(sigma, rank) for rank in (1, 2, 4, 8, 16)]
        assert values["factoring_error_svd"].to_numpy() == pytest.approx(least, rel=1e-3)
        for way in ("l1_p5", "l2_p5", "l5_p0", "l5_p5", "svd_lowrank"):
            excess = values[f"factoring_error_{way}"].to_numpy() / least
            assert (excess > 1 - 1e-3).all()
            assert (excess < {"l1_p5": 6, "l2_p5": 2}.get(way, 1.3)).all(), way
        assert (values["factoring_error_l1_p5"] > values["factoring_error_l5_p5"]).all()
        assert values[[f"factoring_seconds_{way}" for way in (*moving.FACTORIZATIONS, "svd")]].gt(0).all()
    losses = [run.table.query("quantity == 'loss'")["value"].tolist() for run in runs]
    assert losses[0] == losses[1]


def test_time_of_a_decomposition_is_the_shorter_of_two(monkeypatch):
    ticks = iter([0.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr(moving.time, "perf_counter", lambda: next(ticks))
    found, seconds = moving._time_decomposition(lambda: (torch.ones(1, 1),))
    assert found == (torch.ones(1, 1),)
    assert seconds == 2


def test_svd_lowrank_does_not_change_the_global_generator():
    V = torch.rand(40, 30)
    before = torch.get_rng_state()
    left, right = moving.svd_lowrank(V, 3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert (left.shape, right.shape) == ((40, 3), (30, 3))
    sigma = torch.linalg.svdvals(V)
    assert float((V - left @ right.T).norm() / V.norm()) == pytest.approx(
        optimizer_moments.tail_error(sigma.numpy(), 3), rel=1e-3
    )


METHOD = Adapprox(lr=1e-3, min_dim=8, rank_rule="fixed", init_rank=3)
SQUARES: dict = {"terms": TINY, "growth": 4 * TEXT}  # gradients, and the smallest singular values of their average


@dataclass(kw_only=True)
class LastGroupFirst(Adapprox):
    """Adapprox whose first group has no matrix of a block, and another beta2."""

    def optimizer(self, *arguments):
        found = super().optimizer(*arguments)
        first, last = found.param_groups[0], found.param_groups[-1]
        first["params"], last["params"] = last["params"], first["params"]
        first["betas"] = (0.9, 0.5)
        return found


@pytest.mark.parametrize("method", [METHOD, LastGroupFirst(**vars(METHOD))], ids=["as given", "last group first"])
def test_drift_is_the_error_compared_with_the_exact_average(method, bert, task, tmp_path):
    """The gradients of every step are stored and averaged here."""
    seen, factors = {}, {}

    class Catching(observe.Observer):
        def __call__(self, step):
            for name, parameter in step.model.named_parameters():
                if parameter.grad is not None and "Q" in step.optimizer.state[parameter]:
                    state = step.optimizer.state[parameter]
                    seen.setdefault(name.removesuffix(".weight"), []).append(parameter.grad.double().numpy() ** 2)
                    factors[name.removesuffix(".weight")] = (state["Q"] @ state["U"].T).double().numpy()
            return ()

    settings = FAST | {"observe": [observe.factor_drift(every=9), Catching()]}
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **settings)
    drifts = run.table[run.table["quantity"].str.startswith("factor_drift")]
    assert set(drifts["step"]) == {4}
    for module, rows in drifts.groupby("module", observed=True):
        E = sum(0.001 * 0.999 ** (3 - t) * squares for t, squares in enumerate(seen[module]))
        values = rows.set_index("quantity")["value"]
        norms = run.table.query("quantity == 'factor_norm' and module == @module and step == 4")["value"]
        assert norms.item() == near(np.linalg.norm(factors[module]), terms=TINY)
        assert values["factor_drift"] == near(optimizer_moments.frobenius_error(E, factors[module]), **SQUARES)
        assert values["factor_drift_least"] == near(
            optimizer_moments.tail_error(np.linalg.svd(E, compute_uv=False), 3), **SQUARES
        )
        assert values["factor_drift"] > values["factor_drift_least"]
        assert values["factor_drift_rank_one"] == near(
            optimizer_moments.frobenius_error(E, optimizer_moments.rank_one(E)), **SQUARES
        )


def test_step_error_is_recorded_with_the_best_error_of_its_rank(bert, task, tmp_path):
    """V of a step is computed here from the previous factors and the stored gradients."""
    seen = {}

    class Catching(observe.Observer):
        def __call__(self, step):
            for name, parameter in step.model.named_parameters():
                state = step.optimizer.state.get(parameter, {})
                if "Q" in state:
                    product = (state["Q"].double() @ state["U"].double().T).numpy()
                    caught = seen.setdefault(name.removesuffix(".weight"), [])
                    caught.append((product, parameter.grad.double().numpy() ** 2))
            return ()

    settings = FAST | {"observe": [observe.factor_optimum(every=3), Catching()]}
    run = ls.train(models.load(bert, task=task), task, METHOD, out=tmp_path / "run", **settings)
    found = run.table[run.table["quantity"].str.startswith("factor_step")]
    assert set(found["step"]) == {3, 4}
    for (module, step), rows in found.groupby(["module", "step"], observed=True):
        (before, _), (product, squares) = seen[module][step - 2 : step]
        V = 0.999 * before.clip(0) + 0.001 * squares
        values = rows.set_index("quantity")["value"]
        assert values["factor_step_error"] == near(optimizer_moments.frobenius_error(V, product), **SQUARES)
        least = optimizer_moments.tail_error(np.linalg.svd(V, compute_uv=False), 3)
        assert values["factor_step_error_least"] == near(least, **SQUARES)
        assert values["factor_step_error"] >= least * (1 - 1e-6)
    # At a step that selects a rank, it equals the error that the method records.
    whole = ls.train(
        models.load(bert, task=task), task, METHOD, out=tmp_path / "once",
        **FAST | {"steps": 1, "observe": [observe.factor_optimum()]},
    ).table  # fmt: skip
    both = whole.pivot_table(index="module", columns="quantity", values="value", observed=True)
    both = both.dropna(subset=["factor_step_error"])
    assert len(both) == 12
    assert both["factor_step_error"].to_numpy() == near(both["factor_error"].to_numpy(), **SQUARES)


def test_optimizer_without_second_moments_has_no_records(bert, task, tmp_path):
    settings = FAST | {"steps": 1, "observe": [observe.second_moments(), observe.factor_drift()]}
    method = Full(optimizer_name="adafactor")
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **settings)
    assert not run.table["quantity"].str.startswith(("moment", "factor")).any()
