"""Observers compared with dense float64 matrices, which are formed from copies of the model at every step."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny
from tolerance import TEXT, TINY, near, rounding
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta, host_weights
from lorascope.adapters.host_weights import orient_weight, shared_copies, to_array
from lorascope.inputs import models
from lorascope.methods import LISA, AdaLoRA, ALoRA, AutoLoRA, DoRA, FourierFT, Full, HydraLoRA, LoRA, PiSSA
from lorascope.methods.lora import LoRADelta
from lorascope.methods.method import Method, Step, train_adapters
from lorascope.observe.trainable import TILE, TILES, joint_tile_sums, tile_sums
from lorascope.schema import module_table
from lorascope.updates import constant_factors
from lorascope.updates.linalg import product_inner

FAST = {"steps": 7, "batch_size": 8, "eval_every": 2, "eval_size": 16, "progress": False, "device": "cpu"}


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize(
    "types", [("float32",) * 3, ("bfloat16", "float32", "float32"), ("float64", "float32", "float64")]
)
def test_inner_product_with_a_product_equals_the_dense_one(shape: tuple[int, int], types: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = (shape, (shape[0], 3), (3, shape[1]))
    W, B, A = (
        torch.randn(side, generator=generator, dtype=torch.float64).to(getattr(torch, name))
        for side, name in zip(sides, types, strict=True)
    )
    dense = W.double() * (B.double() @ A.double())
    # The error of a sum is relative to the absolute values of its terms.
    tolerance = rounding(torch.float32, max(shape), 2) * float(
        (W.double().abs() @ A.double().abs().T @ B.double().abs().T).trace()
    )
    found = product_inner(W, B, A)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float(dense.sum()), abs=tolerance)


@dataclass(kw_only=True)
class Copying(observe.Observer):
    """Observer that stores base tensors and adapter updates after every step, dense and in float64."""

    every: int = 1
    kept: list = field(default_factory=list)

    def config(self):
        return {"name": "Copying"}

    def __call__(self, step):
        tensors = {n: p.detach().double().clone() for n, p in step.model.named_parameters() if n in step.base}
        updates = {}
        for module, adapter in delta.attached_deltas(step.model).items():
            factors = {name: factor.detach().double().clone() for name, factor in adapter.named_parameters()}
            matrix = factors["M"] if "M" in factors else adapter.scale * factors["B"] @ factors["A"]
            updates[module] = orient_weight(step.model.get_submodule(module), matrix)
        self.kept.append((tensors, updates, step.best))
        return ()


def parts_of(kept, t: int, modules: pd.DataFrame) -> dict[str, tuple]:
    """Return W, W - W_0, learned update, last step and W_0 of every tensor and every adapted module."""
    (first, first_updates, _), (now, updates, _) = kept[0], kept[t]
    before, before_updates, _ = kept[max(0, t - 1)]
    parts = {n: (now[n], now[n] - first[n], now[n] - first[n], now[n] - before[n], first[n]) for n in now}
    for module, update in updates.items():
        tied = {name: row.module for row in modules.itertuples() for name in row.tied.split(",")}
        W, change, learned, last, start = parts[f"{tied.get(module, module)}.weight"]
        learned = learned + update - first_updates[module]
        parts[module] = (W + update, change + update, learned, last + update - before_updates[module], start)
    return parts


def norms_of(parts: list[tuple]) -> dict[str, float]:
    """Compute the norms of several tensors together."""
    total = [math.sqrt(sum(float(part[i].square().sum()) for part in parts)) for i in range(5)]
    found = dict(zip(("weight_norm", "update_norm", "learned_norm", "step_norm"), total, strict=False))
    return found | {"relative_update": total[1] / total[4]}


def expected(kept, modules: pd.DataFrame, trained: set[str]) -> pd.DataFrame:
    """Return every norm of every trained module and block, after every step."""
    rows = []
    for t, (_, updates, _) in enumerate(kept):
        parts = parts_of(kept, t, modules)
        adapted = {f"{module}.weight" for module in updates}
        wanted = {module: [parts[module]] for module in updates}
        for module in modules.query("role != 'block'")["module"]:
            if f"{module}.weight" in trained - adapted:
                wanted[module] = [parts[f"{module}.weight"]]
        for block in modules.query("role == 'block'")["module"]:
            inside = [name for name in parts if name.startswith(f"{block}.")]
            if any(name in trained or name in updates for name in inside):
                wanted[block] = [parts[name] for name in inside if name not in adapted]
        for module, tensors in wanted.items():
            rows.extend((t, module, quantity, value) for quantity, value in norms_of(tensors).items())
    return pd.DataFrame(rows, columns=["step", "module", "quantity", "value"])


class Shifted(delta.Delta):
    """A dense update that does not start at zero."""

    def __init__(self, host):
        super().__init__()
        self.M = nn.Parameter(0.1 * torch.randn(*delta.host_weight(host).shape))

    def weight(self):
        return self.M


@dataclass(kw_only=True)
class Away(Method):
    """Dense and factored updates that do not start at zero, some of them on trained weights."""

    lr: float = 1e-2

    def attach(self, model):
        adapters = {}
        for number, name in enumerate(module_table.match(module_table.describe(model), ("q", "k", "ffn_in"))):
            host = model.get_submodule(name)
            adapters[name] = Shifted(host) if number % 2 else LoRADelta(host, 2, 0.5)
            if number % 2 == 0:
                nn.init.normal_(adapters[name].B, std=0.1)
        delta.attach(model, adapters)
        train_adapters(model)
        for number, name in enumerate(adapters):
            model.get_submodule(name).weight.requires_grad_(number > 3)


CASES = {
    "full, bert": ("bert", Full(lr=1e-2)),
    "full, gpt2: tied, Conv1D": ("gpt2", Full(lr=1e-2)),
    "lora, bert": ("bert", LoRA(lr=1e-2)),
    "lora everywhere, bert: a trained head with an adapter": (
        "bert",
        LoRA(lr=1e-2, targets=("all-linear", "embed", "head")),
    ),
    "lora everywhere, gpt2: both uses of a tied weight": (
        "gpt2",
        LoRA(lr=1e-2, targets=("all-linear", "embed", "lm_head")),
    ),
    "lora everywhere, llama": ("llama", LoRA(lr=1e-2, targets=("all-linear", "embed", "head"))),
    "nonzero initial updates, bert": ("bert", Away()),
}


@pytest.mark.parametrize("case", list(CASES))
def test_norms_equal_norms_of_dense_matrices(case, task, tmp_path, request):
    family, method = CASES[case]
    model = models.load(request.getfixturevalue(family), task=task)
    copying = Copying()
    kept = copying.kept
    run = ls.train(model, task, method, observe=[observe.norms(every=3), copying], out=tmp_path / "run", **FAST)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".delta." not in name}
    wanted = expected(kept, run.modules, trained)
    found = run.table[run.table["quantity"].isin(wanted["quantity"].unique())]
    recorded = {0, 3, 6, 7} | {t for t, (*_, best) in enumerate(kept) if best}
    assert set(found["step"]) == recorded
    wanted = wanted[wanted["step"].isin(recorded)]
    wanted = wanted[(wanted["quantity"] != "step_norm") | wanted["step"].isin({3, 6, 7})]
    keys = ["step", "module", "quantity"]
    both = found[[*keys, "value"]].astype({"module": str, "quantity": str}).merge(wanted, on=keys, how="outer")
    assert both.notna().all(axis=None), both[both.isna().any(axis=1)]
    np.testing.assert_allclose(both["value_x"], both["value_y"], rtol=rounding(terms=TINY, growth=TEXT), atol=1e-9)


@pytest.mark.parametrize("case", list(CASES))
def test_ranks_equal_ranks_of_dense_matrices(case, task, tmp_path, request):
    family, method = CASES[case]
    model = models.load(request.getfixturevalue(family), task=task)
    copying = Copying()
    observers = [observe.norms(every=3, spectra_every=5), copying]
    run = ls.train(model, task, method, observe=observers, out=tmp_path / "run", **FAST)
    table = run.table[run.table["quantity"].isin(["stable_rank", "effective_rank"])].astype({"module": str})
    found = table.pivot(index=["step", "module"], columns="quantity", values="value")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for (t, module), ranks in found.iterrows():
        parts = parts_of(copying.kept, t, run.modules)
        change = parts[module if module in parts else f"{module}.weight"][1]
        sigma = np.linalg.svd(change.numpy(), compute_uv=False)
        if not sigma.any():
            assert (ranks == 0).all(), (t, module)
            continue
        p = sigma / sigma.sum()
        p = p[p > 0]
        assert ranks["stable_rank"] == near((sigma**2).sum() / sigma[0] ** 2, terms=TINY, growth=TEXT)
        assert ranks["effective_rank"] == near(np.exp(-(p * np.log(p)).sum()), terms=TINY, growth=4 * TEXT)
    deltas = delta.attached_deltas(model)
    for module in run.modules.query("in_features == in_features")["module"]:
        steps = set(found.xs(module, level="module").index) if module in found.index.get_level_values(1) else set()
        if module not in deltas and f"{module}.weight" not in trained:
            assert not steps
        elif f"{module}.weight" in trained or isinstance(deltas[module], Shifted):
            assert steps == {0, 5, 7}
        else:
            assert steps >= {0, 3, 5, 6, 7}
    kept = [name for name in run.snapshot_names() if name.endswith("singular_values")]
    assert {name.removesuffix("/singular_values") for name in kept} == set(found.index.get_level_values(1))
    assert run.snapshot_steps(kept[0])[-2:] == [5, 7]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_adapter_norm_at_step_0_equals_the_expected_norm_of_the_initialization(family, task, tmp_path, request):
    """About sqrt(rank / 3) for a linear and sqrt(width rank) for an embedding; the initial update is zero."""
    model = models.load(request.getfixturevalue(family), task=task)
    method = LoRA(rank=8, targets=("all-linear", "embed"))
    run = ls.train(model, task, method, out=tmp_path / "run", **FAST)
    start = run.table[run.table["step"] == 0].astype({"module": str, "quantity": str, "role": str})
    norm = start[start["quantity"] == "adapter_norm"]
    embeddings = norm["role"] == "embed"
    assert norm["value"][embeddings].to_numpy() == pytest.approx(math.sqrt(32 * 8), rel=0.1)
    assert norm["value"][~embeddings].mean() == pytest.approx(math.sqrt(8 / 3), rel=0.03)
    assert (start.loc[start["quantity"] == "update_norm", "value"] == 0).sum() >= len(norm)
    last = run.table[run.table["step"] == 7].astype({"module": str, "quantity": str})
    for row in last[last["quantity"] == "adapter_norm"].itertuples():
        factors = delta.attached_deltas(model)[row.module].factors()
        total = sum(float(factor.detach().double().square().sum()) for factor in factors.values())
        assert row.value == near(math.sqrt(total), terms=TINY)


class Pair(nn.Module):
    """One linear, weight [[1, 0, 0], [0, 1, 0]]."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 2, bias=False)
        self.q.weight.data = torch.eye(2, 3)


