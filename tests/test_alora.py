"""Test ALoRA against worked numbers, exact identities and a planted teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from forks import interruption_after, same
from peft.tuners.tuners_utils import check_target_module_exists
from test_ablation import adapted
from tiny import inputs, tiny
from tolerance import forward
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorascope as ls
from lorascope.adapters import ablation
from lorascope.adapters.delta import attached_deltas, fold, resize
from lorascope.inputs import models
from lorascope.methods import ALoRA, alora
from lorascope.methods.alora import ALoRADelta, CountingAdamW, allocate, importance_score, prune
from lorascope.methods.method import Step, config
from lorascope.schema.module_table import describe

# -- from scores to ranks ----------------------------------------------------------------------------------------------


def arrays(*scores: list[float]) -> list[np.ndarray]:
    return [np.array(score) for score in scores]


def ranks_after_round(scores: list[np.ndarray], number: int) -> list[int]:
    """Compute the ranks after a round."""
    lost = prune(scores, number)
    gained = allocate(scores, lost)
    return [len(s) - len(l) + g for s, l, g in zip(scores, lost, gained, strict=True)]


def test_prune_matches_the_worked_round():
    scores = arrays(
        [0.9, 0.7, 0.5, 0.3],
        [0.8, 0.6, 0.45, 0.35],
        [0.2, 0.1, 0.4, 0.05],
        [0.15, 0.02, 0.25, -0.1],
        [0.55, 0.5, 0.5, 0.32],
    )
    lowest_first = [(3, 3), (3, 1), (2, 3), (2, 1), (3, 0), (2, 0), (3, 2), (0, 3)]
    for number in range(1, 9):
        lost = [(module, int(i)) for module, at in enumerate(prune(scores, number)) for i in at]
        assert set(lost) == set(lowest_first[:number])
    assert ranks_after_round(scores, 8) == [3, 8, 1, 0, 8]


def test_allocate_gives_the_remainder_to_the_higher_means():
    for order in ([0.1, 0.2, 0.3], [0.3, 0.1, 0.2], [0.2, 0.3, 0.1]):
        scores = [np.full(9, mean) for mean in order] + [np.full(9, -1.0)]
        gained = allocate(scores, prune(scores, 8))
        assert gained[np.argsort(order)].tolist() == [2, 3, 3]
        assert gained[3] == 0


def test_allocate_adds_nothing_if_every_module_loses_a_component():
    assert ranks_after_round(arrays([0.1, 0.9], [0.05, 0.8]), 2) == [1, 1]


def test_module_of_rank_zero_gains_no_component_and_the_last_component_stays():
    scores = arrays([], [0.1, 0.2], [0.3, 0.4])
    assert ranks_after_round(scores, 1) == [0, 1, 3]
    assert ranks_after_round(scores, 4) == ranks_after_round(scores, 9) == [0, 0, 1]


def test_ties_are_broken_by_module_and_position():
    scores = [np.zeros(3) for _ in range(3)]
    assert [at.tolist() for at in prune(scores, 4)] == [[0, 1, 2], [0], []]
    assert allocate([np.zeros(3)] * 3, [np.arange(3), np.array([], int), np.array([], int)]).tolist() == [0, 2, 1]


def test_round_adds_all_deleted_components_or_none():
    """Random tiny cases, in which the protected last component often makes a round delete fewer than n_A."""
    draw = np.random.default_rng(0)
    fewer = 0
    for _ in range(300):
        scores = [draw.integers(3, size=size).astype(float) for size in draw.integers(4, size=draw.integers(1, 5))]
        total = sum(map(len, scores))
        if not total:
            continue
        number = int(draw.integers(1, 9))
        lost = prune(scores, number)
        deleted = sum(map(len, lost))
        assert deleted == min(number, total - 1)
        untouched = [bool(len(score)) and not len(at) for score, at in zip(scores, lost, strict=True)]
        gained = allocate(scores, lost)
        assert gained.sum() == (deleted if any(untouched) else 0)
        assert not gained[~np.array(untouched)].any()
        fewer += any(untouched) and deleted < number
    assert fewer > 10


def test_budget_does_not_rise_after_a_round_with_few_deletions():
    method = ALoRA(init_rank=2, targets=("q",), prune=3, rounds=3, warm_steps=3, round_steps=3)
    model = started(method)
    budgets = [4]
    for step in drive(method, model, 16):
        budget = sum(delta.rank for delta in attached_deltas(model).values())
        if step.finished in method.schedule(16):
            budgets.append(budget)
    assert budgets[::2] == [4, 1, 1, 1]


FULL = -0.623085
WITHOUT = arrays([-0.579633, -0.701804], [-0.600672, -0.641465], [-0.587814, -0.661946])
ONLY = arrays([-0.680540, -0.660957], [-0.692079, -0.670383], [-0.675684, -0.680459])


def test_importance_matches_the_toy_network():
    scores = [importance_score(FULL, *pair) for pair in zip(WITHOUT, ONLY, strict=True)]
    wanted = [-0.723993, -0.582238, -0.714492, -0.652004, -0.710955, -0.641599]
    assert np.concatenate(scores) == pytest.approx(wanted, abs=1.5e-6)
    assert np.argsort(np.concatenate(scores)).tolist() == [0, 2, 4, 3, 5, 1]
    assert [ranks_after_round(scores, number) for number in (1, 2, 3)] == [[1, 2, 3], [1, 1, 4], [1, 1, 1]]
    assert [scores[module].mean() for module in (2, 1)] == pytest.approx([-0.676277, -0.683248], abs=1.5e-6)


def test_order_depends_only_on_the_two_ablated_scores():
    scores = np.concatenate([importance_score(FULL, *pair) for pair in zip(WITHOUT, ONLY, strict=True)])
    terms = np.concatenate(ONLY) - np.concatenate(WITHOUT)
    assert np.array_equal(np.argsort(scores), np.argsort(terms))


# -- the adapter ------------------------------------------------------------------------------------------------------


def test_deleted_component_equals_a_closed_gate_and_new_ones_add_zero():
    model = adapted("bert", rank=3)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = inputs(model)
    name, delta = list(attached_deltas(model).items())[3]
    fresh = ALoRADelta(model.get_submodule(name), 2)
    assert not fresh.B.any()
    assert fresh.A.any(dim=1).all()
    with torch.no_grad():
        before = model(**batch).logits
        bound = forward(model, batch) * before.norm()
        resize(delta.A, optimizer, range(3), fresh.A, 0)
        resize(delta.B, optimizer, range(3), fresh.B, 1)
        assert (model(**batch).logits - before).norm() <= bound
        assert delta.rank == 5
        delta.B[:, 1] = 0
        closed = model(**batch).logits
        assert not torch.equal(closed, before)
        resize(delta.A, optimizer, [0, 2, 3, 4], None, 0)
        resize(delta.B, optimizer, [0, 2, 3, 4], None, 1)
        assert (model(**batch).logits - closed).norm() <= bound < (closed - before).norm()


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_model_with_modules_of_rank_zero_equals_the_base(family):
    targets = ("embed", "q") if family == "bert" else "all-linear"
    model = adapted(family, targets)
    bare = tiny(family)
    for delta in attached_deltas(model).values():
        resize(delta.A, torch.optim.SGD([delta.A], 1.0), [], None, 0)
        resize(delta.B, torch.optim.SGD([delta.B], 1.0), [], None, 1)
    batch = inputs(model)
    assert torch.equal(model(**batch).logits, bare(**batch).logits)
    model.train()(**batch).logits.sum().backward()
    for delta in attached_deltas(model).values():
        assert delta.rank == delta.update().rank == 0
        assert delta.update().norm() == 0
        assert delta.factors()["A"].shape[0] == 0
    fold(model)
    assert torch.equal(model.eval()(**batch).logits, bare(**batch).logits)


# -- rounds -----------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: dict) -> torch.Tensor:
    labels = torch.arange(len(batch["input_ids"])) % 2
    return model(**batch, labels=labels).loss


def drive(method: ALoRA, model: nn.Module, total: int, lr: float = 0.02) -> Iterator[Step]:
    """Train in the loop's order; yield the step before and after each ``after_step``."""
    optimizer = method.optimizer(model, lr, lr, 0.0)
    held_out = inputs(model, batch=5, seed=99)
    loss = lambda m, batch, params: loss_of(m, batch)  # noqa: E731
    step = Step(-1, total, model, optimizer, {}, pd.DataFrame(), loss, lambda size, fixed: held_out, lambda *_: None)
    for index in range(total):
        step.index = index
        optimizer.zero_grad(set_to_none=True)
        loss_of(model.train(), inputs(model, seed=index)).backward()
        optimizer.step()
        yield step
        method.after_step(step)
        yield step


