"""Claims of the second edition judged on made-up tables, and the code that judges them broken on purpose."""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd
import pytest
from made_up_study import Code, around, comparisons, made_up, planted, registration
from scipy import stats

from lorascope.papers import registry
from lorascope.papers.judging import registered_study
from lorascope.papers.judging.registered_study import StudyRegistration
from lorascope.papers.judging.study_statistics import effect_interval
from lorascope.papers.judging.words import word

SMALL = 1 / 20  # noise of made-up effects, as a fraction of the bound


class Situation(NamedTuple):
    """Effects of a claim in units of its bound, common noise, and the words that they must get."""

    effects: Mapping[str, float]
    word: str
    pair: str
    noise: float = 0.0


GAIN = {
    "true": Situation({"for": 3, "against": 0, "positive": 3}, "gain", "as claimed"),
    "zero": Situation({"for": 0, "against": 0, "positive": 3}, "no gain", "not even there"),
    "everywhere": Situation({"for": 3, "against": 3, "positive": 3}, "gain", "not only there"),
    "paired": Situation({"for": 3, "against": 2.8, "positive": 3}, "gain", "as claimed", noise=1.0),
    "half": Situation({"for": 0.5, "against": 0, "positive": 3}, "gain below m", "gain below m"),
    "reversed": Situation({"for": -3, "against": 0, "positive": 3}, "loss", "not even there"),
}
COST = {
    "true": Situation({"for": 0, "against": -3, "positive": -3}, "no cost", "as claimed"),
    "everywhere": Situation({"for": 0, "against": 0, "positive": -3}, "no cost", "not only there"),
    "half": Situation({"for": -0.5, "against": -3, "positive": -3}, "cost below d", "cost below d"),
    "reversed": Situation({"for": -3, "against": 0, "positive": -3}, "cost", "not even there"),
}
SITUATIONS = {"gain": GAIN, "cost": COST}


def all_claims() -> dict[str, tuple[StudyRegistration, Any]]:
    """Return a made-up claim of each form, and all registered ones."""
    made_up_claims = registration()
    claims = {id: (made_up_claims, comparison) for id, comparison in comparisons().items()}
    registered = with_all_seeds(registered_study.read())
    return claims | {id: (registered, comparison) for id, comparison in registry.COMPARISONS.items()}


def with_all_seeds(registered: StudyRegistration) -> StudyRegistration:
    """Return the registration with a number of seeds also for arms whose rates are not chosen yet."""
    arms = {
        label: arm if arm.seeds else msgspec.structs.replace(arm, seeds=16) for label, arm in registered.arms.items()
    }
    return replace(registered, arms=arms)


CLAIMS = all_claims()


def effects_of(registered: StudyRegistration, id: str, comparison: Any, situation: Situation) -> dict[str, np.ndarray]:
    """Return effects by seed with a small noise each and a common one; the positive control may have fewer seeds."""
    bound, count = registered.claims[id].rule.bound, registered.claims[id].rule.seeds
    common = around(0, situation.noise * bound, count, 9)
    effects = {}
    for number, name in enumerate(comparison.statistics()):
        if name == "positive":
            count = min(registered.arms[label].seeds for label in comparison.positive.arms())
        noise = around(situation.effects[name] * bound, SMALL * bound, count, number)
        effects[name] = noise if name == "positive" else noise + common
    return effects


def judge(registered: StudyRegistration, id: str, comparison: Any, evidence: Any, code: Code | None = None) -> Any:
    """Return the row of a claim in the results."""
    only = replace(registered, claims={id: registered.claims[id]})
    results = (code or Code()).study_results.compute(only, {id: planted(comparison)}, evidence)
    return results.results.iloc[0]


