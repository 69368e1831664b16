"""Every claim judged on planted evidence, and every claim broken on purpose, which one of these tests must notice."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted_claims import BY_SEED, FIRST, Pair, in_range, plant

from lorascope.analysis.seed_intervals import Estimate
from lorascope.papers.judging import registration
from lorascope.papers.judging.claims import Claim
from lorascope.papers.judging.kept_runs import RUN_COLUMNS, Evidence
from lorascope.papers.judging.registration import Registered
from lorascope.papers.judging.statistics import Constant, Statistic, estimate_effect
from lorascope.papers.registry import PAIRS, module_of

CLAIMS = registration.read().of_tier("primary", "secondary")
SEEDS, REPETITIONS = 5, 20
PRECISION = 1 / 8
"""Largest error of a planted effect, as a fraction of the bound."""
NOTHING = Evidence(pd.DataFrame(columns=list(RUN_COLUMNS)), pd.DataFrame())
"""Evidence without runs, which suffices for constants."""


@dataclass(frozen=True)
class Planted:
    """Evidence of one situation, and the effect and the outcome that it must have."""

    evidence: Evidence
    effect: float
    outcome: str


def control_value(registered: Registered, pair: Pair) -> float:
    """Return the value around which the control is planted."""
    if not pair[1].arms():
        return float(pair[1](NOTHING, []))
    return in_range(registered, pair)


def moves_with_seeds(registered: Registered) -> bool:
    """Whether the control has another value for each seed, and one that can be planted."""
    moving = registered.id != "lora.words" and registered.design.interval != "jackknife"  # not of a baseline
    return bool(PAIRS[registered.id][1].arms()) and moving


def draw(registered: Registered, effect: float, noise: float, seed: int = 0) -> Evidence:
    """Plant an effect; within a seed, statistic and control share a part that is much larger than the noise."""
    pair, bound = PAIRS[registered.id], registered.claim.bound
    rng = np.random.default_rng(seed)
    control = np.full(SEEDS, control_value(registered, pair))
    if moves_with_seeds(registered):
        control = control + bound * np.array([-1.0, 0.6, 1.0, -0.6, 0.0])
    own = rng.standard_normal(SEEDS)
    statistic = control + effect + noise * (own if noise >= bound else (own - own.mean()) / own.std(ddof=1))
    return plant(registered, pair, statistic.tolist(), control.tolist(), seed)


@lru_cache(maxsize=1)  # the evidence of all claims takes gigabytes
def situations(id: str) -> tuple[Planted, ...]:
    """Return a true claim, a null, an effect of half the bound, and one whose interval just reaches the bound."""
    registered = CLAIMS[id]
    claim, small = registered.claim, registered.claim.bound / 50
    bound = claim.bound
    effects = {
        "superiority": ((3 * bound, "supported"), (0.0, "not supported"), (bound / 2, "not supported")),
        "non-inferiority": ((0.0, "supported"), (-3 * bound, "not supported"), (-bound / 2, "supported")),
        "equivalence": ((0.0, "supported"), (3 * bound, "not supported"), (bound / 2, "supported")),
    }[claim.kind]
    return tuple(Planted(draw(registered, effect, small), effect, outcome) for effect, outcome in effects)


def at_the_edge(id: str) -> Iterator[Evidence]:
    registered = CLAIMS[id]
    edge = -registered.claim.bound if registered.claim.kind == "non-inferiority" else registered.claim.bound
    return (draw(registered, edge, registered.claim.bound, seed) for seed in range(REPETITIONS))


def estimate(pair: Pair, evidence: Evidence, interval: Any) -> Estimate:
    return estimate_effect(*pair, evidence, range(FIRST, FIRST + SEEDS), interval)[0]


def failures(registered: Registered, pair: Pair) -> Iterator[str]:
    """Return the situations in which a claim is judged wrongly."""
    interval, level = registered.design.interval, registered.design.levels[0]
    for name, planted in zip(("true", "null", "half"), situations(registered.id), strict=True):
        effect = estimate(pair, planted.evidence, interval)
        found = registered.claim.outcome(effect, level)
        if found != planted.outcome:
            yield f"{name}: {found}"
        elif abs(effect.mean - planted.effect) > PRECISION * CLAIMS[registered.id].claim.bound:
            yield f"{name}: effect {effect.mean:g} instead of {planted.effect:g}"


def just_missed(registered: Registered) -> Estimate:
    """Return an estimate whose interval at the first level misses its bound by a hundredth of its width."""
    claim, level = registered.claim, registered.design.levels[0]
    effect = estimate(PAIRS[registered.id], situations(registered.id)[0].evidence, registered.design.interval)
    half = effect.half_width(level)
    at = {"superiority": claim.bound, "non-inferiority": -claim.bound, "equivalence": -claim.bound}[claim.kind]
    return replace(effect, mean=at + 0.99 * half)


def test_planted_tables_are_of_claims() -> None:
    assert BY_SEED.keys() <= CLAIMS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("id", CLAIMS)
def test_claim_on_planted_evidence(id: str) -> None:
    assert list(failures(CLAIMS[id], PAIRS[id])) == []


@pytest.mark.slow
@pytest.mark.parametrize("id", CLAIMS)
def test_noise_at_the_edge_seldom_supports_a_claim(id: str) -> None:
    registered = CLAIMS[id]
    level = registered.design.levels[0]
    supported = [
        registered.claim.outcome(estimate(PAIRS[id], evidence, registered.design.interval), level) == "supported"
        for evidence in at_the_edge(id)
    ]
    assert sum(supported) <= 2


@dataclass(frozen=True)
class Shifted(Statistic):
    """A statistic with the seeds moved by one, so that pairs of a seed become pairs of two."""

    of: Statistic

    def arms(self) -> set[str]:
        return self.of.arms()

    def __call__(self, evidence: Evidence, seeds: Sequence[int]) -> np.ndarray:
        return self.of(evidence, [*seeds[1:], seeds[0]])


def row_of(id: str) -> tuple[ast.Tuple, dict[str, Any]]:
    """Return the syntax tree of a claim's row, and the names that it uses."""
    module = importlib.import_module(module_of(id))
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == id:
                    assert isinstance(value, ast.Tuple)
                    return value, vars(module) | {"Shifted": Shifted, "Constant": Constant}
    raise AssertionError(f"{id} has no row")


