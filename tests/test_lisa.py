"""Test LISA against full fine-tuning, worked numbers, brute force, and the weights of every step."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy import stats
from test_adalora import step_of
from tiny import tiny
from tolerance import TEXT, TINY, near
from torch import Tensor, nn

import lorascope as ls
from lorascope import observe
from lorascope.inputs import models
from lorascope.methods import LISA, Full, lisa
from lorascope.methods.lisa import draw, marginals
from lorascope.methods.method import Step, config

POLICIES = ["reset", "keep", "reset_all"]


# -- the draws ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """Draw 2 of 8 blocks 4,000 times; return a mask (draw, block)."""
    generator, chances = np.random.default_rng(0), np.full(8, 1 / 8)
    taken = np.zeros((4000, 8), dtype=bool)
    for row in taken:
        row[draw(generator, chances, 2)] = True
    return taken


def test_draws_are_uniform(drawn):
    """Pearson's statistic is too small by (L - gamma) / (L - 1), because blocks of one draw are distinct."""
    counts, expected = drawn.sum(0), 4000 * 2 / 8
    assert counts.sum() == 4000 * 2
    raw = ((counts - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(7 / 6 * raw, 7) > 0.01


def test_pairs_and_repetitions_have_the_expected_frequency(drawn):
    pairs = np.array([(drawn[:, i] & drawn[:, j]).sum() for i, j in itertools.combinations(range(8), 2)])
    assert pairs.sum() == 4000
    assert stats.chisquare(pairs).pvalue > 0.01
    again = (drawn[1:] & drawn[:-1]).sum()
    assert stats.binomtest(int(again), 3999 * 2, 2 / 8).pvalue > 0.01


def brute_force(chances: np.ndarray, size: int) -> np.ndarray:
    """Sum the probability of each block over all orders of ``size`` draws."""
    found = np.zeros(len(chances))
    for order in itertools.permutations(range(len(chances)), size):
        left, likely = 1.0, 1.0
        for block in order:
            likely *= chances[block] / left
            left -= chances[block]
        found[list(order)] += likely
    return found


@pytest.mark.parametrize("weights", [(1, 2, 3, 4, 5), (0.01, 1, 1, 10, 3), (0, 1, 2, 3, 100), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4])
def test_marginals_match_brute_force(weights, size):
    chances = np.array(weights) / sum(weights)
    assert marginals(chances, size) == pytest.approx(brute_force(chances, size), abs=1e-9)


def test_weighted_draws_match_the_marginals():
    chances = np.array([1, 2, 3, 10, 0]) / 16
    generator, counts = np.random.default_rng(1), np.zeros(5)
    for _ in range(4000):
        counts[draw(generator, chances, 2)] += 1
    expected = marginals(chances, 2)
    assert counts[4] == expected[4] == 0
    assert np.abs(counts - 4000 * expected)[:4] == pytest.approx(0, abs=4 * 4000**0.5 / 2)
    # The naive probabilities, size * chance, are rejected.
    assert np.abs(counts - 4000 * np.minimum(2 * chances, 1)).max() > 500


# -- what trains and what does not --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WeightObserver(observe.Observer):
    """Observer that copies all parameters and the names of the trained ones after every step."""

    seen: list = field(default_factory=list)

    def config(self):
        return {"name": "WeightObserver"}

    def __call__(self, step):
        weights = {name: p.detach().clone() for name, p in step.model.named_parameters()}
        trains = {name for name, p in step.model.named_parameters() if p.requires_grad}
        self.seen.append((weights, trains))
        return ()


FAST = {"steps": 7, "batch_size": 4, "eval_every": 3, "eval_size": 8, "progress": False, "device": "cpu"}


def watched(family, method, request, out, **settings):
    """Train a run; return it with its observations after every step and the names of its blocks."""
    observer = WeightObserver()
    task = request.getfixturevalue("task")
    model = models.load(request.getfixturevalue(family), task=task)
    observers = [observe.norms(every=1), observer]
    run = ls.train(model, task, method, observe=observers, out=out, **FAST | {"weight_decay": 0.1} | settings)
    return run, observer.seen, run.modules.query("role == 'block'")["module"].tolist()


def table_of(run, quantity: str) -> pd.DataFrame:
    return run.table[run.table["quantity"] == quantity]


CASES = {
    "bert": ("bert", {}, {}),
    "gpt2: tied, Conv1D": ("gpt2", {"moment_policy": "reset_all"}, {}),
    "llama, accumulation": ("llama", {"moment_policy": "keep"}, {"accumulate": 2}),
    "bf16, weighted": ("bert", {"weights": (2, 3)}, {"precision": "bf16"}),
    "no block": ("bert", {"n_active": 0}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_only_active_blocks_and_outer_parameters_change(case, request, tmp_path):
    """Weight decay and momentum would change a frozen tensor that still has a gradient."""
    family, fields, settings = CASES[case]
    method = LISA(**{"n_active": 1, "interval": 2, "lr": 1e-2, "draw_seed": 3} | fields)
    run, seen, blocks = watched(family, method, request, tmp_path / "run", **settings)
    chosen = table_of(run, "active").query("value == 1").groupby("step")["module"].agg(set).to_dict()
    assert {1, 3, 5, 7} == set(table_of(run, "active")["step"])
    visited = set()
    for step in range(1, 8):
        (before, _), (now, trains) = seen[step - 1], seen[step]
        active = chosen.get(step - (step - 1) % 2, set())
        visited |= active
        assert len(active) == method.n_active
        for name, weight in now.items():
            inside = [block for block in blocks if name.startswith(f"{block}.")]
            free = not inside or inside[0] in active
            assert (name in trains) == free
            assert free or torch.equal(weight, before[name]), (step, name)
            # A bias of the keys does not affect attention, so it changes only by rounding errors.
            assert not free or name.endswith("bias") or not torch.equal(weight, before[name]), (step, name)
    assert visited == (set(blocks) if method.n_active else set())


def test_recorded_norms_match_the_weights(request, tmp_path):
    run, seen, blocks = watched("gpt2", LISA(n_active=1, interval=3, lr=1e-2), request, tmp_path / "run")
    table = run.table.set_index(["step", "module", "quantity"])["value"]
    for step in range(1, 8):
        for block in blocks:
            inside = [name for name in seen[0][0] if name.startswith(f"{block}.")]
            now, before, first = (
                torch.cat([seen[at][0][name].flatten() for name in inside]).double() for at in (step, step - 1, 0)
            )
            for quantity, value in (("weight", now), ("update", now - first), ("step", now - before)):
                assert table[step, block, f"{quantity}_norm"] == near(value.norm(), terms=TINY, growth=TEXT)
            assert (table[step, block, "step_norm"] == 0) == (not seen[step][1].intersection(inside))


@pytest.mark.parametrize(("family", "moments"), [("bert", "reset"), ("gpt2", "keep")])
def test_all_blocks_active_equals_full_fine_tuning_bitwise(family, moments, request, tmp_path):
    found = []
    for method in (LISA(n_active=2, interval=2, moment_policy=moments, lr=1e-2), Full(lr=1e-2)):
        run, seen, _ = watched(family, method, request, tmp_path / method.name)
        found.append((seen, run.table[run.table["quantity"].isin(["loss", "eval_loss", "grad_norm"])]["value"]))
    for (ours, _), (theirs, _) in zip(found[0][0], found[1][0], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert found[0][1].tolist() == found[1][1].tolist()


@pytest.mark.parametrize("moments", POLICIES)
def test_all_blocks_active_differs_from_full_fine_tuning_only_under_reset_all(moments):
    """Up to the second draw no policy differs from it."""
    gradient = lambda p, index: torch.full_like(p, [1.0, -2.0, 0.5, 3.0][index])  # noqa: E731
    paths = []
    for interval in (2, 4):
        torch.manual_seed(0)
        model = toy()
        steps = drive(model, LISA(n_active=4, interval=interval, moment_policy=moments), 4, gradient)
        paths.append([torch.cat([p.detach().flatten() for p in model.parameters()]) for _ in steps])
    same = [torch.equal(one, other) for one, other in zip(*paths, strict=True)]
    assert same == [True, True, *[moments != "reset_all"] * 2]


# -- the optimizer's state ----------------------------------------------------------------------------------------


def toy() -> nn.Module:
    """Build a model of 544 parameters: 4 blocks of 88, and 192 outside."""
    parts = {"words": nn.Embedding(12, 8), "score": nn.Linear(8, 12, bias=False)}
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(4)]
    return nn.ModuleDict(parts | {"layers": nn.ModuleList(blocks)})


def drive(
    model: nn.Module,
    method: LISA,
    total: int,
    gradient: Callable[[Tensor, int], Tensor] = lambda p, index: torch.randn_like(p),
    decay: float = 0.0,
    none: bool = True,
) -> Iterator[Step]:
    """Train with given gradients in the loop's order; yield the step after each."""
    method.attach(model)
    step = step_of(model, method.optimizer(model, 0.1, 0.1, decay), total)
    for index in range(total):
        step.index = index
        method.before_step(step)
        step.optimizer.zero_grad(set_to_none=none)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.grad = gradient(parameter, index)
        step.optimizer.step()
        yield step


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that sets the blocks of the next draws."""

    def script(*draws):
        left = list(draws)
        monkeypatch.setattr(lisa, "draw", lambda *_: left.pop(0))

    return script


def state_bytes(step: Step) -> int:
    """Count the bytes of all tensors of the optimizer's state."""
    return sum(t.numel() * t.element_size() for state in step.optimizer.state.values() for t in state.values())


def expected_bytes(parameters: int, tensors: int) -> int:
    """Return the bytes of AdamW's two float32 moments and of a step counter per tensor."""
    return 8 * parameters + 4 * tensors


@pytest.mark.parametrize("moments", POLICIES)
def test_optimizer_state_size_follows_the_policy(moments, scripted):
    """Draws 3, 2, 2 and 1: each moment has 192 entries outside, and 88 for the drawn block or for all drawn so far."""
    scripted([3], [2], [2], [1])
    steps = [state_bytes(step) for step in drive(toy(), LISA(n_active=1, interval=3, moment_policy=moments), 12)]
    visited = [1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3] if moments == "keep" else [1] * 12
    assert steps == [expected_bytes(192 + 88 * blocks, 2 + 4 * blocks) for blocks in visited]


@pytest.mark.parametrize("moments", POLICIES)
def test_optimizer_state_size_of_a_run_follows_the_policy(moments, request, tmp_path):
    @dataclass(kw_only=True)
    class StateObserver(WeightObserver):
        def __call__(self, step):
            self.seen.append((state_bytes(step), step.model))
            return ()

    task, observer = request.getfixturevalue("task"), StateObserver()
    model = models.load(request.getfixturevalue("bert"), task=task)
    method = LISA(n_active=1, interval=2, moment_policy=moments)
    run = ls.train(model, task, method, observe=[observer], out=tmp_path / "run", **FAST)
    blocks = [list(model.get_submodule(name).parameters()) for name in run.modules.query("role == 'block'")["module"]]
    outside = [p for p in model.parameters() if all(p is not q for block in blocks for q in block)]
    coverage = dict(zip(table_of(run, "coverage")["step"], table_of(run, "coverage")["value"], strict=True))
    assert len(observer.seen) == 1 + FAST["steps"]
    for finished, (weight, _) in list(enumerate(observer.seen))[1:]:
        count = int(coverage[finished - (finished - 1) % 2]) if moments == "keep" else 1
        tensors = [*outside, *blocks[0] * count]
        assert weight == expected_bytes(sum(p.numel() for p in tensors), len(tensors))


@pytest.mark.parametrize(("moments", "moved"), [("keep", -0.05732), ("reset", 0.1), ("reset_all", 0.1)])
def test_reactivated_block_has_stale_moments_only_under_keep(moments, moved, scripted):
    """After an interval frozen, stale moments move the block against a gradient that changed its sign."""
    scripted([0], [1], [0])
    model = toy()
    watched, places = model["layers"][0][0].weight, []
    gradient = lambda p, index: torch.full_like(p, 1.0 if index < 5 else -1.0)  # noqa: E731
    for _ in drive(model, LISA(n_active=1, interval=5, moment_policy=moments), 11, gradient):
        places.append(watched.detach().clone())
    assert (places[10] - places[9]).mean().item() == pytest.approx(moved, abs=1e-5)
    assert all(torch.equal(place, places[4]) for place in places[5:10])


@pytest.mark.parametrize("moments", POLICIES)
@pytest.mark.parametrize("none", [True, False])
def test_frozen_block_does_not_change(moments, none, scripted):
    """This holds even if gradients are set to zero instead of None, with which momentum and decay would continue."""
    scripted([3], [2], [2], [1])
    model = toy()
    before, frozen = None, 0
    for step in drive(model, LISA(n_active=1, interval=3, moment_policy=moments), 12, decay=0.1, none=none):
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        still = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert len(still) == 3 * 4
        if step.index:
            assert all(torch.equal(now[name], before[name]) for name in still)
            assert not any(torch.equal(now[name], before[name]) for name in now.keys() - still)
            frozen += len(still)
        before = now
    assert frozen == 11 * 12


def test_step_counters_restart_as_the_policy_states(scripted):
    counters = {}
    for moments in POLICIES:
        scripted([0, 1], [1, 2], [1, 3])
        model = toy()
        (*_, last) = drive(model, LISA(n_active=2, interval=3, moment_policy=moments), 8)
        watched = [model["words"].weight, *(block[0].weight for block in model["layers"])]
        state = last.optimizer.state
        counters[moments] = [int(state[weight]["step"]) if weight in state else None for weight in watched]
    # In order: the embedding, and blocks of the first, of all, of the second and of the third draw.
    assert counters == {
        "reset": [8, None, 8, None, 2],
        "keep": [8, 3, 8, 3, 2],
        "reset_all": [2, None, 2, None, 2],
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_optimizer_contains_all_parameters(family):
    model = tiny(family).requires_grad_(False)
    method = LISA(n_active=1)
    method.attach(model)
    groups = method.optimizer(model, 1e-4, 1e-4, 0.0).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len(method._blocks) == (4 if family == "t5" else 2)


PAPER = {
    "LLaMA-2-7B": (transformers.LlamaConfig(), 6_738_415_616, 202_383_360, 262_148_096),
    "GPT-2 small, tied": (transformers.GPT2Config(), 124_439_808, 7_087_872, 39_385_344),
}


@pytest.mark.parametrize("name", PAPER)
def test_trained_parameter_count_matches_the_paper(name):
    """Embedding, head, final norm and the active blocks train; the models are on the meta device."""
    sizes, total, block, outside = PAPER[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(sizes)
    for active in (0, 2, 4, 8):
        method = LISA(n_active=active)
        method.attach(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
        step = step_of(model, method.optimizer(model, 1e-4, 1e-4, 0.0), 300)
        step.index = 0
        method.before_step(step)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trains == outside + active * block


# -- the schedule -------------------------------------------------------------------------------------------------


def schedule(method: LISA, total: int, seed: int = 0) -> list[list[int]]:
    """Return the active blocks of every interval."""
    found = []
    torch.manual_seed(seed)
    for step in drive(toy(), method, total):
        if step.index % method.period(total) == 0:
            found.append(method.active_)
    return found


@pytest.mark.parametrize(
    ("interval", "total", "draws"),
    [(None, 400, 20), (None, 60, 10), (None, 55, 10), (None, 4, 4), (7, 20, 3), (9, 9, 1)],
)
def test_number_of_draws_follows_the_interval(interval, total, draws):
    assert len(schedule(LISA(interval=interval), total)) == draws


def test_draws_use_draw_seed_and_not_the_global_generators():
    own = [schedule(LISA(interval=1, draw_seed=5), 30, seed) for seed in (0, 1)]
    runs = [schedule(LISA(interval=1), 30, seed) for seed in (0, 0, 1)]
    assert own[0] == own[1]
    assert runs[0] == runs[1] != runs[2]
    assert schedule(LISA(interval=1, draw_seed=1), 30) == runs[2]
    torch.manual_seed(0)
    np.random.seed(0)
    (*_,) = drive(toy(), LISA(interval=1), 9, gradient=lambda p, index: torch.ones_like(p))
    model_only = torch.get_rng_state(), np.random.get_state()[1].tolist()
    torch.manual_seed(0)
    np.random.seed(0)
    toy()
    assert torch.equal(model_only[0], torch.get_rng_state())
    assert model_only[1] == np.random.get_state()[1].tolist()


def test_draw_generator_differs_from_the_data_order():
    """The data order uses seed and epoch, and for NumPy (5, 0) and 5 are the same seed."""
    torch.manual_seed(5)
    method = LISA()
    method.attach(toy())
    for seed in (5, [5, 0], [5, 1]):
        assert method.generator_.bit_generator.state != np.random.default_rng(seed).bit_generator.state


def test_draws_and_probabilities_are_recorded(request, tmp_path):
    method = LISA(n_active=1, interval=2, weights=(1, 3))
    run, seen, blocks = watched("bert", method, request, tmp_path / "run")
    chances = table_of(run, "draw_probability")
    assert chances["step"].unique().tolist() == [0]
    assert dict(zip(chances["module"], chances["value"], strict=True)) == pytest.approx(
        dict(zip(blocks, (0.25, 0.75), strict=True))
    )
    trained = set()
    for step, rows in table_of(run, "active").groupby("step"):
        trains = {block for block in blocks if any(name.startswith(f"{block}.") for name in seen[step][1])}
        assert dict(zip(rows["module"], rows["value"], strict=True)) == {block: block in trains for block in blocks}
        trained |= trains
        assert table_of(run, "coverage").set_index("step")["value"][step] == len(trained)


@pytest.mark.parametrize(
    ("fields", "total", "warned"),
    [
        ({"interval": 4}, 20, 4),
        ({"interval": 4, "moment_policy": "reset_all"}, 20, 4),
        ({"interval": 4, "moment_policy": "keep"}, 20, 0),
        ({"interval": 5}, 20, 0),
        ({"interval": 4}, 4, 0),  # a single draw
        ({}, 20, 2),  # a tenth of the run
        ({}, 41, 0),
        ({"interval": 4, "n_active": 0}, 20, 0),  # no block trains
        ({"interval": 4, "n_active": 4}, 20, 0),  # all blocks of the toy always train
        ({"interval": 4, "n_active": 4, "moment_policy": "reset_all"}, 20, 4),
    ],
)
def test_short_interval_with_reset_moments_warns(fields, total, warned, recwarn):
    warnings.simplefilter("always")
    (*_,) = drive(toy(), LISA(**fields), total)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == bool(warned)
    assert all(line.startswith(f"interval {warned} ") and "AdamW" in line for line in messages)


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_active": -1}, "n_active must be an integer >= 0, got -1"),
        ({"n_active": 3}, "n_active must be <= 2, .*, got 3"),
        ({"n_active": 2, "weights": (0, 1)}, "n_active must be <= 1, .*, got 2"),
        ({"interval": 0}, "interval must be an integer >= 1, got 0"),
        ({"draw_seed": -1}, "draw_seed must be an integer >= 0, got -1"),
        ({"weights": (1, 2, 3)}, "weights must have 2 .*, got 3"),
        ({"weights": (1, -2)}, "weights must be .*, got -2"),
        ({"weights": (1, float("nan"))}, "weights must be .*, got nan"),
        ({"weights": (0, 0)}, "weights must .*, got only zeros"),
        ({"n_active": 0, "weights": (0, 0)}, "weights must .*, got only zeros"),
    ],
)
def test_invalid_input_raises_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as raised:
        LISA(**fields).attach(tiny("bert"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("make", [list, np.array, pd.Series, lambda given: np.array(given, np.float32)])
def test_weights_accept_any_sequence(make):
    """The configuration, and so the run id, does not depend on the type of the sequence."""
    method = LISA()
    method.weights = make((0.5, 2))  # set afterwards: in tests beartype checks the arguments
    method.__post_init__()
    assert method == LISA(weights=(0.5, 2))
    assert json.dumps(config(method)["weights"]) == "[0.5, 2]"


def test_model_without_blocks_raises():
    with pytest.raises(ValueError, match=r"LISA.* blocks.* Full"):
        LISA().attach(nn.Sequential(nn.Linear(4, 4)))