def step_of(model, finished, total, base, modules, optimizer):
    return Step(finished - 1, total, model, optimizer, base, modules, lambda *_: None, lambda *_: None, lambda *_: None)


def test_weight_norm_of_dora_is_that_of_the_effective_weight(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, DoRA(rank=2, lr=1e-1), observe=[observe.norms()], out=tmp_path / "run", **FAST)
    rows = run.table[(run.table["quantity"] == "weight_norm") & (run.table["step"] == 7)].set_index("module")["value"]
    for module in run.ranks():
        norm = float(delta.effective_weight(fresh_bert, module).double().norm())
        assert rows[module] == near(norm, terms=TINY, growth=TEXT)


def test_norms_of_worked_example():
    """B = (1, 2)^T, A = (2, 0, 1), scale 2: |dW| 10, |W_0 + dW| 10.48809, adapter 3.16228; half of B: step 5."""
    model = Pair()
    modules = module_table.describe(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = LoRADelta(model.q, 1, 2.0)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[2.0, 0.0, 1.0]]))
    delta.attach(model, {"q": adapter})
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    observer = observe.norms(every=1)
    values = []
    for finished, B in enumerate([(0.0, 0.0), (1.0, 2.0), (0.5, 1.0)]):
        with torch.no_grad():
            adapter.B.copy_(torch.tensor(B)[:, None])
        items = observer(step_of(model, finished, 2, base, modules, optimizer))
        values.append({item.quantity: item.value for item in items if isinstance(item, ls.Record)})
    assert values[0]["weight_norm"] == near(math.sqrt(2), terms=6)
    assert values[0]["update_norm"] == values[0]["relative_update"] == values[0]["effective_rank"] == 0
    assert "step_norm" not in values[0]
    assert values[1] == pytest.approx(
        {
            "weight_norm": math.sqrt(110), "update_norm": 10, "learned_norm": 10, "step_norm": 10,
            "adapter_norm": math.sqrt(10), "factor_change": math.sqrt(5),
            "relative_update": 10 / math.sqrt(2), "rank": 1, "stable_rank": 1, "effective_rank": 1,
        },
        rel=rounding(terms=6, depth=2),
    )  # fmt: skip
    assert [values[2][name] for name in ("update_norm", "step_norm")] == pytest.approx([5, 5])
    assert [each["factor_change"] for each in values] == pytest.approx([0, math.sqrt(5), math.sqrt(1.25)])


