"""Every method on the first blocks of a real decoder and real text; the oracle is in ``cells``."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from cells import METHODS, check

from lorascope import models, tasks

BLOCKS = 2  # as many as the tiny models of ``families`` have
# A rate that a trained model bears; its embedding of 28 million weights is not factored, which takes long.
OWN = {
    "full": {"lr": 1e-3},
    "lisa": {"lr": 1e-3},
    "adapprox": {"lr": 1e-3, "dense": "embed", "min_dim": 64},
    "alora": {"score_rows": 2},
}


@pytest.fixture(scope="module")
def smollm2():
    """The first blocks of SmolLM2, and four hundred sentences as prompts."""
    rows = tasks.load("sentiment").table.iloc[::48]  # sorted by hash, by which splits are drawn
    task = tasks.from_frame(rows[["text", "label", "group"]], "sentences")
    return models.load("smollm2", blocks=BLOCKS), task


@pytest.mark.real
@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_on_smollm2(method, smollm2, tmp_path):
    settings = {"batch_size": 2, "eval_size": 6, "test_size": 6, "max_length": 24}
    check("llama", method, *smollm2, tmp_path / "run", replace(METHODS[method], **OWN.get(method, {})), **settings)
    shutil.rmtree(tmp_path / "run")  # a whole model twice, where all of it trains