def failures(registered: StudyRegistration, id: str, comparison: Any, code: Code | None = None) -> Iterator[str]:
    """Return the situations in which a claim gets another word than it must, or another interval."""
    true_comparison = CLAIMS[id][1]
    for name, situation in SITUATIONS[registered.claims[id].rule.kind].items():
        effects = effects_of(registered, id, true_comparison, situation)
        evidence = made_up(registered, id, true_comparison, effects, code)
        row = judge(registered, id, comparison, evidence, code)
        pair = situation.pair if true_comparison.against else ""
        if (row["word"], row["pair"]) != (situation.word, pair):
            yield f"{name}: {row['word']}, {row['pair']}, {row['note']}"
        if id != "text" and not id.startswith("text."):
            values = effects["for"]
            half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
            expected = [values.mean(), values.mean() - half, values.mean() + half]
            if not np.allclose(list(row[["effect", "low", "high"]]), expected, rtol=1e-9, atol=1e-9):
                yield f"{name}: interval"
    if true_comparison.positive:
        for effect in (3, 0, -3):
            situation = Situation({"for": effect, "against": 0, "positive": 0}, "", "")
            evidence = made_up(
                registered, id, true_comparison, effects_of(registered, id, true_comparison, situation), code
            )
            row = judge(registered, id, comparison, evidence, code)
            if row["word"] != "no headroom":
                yield f"no headroom at {effect}: {row['word']}"
    yield from not_noticed(registered, id, comparison, code)


def not_noticed(registered: StudyRegistration, id: str, comparison: Any, code: Code | None = None) -> Iterator[str]:
    """Return the phases, tasks and seeds of arms that did not learn without being named in the note."""
    situation = SITUATIONS[registered.claims[id].rule.kind]["true"]
    true_comparison = CLAIMS[id][1]
    evidence = made_up(registered, id, true_comparison, effects_of(registered, id, true_comparison, situation), code)
    bad = {"gap": 0.9, "base_gap": 1.0} | dict.fromkeys(["accuracy", "majority", "loss", "first_loss"], np.nan)
    runs = evidence.runs
    arms = sorted(true_comparison.arms())
    for arm in {*arms[:3], *arms[-3:]}:
        row = runs[(runs["arm"] == arm) & (runs["seed"] == 203)]
        others = runs.drop(row.index)
        cases = {
            f"{arm}, phase search, seed 203": [row, row.assign(phase="search", **bad)],
            f"{arm}, task second, seed 203": [row, row.assign(task="second", **bad)],
            f"{arm}, seed 203": [row.assign(**bad)],
        }
        for note, rows in cases.items():
            changed = replace(evidence, runs=pd.concat([others, *rows], ignore_index=True), _tables_by_run={})
            result = judge(registered, id, comparison, changed, code)
            if (result["word"], result["note"]) != ("not learned", note):
                yield f"{note}: {result['word']}, {result['note']}"


@pytest.mark.parametrize("id", CLAIMS)
def test_claim_on_made_up_tables(id: str) -> None:
    registered, comparison = CLAIMS[id]
    assert list(failures(registered, id, comparison)) == []


def test_a_missing_run_is_named_and_nothing_is_computed() -> None:
    registered, comparison = CLAIMS["gain"]
    effects = effects_of(registered, "gain", comparison, GAIN["true"])
    evidence = made_up(registered, "gain", comparison, effects)
    runs = evidence.runs
    is_missing = (runs["arm"] == "LoRA, even") & (runs["seed"] == 215)
    row = judge(registered, "gain", comparison, replace(evidence, runs=runs[~is_missing]))
    assert (row["word"], row["note"], row["n"]) == ("not run", "LoRA, even, seed 215", 0)
    assert row[["effect", "low", "high", "positive_low"]].isna().all()


def test_printed_gain_is_compared_in_equal_units_only() -> None:
    columns = {}
    for id in ("gain", "text"):
        registered, comparison = CLAIMS[id]
        kind = registered.claims[id].rule.kind
        effects = effects_of(registered, id, comparison, SITUATIONS[kind]["true"])
        columns[id] = judge(registered, id, comparison, made_up(registered, id, comparison, effects))
    assert columns["gain"]["excludes_printed"] == ""
    assert columns["gain"]["excludes_zero"] == "yes"
    assert columns["text"]["excludes_printed"] == "yes"  # 0.89, and the effect is near 0
    assert columns["text"]["excludes_zero"] == "no"


