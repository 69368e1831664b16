"""Test statistics of HydraLoRA's routers and experts against counts and norms of single tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import inputs, tiny
from tolerance import TINY, near
from torch import nn

import lorascope as ls
from lorascope import observe
from lorascope.adapters.delta import attached_deltas
from lorascope.analysis.head_similarity import cosines, mean_of_pairs, update_inner
from lorascope.inputs import models
from lorascope.methods import HydraLoRA
from lorascope.methods.hydralora_routing import Routing, stack_gates, watch
from lorascope.runs.run import Run

FAST = {"steps": 5, "batch_size": 8, "eval_every": 0, "eval_size": 16, "progress": False, "device": "cpu"}

SHARP = 10  # factor of the routers, by which their softmax amplifies an error of the input


def sharp(family: str, shared_a: bool = True) -> nn.Module:
    """Build a tiny model with sharp routers and nonzero experts."""
    model = tiny(family)
    HydraLoRA(targets="all-linear", shared_a=shared_a).attach(model)
    for seed, delta in enumerate(attached_deltas(model).values()):
        delta.router.data *= SHARP
        nn.init.normal_(delta.B, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def token_by_token(delta: nn.Module, rows: torch.Tensor, real: torch.Tensor) -> dict[str, np.ndarray]:
    """Compute all statistics of one module in loops over rows, tokens and experts, in float64."""
    rank, number = delta.B.shape[1] // delta.number, delta.number
    router, A, B = (part.detach().double() for part in (delta.router, delta.A, delta.B))
    gates, added, tops, neighbors = [], [], [], []
    for row, keep in zip(rows.double(), real.tolist(), strict=True):
        before = None
        for x, counted in zip(row, keep, strict=True):
            if not counted:
                before = None
                continue
            w = torch.softmax(router @ x, 0)
            heads = [(B[:, i * rank : (i + 1) * rank], A if len(A) == rank else A[i * rank : (i + 1) * rank])
                     for i in range(number)]  # fmt: skip
            gates.append(w.numpy())
            added.append([w[i].item() * delta.scale * torch.linalg.norm(b @ (a @ x)).item() for i, (b, a) in
                          enumerate(heads)])  # fmt: skip
            top = int(w.argmax())
            neighbors += [] if before is None else [top != before]
            tops.append(top)
            before = top
    importance, used = np.mean(added, 0), np.mean(gates, 0)
    return {
        "gate_std": np.std(gates, 0),
        "gate_top1": np.bincount(tops, minlength=number) / len(tops),
        "gate_cv2": np.sum((used - 1 / number) ** 2) / (number - 1) * number**2,
        "gate_switch": np.mean(neighbors),
        "head_importance": importance,
        "head_share": importance / importance.sum(),
    }


def watched(model: nn.Module, batch: dict) -> dict[str, Routing]:
    found = attached_deltas(model)
    gates = {name: delta.gates for name, delta in found.items()}
    sizes = {name: delta.head_sizes for name, delta in found.items()}
    return watch(model, gates, batch, lambda: model(**batch), sizes)


def inputs_of(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    given: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: given.setdefault(name, x[0]))
        for name in attached_deltas(model)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return given


@pytest.mark.parametrize("shared_a", [True, False])
def test_statistics_match_loops_over_tokens_without_padding(shared_a):
    model = sharp("bert", shared_a)
    batch = inputs(model)
    batch["attention_mask"][0, 3:] = 0
    batch["attention_mask"][1, :2] = 0  # padding on the left
    real, seen = batch["attention_mask"].bool(), watched(model, batch)
    for name, rows in inputs_of(model, batch).items():
        if rows.shape[:2] != real.shape:  # the pooler has one vector per row and no padding
            rows, real_here = rows[:, None], torch.ones(len(rows), 1, dtype=torch.bool)
            assert math.isnan(seen[name].statistics()["gate_switch"])
        else:
            real_here = real
        expected = token_by_token(attached_deltas(model)[name], rows, real_here)
        found = seen[name].statistics()
        for quantity, value in expected.items():
            if quantity != "gate_switch" or rows.shape[1] > 1:
                assert found[quantity] == near(value, terms=TINY, growth=SHARP), quantity
        assert found["gate_top1"].sum() == pytest.approx(1)
    assert 0 < seen["bert.encoder.layer.0.output.dense"].statistics()["gate_switch"] < 1


def test_stacked_batches_equal_one_batch():
    model = sharp("gpt2")
    batch = inputs(model)
    whole = watched(model, batch)
    halves = [
        watched(model, {name: part[half] for name, part in batch.items()}) for half in (slice(0, 1), slice(1, None))
    ]
    assert set(whole) == set(attached_deltas(model)) != set()
    for name, seen in whole.items():
        both, expected = stack_gates([half[name] for half in halves]).statistics(), seen.statistics()
        assert both["gate_switch"] == pytest.approx(expected["gate_switch"])
        for quantity in ("head_importance", "gate_std"):
            assert both[quantity] == near(expected[quantity], terms=TINY, growth=SHARP)


def routing(gates: list[list[float]]) -> dict[str, Any]:
    """Return the statistics of one row of tokens."""
    w = np.array(gates)
    top = w.argmax(1)
    nothing = np.full_like(w, np.nan)
    columns = (w, np.zeros(len(w)), np.ones(len(w)), w**2, np.eye(w.shape[1])[top], nothing)
    switches, pairs = [(top[1:] != top[:-1]).sum()], [len(w) - 1]
    sums = (column.sum(0, keepdims=True) for column in columns)
    return Routing(*sums, *(np.array(n, float) for n in (switches, pairs))).statistics()


def test_usage_cv2_is_0_for_uniform_gates_and_n_for_one_expert():
    assert routing([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])["gate_cv2"] == pytest.approx(0)
    assert routing([[1.0, 0, 0], [1, 0, 0]])["gate_cv2"] == pytest.approx(3)
    sample = np.array([0.5, 0.3, 0.2])
    assert routing([sample.tolist()])["gate_cv2"] == pytest.approx(torch.tensor(sample).var().item() * 9)


def test_switch_rate_matches_worked_numbers():
    assert routing([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])["gate_switch"] == pytest.approx(2 / 3)
    assert math.isnan(routing([[0.9, 0.1]])["gate_switch"])


def test_importance_without_norms_and_share_of_zero_experts_are_nan():
    model = sharp("bert")
    batch = inputs(model)
    seen = watch(
        model, {name: delta.gates for name, delta in attached_deltas(model).items()}, batch, lambda: model(**batch)
    )
    assert all(np.isnan(found.statistics()["head_importance"]).all() for found in seen.values())
    for delta in attached_deltas(model).values():
        nn.init.zeros_(delta.B)
    for found in watched(model, batch).values():
        assert not found.statistics()["head_importance"].any()
        assert np.isnan(found.statistics()["head_share"]).all()


def test_head_sizes_use_float32_under_autocast():
    model = sharp("bert")
    delta, x = next(iter(attached_deltas(model).values())), torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = delta.head_sizes(x)
    assert torch.equal(found, delta.head_sizes(x))


@pytest.mark.parametrize("shape", [(2, 4), (3, 2, 4)])
def test_inner_products_match_the_dense_updates(shape):
    draw = np.random.default_rng(0)
    A, B = draw.standard_normal(shape), draw.standard_normal((3, 5, 2))
    dense = np.array([(b @ a).ravel() for b, a in zip(B, np.broadcast_to(A, (3, 2, 4)), strict=True)])
    inner = update_inner(A, B)
    assert inner == pytest.approx(dense @ dense.T, abs=1e-12)
    assert mean_of_pairs(inner) == pytest.approx((inner[0, 1] + inner[0, 2] + inner[1, 2]) / 3)
    B[1] = 0
    found = cosines(update_inner(A, B))
    assert np.isnan(found[1]).all()
    assert found[0, 2] == pytest.approx(cosines(inner)[0, 2])


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory) -> Run:
    return trained(bert, task, HydraLoRA(gates_every=2), tmp_path_factory.mktemp("runs") / "run")


def trained(bert: str, task, method: HydraLoRA, out) -> Run:
    keep = [observe.norms(every=1), observe.factors(every=5)]
    return ls.train(models.load(bert, task=task), task, method, out=out, observe=keep, **FAST)


def values(run: Run, quantity: str, step: int) -> dict:
    rows = run.table[(run.table["quantity"] == quantity) & (run.table["step"] == step)]
    return {
        module: part.sort_values("index")["value"].to_numpy() for module, part in rows.groupby("module", observed=True)
    }


def test_recorded_statistics_match_the_restored_model(run, bert, task):
    model = models.load(bert, task=task)
    run.restore(model)
    batch = task.encode(models.tokenizer(model), task.split("validation").head(16)).batch(range(16))
    batch = {name: value for name, value in batch.items() if name != "labels"}
    seen = watched(model, batch)
    for quantity in ("gate_std", "gate_top1", "gate_cv2", "gate_switch", "head_importance", "head_share"):
        recorded = values(run, quantity, 5)
        assert set(recorded) == set(seen) != set()
        for module, found in recorded.items():
            expected = seen[module].statistics()[quantity]
            assert found == near(np.atleast_1d(expected), terms=TINY, growth=SHARP)
    for module, delta in attached_deltas(model).items():
        for head, one_hot in enumerate(np.eye(3)):
            dense = ls.at_gates(run, {module: one_hot}).updates()[module].dense()
            assert values(run, "head_norm", 5)[module][head] == near(np.linalg.norm(dense), terms=TINY)
        A, B = (delta.factors()[name].detach().numpy() for name in "AB")
        assert values(run, "head_cosine", 5)[module] == near(mean_of_pairs(cosines(update_inner(A, B))), 1, terms=TINY)


def test_statistics_are_recorded_from_step_zero(run):
    for quantity in ("head_norm", "head_cosine", "head_importance", "head_share", "gate_std", "gate_top1"):
        assert sorted(run.table.loc[run.table["quantity"] == quantity, "step"].unique()) == [0, 2, 4, 5]
    for module, norms in values(run, "head_norm", 0).items():
        assert not norms.any()
        assert np.isnan(values(run, "head_cosine", 0)[module]).all()
        assert np.isnan(values(run, "head_share", 0)[module]).all()
        assert values(run, "head_norm", 5)[module].min() > 0


def test_experts_without_router_have_norms_and_a_single_one_no_cosine(bert, task, tmp_path):
    even = trained(bert, task, HydraLoRA(router="uniform"), tmp_path / "even")
    assert all(found == near(1, terms=TINY) for found in values(even, "head_cosine", 5).values())
    assert not (even.table["quantity"] == "gate_top1").any()
    single = trained(bert, task, HydraLoRA(num_experts=1), tmp_path / "single")
    norms = values(single, "update_norm", 5)
    assert values(single, "head_norm", 5)["bert.encoder.layer.0.output.dense"] == near(
        norms["bert.encoder.layer.0.output.dense"], terms=TINY
    )
    assert not (single.table["quantity"] == "head_cosine").any()


def test_recording_gates_does_not_change_training(run, bert, task, tmp_path):
    """Training with another interval of recordings ends with the same weights."""
    rare = trained(bert, task, HydraLoRA(gates_every=5), tmp_path / "rare")
    assert set(run.factors()) == set(rare.factors()) == set(run.ranks()) != set()
    for module, held in run.factors().items():
        for name in ("A", "B", "router"):
            assert np.array_equal(held[name], rare.factors()[module][name])