def started(method: ALoRA, **sizes: int) -> nn.Module:
    model = tiny("bert", **sizes)
    torch.manual_seed(1)
    method.attach(model)
    return model


def components(method: ALoRA, step: Step) -> dict:
    """Return the row of A, the column of B and their moments by (module, id)."""
    found = {}
    for name, delta in attached_deltas(step.model).items():
        tensors = [(delta.A, delta.B)]
        for key in ("exp_avg", "exp_avg_sq"):
            tensors.append(tuple(step.optimizer.state[p][key] for p in (delta.A, delta.B)))
        assert len(method.rank_ids_[name]) == delta.rank
        for position, rank_id in enumerate(method.rank_ids_[name]):
            pairs = [torch.cat([A[position], B[:, position]]).detach().clone() for A, B in tensors]
            found[name, rank_id] = (*pairs, delta.A.shape[1])
    return found


@pytest.mark.parametrize("number", ["block", "network", 1, 5])
def test_round_moves_components_and_leaves_the_others_unchanged(number):
    """By id, retained components keep values and moments; new ones have zero moments and zero B."""
    method = ALoRA(init_rank=3, prune=number, warm_steps=2, round_steps=2, rounds=4)
    model = started(method)
    n = {"block": 6, "network": 12}.get(number, number)
    total, born = 36, set()
    batch = inputs(model, seed=50)
    seen = iter(drive(method, model, 10))
    for before_step in seen:
        before, ranks = components(method, before_step), {k: d.rank for k, d in attached_deltas(model).items()}
        shapes = [p.data_ptr() for p in model.parameters()]
        with torch.no_grad():
            model.eval()
            logits = model(**batch).logits
            model.train()
        step = next(seen)
        now = components(method, step)
        if step.finished not in (2, 4, 6, 8):
            assert before.keys() == now.keys()
            assert shapes == [p.data_ptr() for p in model.parameters()]
            continue
        lost, gained = before.keys() - now.keys(), now.keys() - before.keys()
        assert len(lost) == n
        assert len(gained) in (0, n)
        untouched = {name for name, rank in ranks.items() if rank} - {name for name, _ in lost}
        assert {name for name, _ in gained} <= untouched
        assert bool(gained) == bool(untouched)
        counts = [sum(name == at for at, _ in gained) for name in untouched]
        assert not counts or max(counts) - min(counts) <= 1
        total += len(gained) - len(lost)
        assert sum(delta.rank for delta in attached_deltas(model).values()) == total <= 36
        born |= before.keys()
        assert not gained & born  # ids are not reused
        for key in before.keys() & now.keys():
            assert all(map(torch.equal, before[key][:3], now[key][:3]))
        for key in gained:
            values, first, second, width = now[key]
            assert not first.any()
            assert not second.any()
            assert not values[width:].any()
            assert 0 < values[:width].abs().max() <= width**-0.5
        for delta in attached_deltas(model).values():
            sizes = delta.A.shape[1] + delta.B.shape[0]
            assert sum(p.numel() for p in delta.parameters()) == delta.rank * sizes
        trained = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
        assert trained == {id(p) for p in model.parameters() if p.requires_grad}
        assert {delta.scale for delta in attached_deltas(model).values()} == {8 / 3}
        assert not torch.equal(logits, model.eval()(**batch).logits)