def test_two_way_interval_by_hand() -> None:
    differences = np.array([[1, 0, -1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], float)
    interval = effect_interval(differences, np.array([0, 0, 1, 2]))
    assert interval.mean == pytest.approx(0.25)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.01810, abs=5e-6)


WRONG = {
    ("gain", 0.0): {"gain", "gain below m", "loss"},
    ("gain", 0.5): {"loss"},
    ("gain", 1.0): {"no gain", "gain below m", "loss"},
    ("cost", 0.0): {"cost", "cost below d"},
    ("cost", -0.5): set(),
    ("cost", -1.0): {"no cost", "cost below d"},
}


def test_a_narrow_interval_is_never_open() -> None:
    rng = np.random.default_rng(0)
    for mean, half in zip(rng.uniform(-3, 3, 500), rng.uniform(0, 0.4999, 500), strict=True):
        for kind in ("gain", "cost"):
            assert word(kind, 1.0, mean - half, mean + half) != "open"  # type: ignore[arg-type]


def test_a_diverged_run_is_not_learned_and_has_no_interval() -> None:
    registered, comparison = CLAIMS["gain"]
    evidence = made_up(registered, "gain", comparison, effects_of(registered, "gain", comparison, GAIN["true"]))
    runs = evidence.runs
    is_diverged = (runs["arm"] == "LoRA, uneven") & (runs["seed"] == 204)
    runs = runs.assign(gap=runs["gap"].mask(is_diverged))
    row = judge(registered, "gain", comparison, replace(evidence, runs=runs))
    assert (row["word"], row["note"], row["excludes_zero"]) == ("not learned", "LoRA, uneven, seed 204", "")
    assert row[["effect", "low", "high"]].isna().all()
    with pytest.raises(ValueError, match="not finite"):
        judge(registered, "table", *without_one_value(*CLAIMS["table"]))


def without_one_value(registered: StudyRegistration, comparison: Any) -> tuple[Any, Any]:
    """Return a claim on a table with evidence that lacks a value, although its run learned."""
    evidence = made_up(registered, "table", comparison, effects_of(registered, "table", comparison, GAIN["true"]))
    table = evidence.tables["neurons"]
    table.loc[3, "planted"] = np.nan
    return comparison, evidence


@pytest.mark.parametrize(("kind", "effect"), WRONG)
def test_wrong_words_are_as_rare_as_their_level(kind: Any, effect: float) -> None:
    studies, seeds, bound = 2000, 16, 2.0
    deviation = 0.9 * (bound / 2) / (stats.t.ppf(0.975, seeds - 1) / seeds**0.5)
    samples = np.random.default_rng(7).normal(effect * bound, deviation, (studies, seeds))
    intervals = [effect_interval(sample) for sample in samples]
    words = pd.Series([word(kind, bound, interval.low, interval.high) for interval in intervals])
    for wrong in WRONG[kind, effect]:
        assert (words == wrong).mean() <= 0.032, wrong