@pytest.mark.parametrize("method", [
    LoRA(targets=("q", "embed"), lr=1e-2), AdaLoRA(init_rank=3, target_rank=1, initial_steps=0, mask_every=1),
    HydraLoRA(rank=2, lr=1e-2), FourierFT(coefficients=9), PiSSA(rank=2, lr=1e-2), DoRA(rank=2, lr=1e-2),
    AutoLoRA(rank=3, selection_lr=0.1),
], ids=lambda method: method.name)  # fmt: skip
def test_factor_change_is_the_distance_of_all_trained_factors_from_their_initial_values(method, bert, task, tmp_path):
    model = models.load(bert, task=task)
    observers = [observe.norms(every=3), observe.factors(every=3)]
    run = ls.train(model, task, method, observe=observers, out=tmp_path / "run", **FAST)
    for each in (run, *run.parents):
        found = each.table[each.table["quantity"] == "factor_change"].set_index(["step", "module"])["value"]
        assert set(found.index.get_level_values("step")) >= {0, 3, 6, 7}
        assert (found.loc[0] == 0).all()
        assert (found.loc[7] > 0).all()
        for step in (3, 6, 7):
            for module, factors in each.factors(step).items():
                first = each.factors(0)[module]
                trained = factors.keys() - constant_factors()
                total = sum(np.square(factors[name].astype(float) - first[name]).sum() for name in trained)
                assert found[step, module] == near(math.sqrt(total), terms=TINY)
            assert set(found.loc[step].index) == set(each.factors(step))


