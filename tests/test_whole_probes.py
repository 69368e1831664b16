"""Registered arms on a tiny model, from training to verdicts: what has no cause supports no claim."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config

from lorascope.inputs import tasks
from lorascope.methods import adalora, alora, autolora, method
from lorascope.papers import score_agreement
from lorascope.papers.judging import kept_runs, registration
from lorascope.papers.judging import verdicts as judging
from lorascope.papers.judging.verdicts import judge_all
from lorascope.papers.lora import tfidf_arm
from lorascope.papers.probe import Arm
from lorascope.papers.registry import PAIRS
from lorascope.papers.training import train_arms
from lorascope.papers.training.missing_runs import OpenRun

SEEDS = 3
CLAIMS = registration.read()
QUALITY = ("lora.parity", "lora.words", "lora.rank", "lisa.parity", "lisa.redrawn", "lisa.blocks", "lisa.over_lora")
# Two layers have no thirds, so "adalora.top" cannot be judged on the tiny model.
RANKS = ("adalora.ffn", "adalora.stable", "adalora.beyond", "adalora.task")
RANKS += ("autolora.spread", "autolora.tasks", "alora.attention", "alora.queries")
SCORES = tuple(id for id in CLAIMS.claims if id.startswith("agreement."))
# The other claims of LISA on norms need a decoder.
UPDATES = ("lora.direction", "lora.amplify", "lisa.embed", "lisa.learned", "hydralora.tasks")
FACTORS = ("lora.amplify", *(id for id in CLAIMS.claims if id.startswith("asymmetry.")))


@pytest.fixture
def judge(bert: str, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Train the arms of some claims on the tiny model with three seeds, and judge these claims.

    A statistic that is not finite is rejected, and the outcome here is "undefined".
    """
    registered = train_arms.registered_arms()

    def tiny(arm: Any, rows: tasks.Task, steps: int) -> Any:
        if not isinstance(arm, Arm):
            return tfidf_arm(arm.label, rows)
        own = rows
        if arm.task == "sentiment/domains":
            own = tasks.from_frame(rows.table.assign(label=rows.table["group"])[["text", "label"]], "groups")
        settings = {**arm.settings, "steps": min(arm.settings["steps"], steps), "batch_size": 8}
        settings |= {name: 20 for name in ("eval_size", "test_size") if name in settings}
        return replace(arm, model=bert, task=own, settings=settings)

    def judged(ids: tuple[str, ...], rows: tasks.Task = task, may_void: bool = True, steps: int = 30) -> pd.Series:
        made = {label: tiny(arm, rows, steps) for label, arm in registered.items()}
        monkeypatch.setattr(train_arms, "registered_arms", lambda: made)
        claims = {id: CLAIMS.claims[id] for id in ids}
        design = {"seeds": (SEEDS,), "levels": (0.025,)}
        claims = {id: replace(each, design=replace(each.design, **design)) for id, each in claims.items()}
        reads = train_arms.read_by_claims(replace(CLAIMS, claims=claims))
        for label in dict.fromkeys(label for claim in claims.values() for label in claim.arms):
            arm = CLAIMS.arms[label]
            for seed in range(100, 100 + (1 if arm.baseline else SEEDS)):
                rate = 1e-2 if arm.fields else None
                run = OpenRun(label, seed, "baseline" if arm.baseline else "judged", rate)
                kept = train_arms.finish(run, CLAIMS, reads.get(label, []), tmp_path / "runs")
                if len(kept.rows):
                    kept_runs.add_rows(tmp_path / "evidence", kept.rows)
                kept_runs.add_run(tmp_path / "evidence", kept.row, kept.scores, kept.tables)
        found = kept_runs.read(tmp_path / "evidence")
        if not may_void:  # also for earlier phases, which always may
            monkeypatch.setattr(judging, "_phases_at_chance", lambda evidence, run: set())

        def outcome(id: str) -> str:
            try:
                with np.errstate(divide="ignore", invalid="ignore"):
                    arms = {label: replace(arm, may_void=may_void) for label, arm in CLAIMS.arms.items()}
                    verdicts, _ = judge_all({id: claims[id]}, PAIRS, found, arms)
            except ValueError as error:
                if not re.match(rf"cannot judge {re.escape(id)} from .*: values must be finite", str(error)):
                    raise
                return "undefined"
            return str(verdicts["uncorrected"].item())

        return pd.Series({id: outcome(id) for id in ids})

    with parallel_config(n_jobs=1):
        yield judged


