"""Registered arms on a tiny model, from training to verdicts: what has no cause supports no claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config

from lorascope.evidence import registration, store
from lorascope.evidence.judging import judge_all
from lorascope.evidence.open_runs import OpenRun
from lorascope.evidence.statistics import PAIRS
from lorascope.inputs import tasks
from lorascope.methods import adalora, alora, autolora
from lorascope.probes import evidence
from lorascope.probes.base import Arm
from lorascope.probes.tfidf_baseline import tfidf_arm

SEEDS = 3
CLAIMS = registration.read()
QUALITY = ("lora.parity", "lora.words", "lora.rank", "lisa.parity", "lisa.redrawn", "lisa.blocks", "lisa.over_lora")
# Two layers have no thirds, so "adalora.top" cannot be judged on the tiny model.
RANKS = ("adalora.ffn", "adalora.stable", "adalora.beyond", "adalora.task")
RANKS += ("autolora.spread", "autolora.tasks", "alora.attention", "alora.queries")


@pytest.fixture
def judge(bert: str, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Train the arms of some claims on the tiny model with three seeds, and judge these claims."""
    registered = evidence.registered_arms()

    def tiny(arm: Any, rows: tasks.Task) -> Any:
        if not isinstance(arm, Arm):
            return tfidf_arm(arm.label, rows)
        own = rows
        if arm.task == "sentiment/domains":
            own = tasks.from_frame(rows.table.assign(label=rows.table["group"])[["text", "label"]], "groups")
        settings = {**arm.settings, "steps": min(arm.settings["steps"], 30), "batch_size": 8}
        return replace(arm, model=bert, task=own, settings=settings)

    def judged(ids: tuple[str, ...], rows: tasks.Task = task, may_void: bool = True) -> pd.Series:
        made = {label: tiny(arm, rows) for label, arm in registered.items()}
        monkeypatch.setattr(evidence, "registered_arms", lambda: made)
        claims = {id: CLAIMS.claims[id] for id in ids}
        design = {"seeds": (SEEDS,), "levels": (0.025,)}
        claims = {id: replace(each, design=replace(each.design, **design)) for id, each in claims.items()}
        reads = evidence.read_by_claims(replace(CLAIMS, claims=claims))
        for label in dict.fromkeys(label for claim in claims.values() for label in claim.arms):
            arm = CLAIMS.arms[label]
            for seed in range(100, 100 + (1 if arm.baseline else SEEDS)):
                rate = 1e-2 if arm.fields else None
                run = OpenRun(label, seed, "baseline" if arm.baseline else "judged", rate)
                kept = evidence.finish(run, CLAIMS, reads.get(label, []), tmp_path / "runs")
                if len(kept.rows):
                    store.add_rows(tmp_path / "evidence", kept.rows)
                store.add_run(tmp_path / "evidence", kept.row, kept.scores, kept.tables)
        verdicts, _ = judge_all(claims, PAIRS, store.read(tmp_path / "evidence"), lambda label: may_void)
        return verdicts.set_index("claim")["uncorrected"]

    with parallel_config(n_jobs=1):
        yield judged


@pytest.mark.slow
def test_shuffled_labels_support_no_claim_on_accuracy(judge: Callable[..., Any], task: tasks.Task) -> None:
    labels = np.random.default_rng(0).permutation(task.table["label"])
    shuffled = tasks.from_frame(task.table.assign(label=labels)[["text", "label", "group"]], "shuffled")
    # At chance level two arms are equal, which only the rule for arms that did not train tells from parity.
    assert not judge(QUALITY, shuffled).eq("supported").any()


@pytest.mark.slow
def test_random_scores_support_no_claim_on_ranks(judge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    true = adalora.importance
    monkeypatch.setattr(adalora, "importance", lambda *given: torch.rand(true(*given).shape, generator=draw))
    monkeypatch.setattr(alora, "importance", lambda full, without, only: torch.rand(len(only), generator=draw).numpy())
    monkeypatch.setattr(
        autolora, "adam", lambda gradient, moments, rate: (rate * torch.randn(gradient.shape, generator=draw), moments)
    )
    found = judge(RANKS, may_void=False)
    assert set(found) <= {"inconclusive", "not supported"}