def test_round_deletes_the_lowest_recorded_scores():
    """The scores that a round records give the ids that it deletes."""
    method = ALoRA(init_rank=2, prune=5, warm_steps=3, rounds=1)
    model = started(method)
    seen = iter(drive(method, model, 6))
    for step in seen:
        ids = {name: list(own) for name, own in method.rank_ids_.items()}
        next(seen)
        if step.finished == 3:
            break
    told = {(r.quantity, r.module): r for r in method.records(step)}
    scores = {name: told["importance", name].value for name in ids}
    for name, score in scores.items():
        assert told["importance", name].index.tolist() == ids[name]
        parts = [told[f"score_{part}", name].value for part in ("without", "only")]
        assert score == pytest.approx(told["score_full", ""].value - parts[0] + parts[1])
        assert told["rank", name].value == attached_deltas(model)[name].rank == len(method.rank_ids_[name])
    assert told["budget", ""].value == sum(delta.rank for delta in attached_deltas(model).values()) == 24
    lowest = sorted((value, name, i) for name in ids for i, value in zip(ids[name], scores[name], strict=True))[:5]
    assert {(name, i) for name in ids for i in set(ids[name]) - set(method.rank_ids_[name])} == {
        (name, i) for _, name, i in lowest
    }
    step.index += 1
    method.after_step(step)
    assert not list(method.records(step))