@pytest.mark.slow
def test_shuffled_labels_support_no_claim_on_accuracy(judge: Callable[..., Any], task: tasks.Task) -> None:
    labels = np.random.default_rng(0).permutation(task.table["label"])
    shuffled = tasks.from_frame(task.table.assign(label=labels)[["text", "label", "group"]], "shuffled")
    # Two arms at chance level are equal. Only the rule for arms that did not train distinguishes this from parity.
    assert not judge(QUALITY, shuffled).eq("supported").any()


@pytest.mark.slow
def test_random_scores_support_no_claim_on_ranks(judge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    terms = adalora.importance_terms
    monkeypatch.setattr(adalora, "importance_terms", lambda *given: torch.rand(terms(*given).shape, generator=draw))
    monkeypatch.setattr(
        alora, "importance_score", lambda full, without, only: torch.rand(len(only), generator=draw).numpy()
    )
    monkeypatch.setattr(
        autolora, "adam", lambda gradient, moments, rate: (rate * torch.randn(gradient.shape, generator=draw), moments)
    )
    found = judge(RANKS, may_void=False)
    assert set(found) <= {"inconclusive", "not supported"}


def test_random_scores_support_no_claim_on_scores(
    judge: Callable[..., Any], task: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(0)

    def randomize(function: Callable[..., score_agreement.Rows]) -> Callable[..., score_agreement.Rows]:
        def scores(*given: Any) -> score_agreement.Rows:
            found = function(*given)
            return {name: {module: draw.random(len(each)) for module, each in of.items()} for name, of in found.items()}

        return scores

    for name in ("adalora_scores", "alora_scores", "autolora_scores"):
        monkeypatch.setattr(score_agreement, name, randomize(getattr(score_agreement, name)))
    for name, size in {"EXAMPLES": 8, "SCORED": 2, "JUDGED": 2, "REMOVED": 1}.items():
        monkeypatch.setattr(score_agreement, name, size)
    monkeypatch.setattr(tasks, "load", lambda name: task)
    found = judge(SCORES, may_void=False)
    assert set(found) <= {"inconclusive", "not supported"}


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train heads, but give adapters a learning rate of zero, so that updates keep their initial values."""
    groups = method.parameter_groups

    def without_adapters(model: Any, lr: float, *rates: float) -> Any:
        return groups(model, 0.0 if method.attached_deltas(model) else lr, *rates)

    monkeypatch.setattr(method, "parameter_groups", without_adapters)


@pytest.mark.usefixtures("frozen")
def test_frozen_adapters_support_no_claim_on_updates(judge: Callable[..., Any]) -> None:
    found = judge(UPDATES, may_void=False, steps=5)
    # The norm of an update of zeros has no logarithm.
    undefined = dict.fromkeys(("lora.amplify", "lisa.embed", "lisa.learned"), "undefined")
    assert found.to_dict() == {"lora.direction": "not supported", "hydralora.tasks": "not supported"} | undefined


@pytest.mark.slow
@pytest.mark.usefixtures("frozen")
def test_frozen_factors_support_no_claim_on_factors(
    judge: Callable[..., Any], task: tasks.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach, draw = method.AdapterMethod.attach, torch.Generator().manual_seed(0)

    def with_random_b(self: Any, model: Any) -> None:
        attach(self, model)
        for delta in method.attached_deltas(model).values():
            torch.nn.init.normal_(delta.B, generator=draw)  # a B of zeros has no direction

    monkeypatch.setattr(method.AdapterMethod, "attach", with_random_b)
    monkeypatch.setattr(tasks, "load", lambda name: task)
    found = judge(FACTORS, may_void=False, steps=2)
    assert found.pop("asymmetry.picture") == "supported"  # it only needs a shared start
    assert set(found) <= {"inconclusive", "not supported"}