@pytest.mark.parametrize("method", [Full(), ALoRA(init_rank=2, prune=3, warm_steps=1, rounds=2)], ids=["full", "alora"])
def test_factor_change_is_not_recorded_without_factors_or_if_they_are_resized(method, bert, task, tmp_path):
    run = ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **FAST)
    assert (run.table["quantity"] == "update_norm").any()
    assert not (run.table["quantity"] == "factor_change").any()


def test_factor_change_ends_at_a_resize_that_the_adapter_does_not_declare():
    step = recorded_step(LoRA(rank=2))
    observer = observe.norms(every=1)

    def changed():
        return {item.module for item in observer(step) if getattr(item, "quantity", "") == "factor_change"}

    module, adapter = next(iter(delta.attached_deltas(step.model).items()))
    every = changed()
    assert every == set(delta.attached_deltas(step.model))
    delta.resize(adapter.A, step.optimizer, [0], None, 0)
    delta.resize(adapter.B, step.optimizer, [0], None, 1)
    step.index += 1
    assert changed() == every - {module}


def test_sum_of_squares_of_a_long_tensor_is_accurate():
    """A float32 sum over ten million equal numbers would stop growing long before the end."""
    tensor = torch.full((10_000_000,), 0.1)
    assert math.fsum(tile_sums(tensor).tolist()) == pytest.approx(1e7 * float(tensor[0].double()) ** 2, rel=1e-6)
    near = tensor * (1 - 2**-20)
    assert math.fsum(tile_sums(tensor, near).tolist()) == pytest.approx(
        1e7 * float(tensor[0].double() - near[0].double()) ** 2, rel=1e-6
    )


@pytest.fixture
def one_thread():
    """Sums on several threads have several partial sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, TILE - 1, TILE, TILE + 7, TILES * TILE, (TILES + 1) * TILE + 5])
def test_joint_sums_equal_those_of_one_tile_at_a_time_to_the_last_bit(size, dtype):
    """Kept runs can be compared with new ones only while the sums round alike."""
    drawn = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    W, W0, before = drawn
    wide = drawn if dtype == torch.float64 else drawn.float()
    expected = [
        torch.stack([tile.square().sum() for tile in change.split(TILE)])
        for change in (wide[0], wide[0] - wide[1], wide[0] - wide[2])
    ]
    found = joint_tile_sums(W, [None, W0, before])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(tile_sums(W, before), found[2])


def test_sum_of_squares_does_not_depend_on_memory_alignment():
    shifted = torch.empty(100_000 + 16)
    tensor = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values = set()
    for offset in range(1, 16):
        place = shifted[offset : offset + len(tensor)]
        place.copy_(tensor)
        values.add(math.fsum(tile_sums(place).tolist()))
    assert values == {math.fsum(tile_sums(tensor).tolist())}


def test_factor_snapshots_equal_the_factors_of_the_adapters(fresh_bert, task, tmp_path):
    run = ls.train(fresh_bert, task, LoRA(lr=1e-2), observe=[observe.factors(every=3)], out=tmp_path / "run", **FAST)
    assert {0, 3, 6, 7} <= set(run.snapshot_steps("bert.encoder.layer.0.attention.self.query/A"))
    for module, adapter in delta.attached_deltas(fresh_bert).items():
        for name, array in run.factors()[module].items():
            np.testing.assert_array_equal(array, adapter.factors()[name].detach().numpy())
    assert not np.array_equal(run.factors(3)[module]["B"], run.factors(6)[module]["B"])


class Scalars(TorchDispatchMode):
    """Counts the numbers that are read out of tensors, each of which waits for an accelerator."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def transfers(monkeypatch):
    """Return the memory addresses of the tensors of each copy to the host."""
    seen = []
    plain = host_weights._transfer
    monkeypatch.setattr(
        host_weights, "_transfer", lambda tensors: seen.append([t.data_ptr() for t in tensors]) or plain(tensors)
    )
    return seen