def test_equal_initial_scores_delete_from_the_first_modules():
    method = ALoRA(init_rank=2, prune=3, warm_steps=1, rounds=1)
    model = started(method)
    seen = iter(drive(method, model, 4, lr=0.0))
    next(seen), next(seen)
    ranks = [delta.rank for delta in attached_deltas(model).values()]
    assert ranks == [0, 1, *([3] * 3), *([2] * 7)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_counting_adamw_equals_separate_adamw_for_appended_entries(decay):
    """Appended rows move like rows of a separate AdamW that starts with them."""
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    parts = [nn.Parameter(whole.detach().clone())]
    settings = {"lr": 0.1, "weight_decay": decay}
    optimizers = [torch.optim.AdamW(parts, **settings)]
    counting = CountingAdamW([whole], **settings)
    for index in range(9):
        if index == 5:
            fresh = torch.randn(2, 4, dtype=torch.float64)
            resize(whole, counting, range(3), fresh, 0)
            parts.append(nn.Parameter(fresh.clone()))
            optimizers.append(torch.optim.AdamW(parts[1:], **settings))
        gradients = [torch.randn_like(part) for part in parts]
        whole.grad = torch.cat(gradients)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        for optimizer in (counting, *optimizers):
            optimizer.step()
        assert torch.allclose(whole, torch.cat(parts), rtol=1e-12, atol=1e-13)


def test_counts_of_a_bfloat16_parameter_do_not_saturate():
    parameter = nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = CountingAdamW([parameter], lr=1e-3)
    for _ in range(300):
        optimizer.step()
    assert optimizer.state[parameter]["steps"].tolist() == [[300], [300]]
    assert parameter.tolist() == [[pytest.approx(-0.3, rel=0.1)]] * 2


@pytest.mark.parametrize("fresh", [False, True])
def test_first_step_of_a_new_component_has_the_expected_size(fresh):
    """Bias correction uses step 1 with fresh moments, which gives a size of lr, and step 4 without."""
    method = ALoRA(init_rank=2, prune=5, warm_steps=3, rounds=1, fresh_moments=fresh)
    model = started(method)
    grown, checked = None, 0
    for step in drive(method, model, 6, lr=0.02):
        if step.finished == 4 and grown:
            for name, columns in grown.items():
                moved = attached_deltas(model)[name].B[:, columns].abs()
                slope = attached_deltas(model)[name].B.grad[:, columns].abs()
                t = 1 if fresh else 4
                first, second = (1 - 0.9) / (1 - 0.9**t), (1 - 0.999) / (1 - 0.999**t)
                expected = 0.02 * first * slope / ((second**0.5) * slope + 1e-8)
                assert torch.allclose(moved, expected, rtol=1e-4)
                assert (slope > 0).any(0).all()
                checked += len(columns)
            break
        if step.finished == 3:
            grown = {name: [i for i, own in enumerate(ids) if own >= 2] for name, ids in method.rank_ids_.items()}
    assert checked == 5


class ThreeLinear(nn.Module):
    """ThreeLinear parallel linear maps whose outputs an identity head concatenates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(12, 10) for _ in range(3))
        self.score = nn.Linear(30, 30, bias=False)
        nn.init.eye_(self.score.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.cat([self.first(x), self.second(x), self.third(x)], -1))


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_planted_module_gains_components(planted):
    """A noisy teacher differs from the base by rank 4 in one module, which keeps and gains components."""
    names = ("first", "second", "third")
    torch.manual_seed(planted)
    model = ThreeLinear()
    change = torch.randn(10, 4) @ torch.randn(4, 12)
    with torch.no_grad():
        base = torch.cat([getattr(model, name).weight for name in names])

    def rows(count: int) -> dict:
        x = torch.randn(count, 12)
        y = x @ base.T + torch.cat([getattr(model, name).bias for name in names]).detach() + torch.randn(count, 30)
        y[:, planted * 10 : (planted + 1) * 10] += x @ change.T
        return {"x": x, "y": y}

    def loss(model: nn.Module, batch: dict, params: None = None) -> torch.Tensor:
        return (model(batch["x"]) - batch["y"]).square().mean()

    method = ALoRA(init_rank=2, alpha=2, prune=1, targets=names, warm_steps=60, round_steps=30, rounds=4)
    method.attach(model)
    optimizer = method.optimizer(model, 0.02, 0.0, 0.0)
    held_out = rows(32)
    step = Step(-1, 180, model, optimizer, {}, pd.DataFrame(), loss, lambda *_: held_out, lambda *_: None)
    ranks = []
    for step.index in range(180):
        optimizer.zero_grad()
        loss(model, rows(16)).backward()
        optimizer.step()
        method.after_step(step)
        ranks.append([delta.rank for delta in attached_deltas(model).values()])
    assert min(rank[planted] for rank in ranks) == 2
    assert ranks[-1][planted] >= 4
    assert sum(ranks[-1]) == 6


# -- a whole run ------------------------------------------------------------------------------------------------------

SHORT = {"steps": 10, "batch_size": 8, "eval_every": 2, "eval_size": 32, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def run(bert, task, tmp_path_factory):
    """Train a run in which modules lose all rank: initial rank 1, five components deleted per round."""
    method = ALoRA(init_rank=1, prune=5, warm_steps=2, round_steps=2, rounds=3, lr=1e-2)
    model = models.load(bert, task=task)
    return ls.train(model, task, method, out=tmp_path_factory.mktemp("runs") / "alora", **SHORT), model


def test_table_contains_ranks_and_budget(run):
    table = run[0].table
    rank = table[table["quantity"] == "rank"].pivot(index="step", columns="module", values="value")
    budget = table[table["quantity"] == "budget"].set_index("step")["value"]
    assert {0, 2, 4, 6, 10} == set(budget.index) <= set(rank.index)
    assert (rank.loc[budget.index].sum(axis=1) == budget).all()
    assert (rank.loc[0] == 1).all()
    assert (rank.loc[10] == 0).sum() >= 5
    assert budget.is_monotonic_decreasing
    for quantity in ("importance", "score_without", "score_only"):
        rows = table[table["quantity"] == quantity]
        assert set(rows["step"]) == {2, 4, 6}
        assert rows.groupby("step").size().tolist() == budget.loc[[0, 2, 4]].tolist()
    scalars = table[table["quantity"].isin(["score_full", "score_none"])]
    assert scalars["module"].astype(str).eq("").all()
    assert len(scalars) == 6


def test_module_of_rank_zero_appears_in_every_output(run):
    found, model = run
    ranks = {name: delta.rank for name, delta in attached_deltas(model).items()}
    assert found.ranks() == ranks
    assert 0 in ranks.values()
    summary = found.summary().set_index("module")
    assert summary.loc[list(ranks), "rank"].to_dict() == ranks
    zero = [name for name, rank in ranks.items() if rank == 0]
    assert (summary.loc[zero, "update_norm"] == 0).all()
    config = peft.LoraConfig(**found.lora_config())
    targets = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
    assert targets == {name for name, rank in ranks.items() if rank}
    assert found.meta.states["best"].step >= 6


def test_components_are_scored_on_the_first_rows_of_the_search_split(bert, task, tmp_path, monkeypatch):
    """Every round uses the same rows, in another order than the training and as many as asked for."""
    seen, score = [], ablation.ablation_scores
    monkeypatch.setattr(alora, "ablation_scores", lambda *given: seen.append(given[2]) or score(*given))
    model = models.load(bert, task=task)
    method = ALoRA(init_rank=2, score_rows=5, warm_steps=1, round_steps=2, rounds=3, search_share=0.2)
    ls.train(model, task, method, out=tmp_path / "run", **SHORT)
    rows = task.encode(models.tokenizer(model), task.split("search", 0.2))
    assert len(rows) > 5
    expected = rows.batch(range(5))
    assert len(seen) == 3
    for batch in seen:
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


# -- random scores ----------------------------------------------------------------------------------------------------

RANDOM = {"init_rank": 2, "prune": 5, "warm_steps": 2, "round_steps": 2, "rounds": 3, "lr": 1e-2, "scores": "random"}


def test_random_scores_move_components_without_forward_passes(bert, task, tmp_path, monkeypatch):
    """The rounds delete the lowest recorded scores, as with ablation, and record no scores of the model."""
    monkeypatch.setattr("lorascope.methods.alora.ablation_scores", None)
    found, scores = {}, {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        model = models.load(bert, task=task)
        found[name] = ls.train(model, task, ALoRA(**RANDOM), out=tmp_path / name, seed=seed, **SHORT)
        rows = found[name].table.query("quantity == 'importance'")
        scores[name] = rows["value"].to_numpy()
        assert set(rows["step"]) == {2, 4, 6}
        assert ((scores[name] >= 0) & (scores[name] < 1)).all()
        assert len(set(scores[name])) == len(scores[name])
    assert not found["one"].table["quantity"].isin(["score_full", "score_none", "score_without", "score_only"]).any()
    np.testing.assert_array_equal(scores["one"], scores["again"])
    assert not np.array_equal(scores["one"][:24], scores["other"][:24])
    table = found["one"].table
    ranks = np.full(12, 2)
    for step in (2, 4, 6):
        at = table[table["step"] == step]
        modules = list(at.loc[at["quantity"] == "rank", "module"])
        own = [at.query("quantity == 'importance' and module == @name")["value"].to_numpy() for name in modules]
        assert [len(values) for values in own] == ranks.tolist()
        lost = prune(own, 5)
        ranks = ranks - [len(positions) for positions in lost] + allocate(own, lost)
        assert at.loc[at["quantity"] == "rank", "value"].tolist() == ranks.tolist()


def test_random_scores_change_nothing_before_the_first_round(bert, task, tmp_path):
    """Factors, batches and dropout masks are the same, and so are the losses until new components train."""
    losses = []
    for scores in ("ablation", "random"):
        method = ALoRA(**RANDOM | {"scores": scores, "dropout": 0.3, "warm_steps": 4})
        model = models.load(bert, task=task)
        run = ls.train(model, task, method, out=tmp_path / scores, **SHORT)
        losses.append(run.table.query("quantity == 'loss'").set_index("step")["value"])
    assert losses[0].loc[:4].equals(losses[1].loc[:4])
    assert not losses[0].equals(losses[1])


def test_random_scores_resume_bit_for_bit(bert, task, tmp_path):
    def train(folder):
        model = models.load(bert, task=task)
        settings = SHORT | {"steps": 8, "checkpoint_every": 3}
        return ls.train(model, task, ALoRA(**RANDOM), out=tmp_path / folder, **settings)

    train("whole")
    with interruption_after(5):  # after the first two of the three rounds
        train("resumed")
    train("resumed")
    same(tmp_path / "whole", tmp_path / "resumed")


# -- sensitivity ------------------------------------------------------------------------------------------------------


def test_sensitivity_scores_follow_adalora_by_component():
    """Scores match equations 9 to 13 of AdaLoRA element by element, also after components were deleted and added."""
    method = ALoRA(init_rank=2, prune=3, warm_steps=3, round_steps=2, rounds=3, scores="sensitivity")
    model = started(method)
    optimizer = method.optimizer(model, 0.02, 0.02, 0.0)
    loss = lambda m, batch, params: loss_of(m, batch)  # noqa: E731
    step = Step(-1, 10, model, optimizer, {}, pd.DataFrame(), loss, lambda size, fixed: {}, lambda *_: None)
    averages: dict = {}
    rounds = 0
    for index in range(9):
        step.index = index
        optimizer.zero_grad(set_to_none=True)
        loss_of(model.train(), inputs(model, seed=index)).backward()
        expected = {}
        for name, delta in attached_deltas(model).items():
            for position, rank_id in enumerate(method.rank_ids_[name]):
                a, da = delta.A[position].tolist(), delta.A.grad[position].tolist()
                b, db = delta.B[:, position].tolist(), delta.B.grad[:, position].tolist()
                gate = sum(x * y for x, y in zip(a, da, strict=True))
                score = 0.0
                for part, products in (
                    ("A", zip(a, da, strict=True)),
                    ("B", zip(b, db, strict=True)),
                    ("gate", [(1, gate)]),
                ):
                    values = []
                    for at, (x, y) in enumerate(products):
                        key = (name, rank_id, part, at)
                        mean, spread = averages.get(key, (0.0, 0.0))
                        mean = 0.85 * mean + 0.15 * abs(x * y)
                        averages[key] = mean, 0.85 * spread + 0.15 * abs(abs(x * y) - mean)
                        values.append(math.prod(averages[key]))
                    score += sum(values) / len(values)
                expected[name, rank_id] = score
        method.after_backward(step)
        optimizer.step()
        method.after_step(step)
        recorded = {}
        for record in method.records(step):
            if record.quantity == "importance":
                recorded |= {(record.module, i): x for i, x in zip(record.index, record.value, strict=True)}
        if step.finished in (3, 5, 7):
            assert recorded == pytest.approx(expected, rel=1e-4)
            rounds += 1
    assert rounds == 3
    assert max(max(ids) for ids in method.rank_ids_.values() if ids) > 1  # components were added


def test_sensitivity_scores_resume_bit_for_bit(bert, task, tmp_path):
    def train(folder):
        method = ALoRA(**RANDOM | {"scores": "sensitivity"})
        return ls.train(models.load(bert, task=task), task, method, out=tmp_path / folder,
                        **SHORT | {"steps": 8, "checkpoint_every": 3})  # fmt: skip

    train("whole")
    with interruption_after(5):
        train("resumed")
    train("resumed")
    same(tmp_path / "whole", tmp_path / "resumed")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_schedule_has_at_most_eight_rounds_within_sixty_percent():
    assert list(ALoRA().schedule(300)) == [30, 38, 46, 54, 62, 70, 78, 86]
    assert list(ALoRA().schedule(400)) == list(range(40, 111, 10))
    assert list(ALoRA().schedule(5)) == [1, 2, 3]
    assert list(ALoRA(rounds=2, warm_steps=7, round_steps=5).schedule(13)) == [7, 12]
    for total in range(2, 500):
        rounds = ALoRA().schedule(total)
        assert 1 <= len(rounds) <= 8
        assert rounds[-1] <= max(1, 0.6 * total)


def test_best_state_is_selected_from_the_last_round_on():
    method = ALoRA(rounds=2, warm_steps=2, round_steps=3)
    settled = [step.finished for step in drive(method, started(method), 9) if method.settled(step)]
    assert sorted(set(settled)) == [5, 6, 7, 8, 9]


def test_parameter_count_matches_the_paper():
    """LLaMA-2 7B: 224 modules of rank 8 have 19,988,480 parameters; a block has 7 modules."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama"))
    method = ALoRA()
    method.attach(model)
    assert len(attached_deltas(model)) == 224
    assert sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()) == 19_988_480
    assert method._pruned == 7
    network = ALoRA(prune="network")
    network.select_targets(describe(model))
    assert network._pruned == 224


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"search_share": 0}, "search_share must be > 0, got 0"),
        ({"prune": "layer"}, "prune must be .*, got 'layer'"),
        ({"prune": 0}, "prune must be .*, got 0"),
        pytest.param(
            {"prune": 1.5},
            "prune must be 'block', 'network' or an integer >= 1, got 1.5",
            marks=pytest.mark.skipif(hasattr(ls.record, "__wrapped__"), reason="types are checked at every call"),
        ),
        ({"init_rank": 0}, "init_rank must be an integer >= 1, got 0"),
        ({"rounds": 0}, "^rounds must be an integer >= 1, got 0"),
        ({"warm_steps": 0}, "warm_steps must be an integer >= 1, got 0"),
        ({"score_rows": 0}, "score_rows must be an integer >= 1, got 0"),
    ],
)
def test_invalid_settings_raise_one_line(wrong, line):
    with pytest.raises(ValueError, match=line) as caught:
        ALoRA(**wrong)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit_model_or_run_raise_one_line(fresh_bert, task, tmp_path):
    for prune_, rank in ((24, 2), (99, 2), ("network", 1)):
        with pytest.raises(ValueError, match=rf"prune must be < {12 * rank}, .*, got {prune_!r}"):
            ALoRA(prune=prune_, init_rank=rank).attach(tiny("bert"))
    late = ALoRA(rounds=4, warm_steps=4, round_steps=2)
    with pytest.raises(ValueError, match=r"rounds .* 10, .*, got 4 \+ 3 \* 2$"):
        ls.train(fresh_bert, task, late, out=tmp_path / "run", **SHORT)


def test_config_omits_fields_of_later_versions_at_their_defaults():
    assert not {"fresh_moments", "scores"} & config(ALoRA()).keys()
    assert config(ALoRA(fresh_moments=True)) == {**config(ALoRA()), "fresh_moments": True}
