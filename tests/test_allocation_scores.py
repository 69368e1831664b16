"""Kept scores of allocators: they imply the ranks that the allocators found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from killing import SETTINGS

import lorascope as ls
from lorascope.inputs import models
from lorascope.methods import AdaLoRA, ALoRA, AutoLoRA
from lorascope.methods.method import Method
from lorascope.papers.rank_tables import first_and_last_scores
from lorascope.runs.run import Run

ADALORA = AdaLoRA(lr=1e-1, init_rank=3, target_rank=1, initial_steps=0, final_steps=1, mask_every=1)


@pytest.fixture
def train(bert, task, tmp_path: Path):
    def train(method: Method) -> Run:
        return ls.train(models.load(bert, task=task), task, method, out=tmp_path / "run", **SETTINGS)

    return train


def test_best_components_of_adalora_are_those_that_it_retains(train) -> None:
    run = train(ADALORA)
    scores = first_and_last_scores(run)
    first, last = (scores[scores["step"] == step] for step in (scores["step"].min(), scores["step"].max()))
    assert len(first) == len(last) == 3 * len(run.ranks())
    assert not np.allclose(first["score"], last["score"], atol=0)
    best = last.nlargest(sum(run.ranks().values()), "score")
    assert best["module"].value_counts().reindex(run.ranks()).fillna(0).astype(int).to_dict() == run.ranks()


def test_components_of_autolora_above_the_mean_are_its_ranks(train) -> None:
    run = train(AutoLoRA(lr=1e-2, rank=4, selection_lr=1.0, targets="all-linear"))
    scores = first_and_last_scores(run)
    assert scores["step"].nunique() == 1  # the end of the search
    is_retained = scores["score"] >= 1 / 4 - 1e-6
    assert is_retained.groupby(scores["module"]).sum().to_dict() == run.ranks()


def test_rounds_of_alora_score_the_components_of_that_time(train) -> None:
    run = train(ALoRA(init_rank=2, score_rows=4, rounds=3, warm_steps=1, round_steps=1, lr=1e-2))
    scores = first_and_last_scores(run)
    assert sorted(set(scores["step"])) == [1, 3]
    for step in (1, 3):
        # A round records ranks after it, so those before it count its components.
        ranks = run.table[(run.table["quantity"] == "rank") & (run.table["step"] < step)]
        before = ranks[ranks["step"] == ranks["step"].max()].set_index("module")["value"]
        counts = scores[scores["step"] == step]["module"].value_counts()
        assert counts.sort_index().to_dict() == before[before > 0].astype(int).sort_index().to_dict()