def edited(id: str) -> Iterator[tuple[str, Pair]]:
    """Return the row of a claim with one edit each, of those that change its effect."""
    row, names = row_of(id)
    statistic, control = (ast.unparse(part) for part in row.elts)
    texts = {
        "exchanged": f"({control}, {statistic})",
        "sign turned": f"(-({statistic}), -({control}))",
        "control is 0": f"({statistic}, Constant(0.0))",
    }
    if moves_with_seeds(CLAIMS[id]):
        texts["next seed"] = f"({statistic}, Shifted({control}))"
    for name, text in texts.items():
        pair = eval(text, names)
        if name == "control is 0" and not PAIRS[id][1].arms() and float(PAIRS[id][1](NOTHING, [])) == 0:
            continue
        yield name, pair
    yield from with_another_arm(id)


def with_another_arm(id: str) -> Iterator[tuple[str, Pair]]:
    """Return the row of a claim with each arm replaced by each other one of the claim.

    Arms that are only trained, and whose tables are not read, are left out.
    """
    row, names = row_of(id)
    labels = sorted(PAIRS[id][0].arms() | PAIRS[id][1].arms())
    for node in (each for each in ast.walk(row) if isinstance(each, ast.Name)):
        name, value = node.id, names.get(node.id)
        used = (value,) if isinstance(value, str) else value
        if not (isinstance(used, tuple) and set(used) <= set(labels)):
            continue
        node.id = "another"
        text = ast.unparse(row)
        node.id = name
        for (at, arm), label in product(enumerate(used), labels):
            changed = (*used[:at], label, *used[at + 1 :])
            pair = eval(text, names | {"another": label if isinstance(value, str) else changed})
            if [part.reads().keys() for part in pair] != [part.reads().keys() for part in PAIRS[id]]:
                yield f"{name}: {label} instead of {arm}", pair


@pytest.mark.slow
@pytest.mark.parametrize("id", CLAIMS)
def test_no_edit_of_a_claim_survives(id: str) -> None:
    registered = CLAIMS[id]
    survivors = []
    for name, pair in edited(id):
        try:
            if not list(failures(registered, pair)):
                survivors.append(name)
        except (KeyError, ValueError):  # an arm or a shape that the claim does not have
            continue
    for factor in (0.1, 10):
        bound = {"margin": registered.bound.margin, "tolerance": registered.bound.tolerance}
        scaled = {name: value and value * factor for name, value in bound.items()}
        if not list(failures(replace(registered, bound=replace(registered.bound, **scaled)), PAIRS[id])):
            survivors.append(f"bound times {factor}")
    missed = just_missed(registered)
    claim: Claim = registered.claim
    assert claim.outcome(missed, registered.design.levels[0]) == "inconclusive"
    for level in registered.design.levels[1:]:
        if claim.outcome(missed, level) == "inconclusive":
            survivors.append(f"level {level}")
    assert survivors == []