def recorded_step(method):
    model = tiny("bert")
    described = module_table.describe(model)
    base = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    method.attach(model)
    return Step(-1, 5, model, method.optimizer(model, 1.0, 1.0, 0.0), base, described, *[lambda *_: None] * 3)


@pytest.mark.parametrize("method", [
    LoRA(), AdaLoRA(), AutoLoRA(), ALoRA(), HydraLoRA(), HydraLoRA(shared_a=False), FourierFT(coefficients=9),
], ids=lambda method: method.label())  # fmt: skip
def test_recording_copies_each_factor_to_the_host_once(method, transfers):
    """At step 0, where norms store the tensors that step 1 is compared with, and in a snapshot of the factors."""
    step = recorded_step(method)
    trained = {p.data_ptr() for each in delta.attached_deltas(step.model).values() for p in each.parameters()}
    for observer in (observe.norms(every=1), observe.factors()):
        transfers.clear()
        assert list(observer(step))
        copied = Counter(place for tensors in transfers for place in tensors if place in trained)
        assert set(copied.values()) == {1}


@pytest.mark.parametrize("method", [LoRA(), HydraLoRA(), FourierFT(coefficients=9)], ids=lambda method: method.label())
def test_observers_in_one_context_copy_each_factor_to_the_host_once(method, transfers):
    step = recorded_step(method)
    observers = observe.norms(every=1), observe.alarms(), observe.factors()
    trained = {p.data_ptr() for each in delta.attached_deltas(step.model).values() for p in each.parameters()}
    for step.index in (-1, 0):
        transfers.clear()
        with shared_copies():
            for observer in observers:
                list(observer(step))
        copied = Counter(place for tensors in transfers for place in tensors if place in trained)
        assert set(copied.values()) == {1}


@pytest.mark.parametrize("method", [LoRA(), LoRA(targets="all-linear"), AdaLoRA(), ALoRA(), Full(), LISA(n_active=1)],
                         ids=lambda method: method.label())  # fmt: skip
def test_norms_copy_to_the_host_once_per_recording(method, transfers):
    """Step 0 copies once more, and each SVD of a dense update its matrix. Only a rank of AdaLoRA is read by itself."""
    step = recorded_step(method)
    observer = observe.norms(every=2)
    observer(step)
    with Scalars() as scalars:
        for step.index in (0, 1, 2):
            transfers.clear()
            assert bool(observer(step)) == (step.finished == 2)
            assert len([tensors for tensors in transfers if tensors]) <= 1
    with Scalars() as ranks:
        assert all(each.rank for each in delta.attached_deltas(step.model).values())
    assert scalars.count == ranks.count


def test_factor_snapshots_copy_to_the_host_once(transfers):
    assert list(observe.factors()(recorded_step(LoRA(targets="all-linear"))))
    assert len([tensors for tensors in transfers if tensors]) == 1


def test_tensors_copied_through_one_buffer_are_equal():
    tensors = [torch.randn(3, 5), torch.randn(4, 6).T, torch.tensor(3.0, dtype=torch.float64), torch.arange(5)]
    tensors += [torch.zeros(0, 3), torch.randn(2, 3).bfloat16(), torch.tensor([True])]
    for tensor, copy in zip(tensors, host_weights.through_buffer(tensors), strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_shared_copies_shares_arrays_of_trained_parameters_in_its_context():
    """In the context the array of a parameter is shared; after it, a new array has the changed values."""
    weight, frozen = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3), requires_grad=False)
    with shared_copies():
        assert to_array(weight) is to_array(weight)
        assert to_array(weight.T).shape == (3, 2)
        assert to_array(frozen) is not to_array(frozen)
        before = to_array(weight)
        with shared_copies():
            assert to_array(weight) is before
        assert to_array(weight) is before
    with torch.no_grad():
        weight.add_(1)
    assert (before == 1).all()
    assert (to_array(weight) == 2).all()
    with shared_copies():
        assert (to_array(weight) == 2).all()