MUTANTS = {
    "method and control exchanged": (
        "papers.judging.study_statistics",
        "of(f'{first}, {truth}') - of(f'{second}, {truth}')",
        "of(f'{second}, {truth}') - of(f'{first}, {truth}')",
    ),
    "sign": ("papers.judging.study_results", "statistic(evidence, seeds[name])", "-statistic(evidence, seeds[name])"),
    "control 0": ("papers.judging.study_statistics", " - of(f'{second}, {truth}')", " - Constant(0.0)"),
    "bound times 10": ("papers.judging.study_results", "claim.rule.bound, low", "10 * claim.rule.bound, low"),
    "bound times 0.1": ("papers.judging.study_results", "claim.rule.bound, low", "0.1 * claim.rule.bound, low"),
    "for and against exchanged": (
        "papers.judging.study_statistics",
        "StudyComparison(difference(method, control, favorable), difference(method, control, other)",
        "StudyComparison(difference(method, control, other), difference(method, control, favorable)",
    ),
    "difference not paired": (
        "papers.judging.study_results", "- values['against']", "- __import__('numpy').roll(values['against'], 1)"
    ),
    "seed i with i + 1": (
        "papers.judging.study_statistics",
        " - of(f'{second}, {truth}')",
        " - Combined(lambda values: np.roll(values, 1), (of(f'{second}, {truth}'),))",
    ),
    "0.95 instead of 0.975": ("papers.judging.study_statistics", "(1 - CONFIDENCE) / 2", "1 - CONFIDENCE"),
    "n instead of n - 1": ("analysis.seed_intervals", "values.std(ddof=1)", "values.std(ddof=0)"),
    "n degrees of freedom": ("analysis.seed_intervals", "((error, float(n - 1)),)", "((error, float(n)),)"),
    "learned line of the gap 0": ("papers.judging.study_statistics", "MIN_CLOSED = 20.0", "MIN_CLOSED = 0.0"),
    "only the last phase": (
        "papers.judging.study_results", "[evidence.judged(arm, seed)", "[evidence.of_phase(arm, seed)"
    ),
    "only the mean over tasks": (
        "papers.judging.study_results",
        "rows = pd.concat([evidence.judged(arm, seed) for arm, seed in runs])",
        "rows = pd.concat([evidence.judged(arm, seed) for arm, seed in runs])\n"
        "    rows = rows.groupby(['arm', 'seed', 'phase'], as_index=False).mean(numeric_only=True).assign(task='')",
    ),
    "only the first seed": (
        "papers.judging.study_results", "for arm, seed in runs])", "for arm, seed in runs if seed == 200])"
    ),
    "positive control skipped": ("papers.judging.study_results", "elif positive and", "elif False and"),
    "acceptable cost is a gain": ("papers.judging.words", "low > -bound", "low > bound"),
    "loss not noticed": ("papers.judging.words", "if high < 0:", "if high < -100 * bound:"),
    "headroom of a cost by a gain": ("papers.judging.words", "else high < 0", "else low > 0"),
    "difference above or below": ("papers.judging.words", "difference_low > 0", "difference_low != 0"),
    "base gap of another seed": (
        "papers.judging.kept_study",
        "rows['base_gap'].to_numpy()",
        "self.of_phase(arm, max(seed - 1, 200), phase)['base_gap'].to_numpy()",
    ),
}  # fmt: skip
RELOADED = (
    "analysis.seed_intervals", "papers.judging.kept_study", "papers.judging.words", "papers.judging.statistics",
    "papers.judging.study_statistics", "papers.judging.study_results",
)  # fmt: skip
"""Modules that are loaded again, in the order in which they import each other."""


def mutated(monkeypatch: pytest.MonkeyPatch, module: str, before: str, after: str) -> Code:
    """Return the modules that judge, with one edit of the syntax tree of one of them."""
    modules = {}
    for name in RELOADED[RELOADED.index(module) :]:
        spec = importlib.util.find_spec(f"lorascope.{name}")
        assert spec is not None
        assert spec.origin is not None
        source = ast.unparse(ast.parse(Path(spec.origin).read_text("utf-8")))
        if name == module:
            assert source.count(before) == 1, f"{before} occurs {source.count(before)} times"
            source = source.replace(before, after)
        fresh = types.ModuleType(spec.name)
        monkeypatch.setitem(sys.modules, spec.name, fresh)
        exec(compile(source, spec.origin, "exec"), vars(fresh))
        modules[name.rpartition(".")[2]] = fresh
    return Code()._replace(**{name: value for name, value in modules.items() if name in Code._fields})


@pytest.mark.parametrize("name", MUTANTS)
def test_no_mutant_survives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = mutated(monkeypatch, *MUTANTS[name])
    all_comparisons = comparisons(code.study_statistics)
    pairs = (failures(registration(), id, all_comparisons[id], code) for id in ("gain", "cost"))
    assert any(caught for of_claim in pairs for caught in of_claim)
