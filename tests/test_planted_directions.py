"""A direction planted in the weights that wrote a text, against the components of students that learned the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch.nn.functional import normalize

import lorascope as ls
from lorascope.array_types import Float
from lorascope.inputs import tasks
from lorascope.papers.setups import planted_teacher

MODULE = "model.layers.2.mlp.down_proj"
STRENGTH = 1.5  # of the planted component, relative to the largest singular value of its module
SETTINGS: dict[str, Any] = {"steps": 100, "batch_size": 16, "eval_every": 0, "test_size": 32, "progress": False}


def planted_text(seed: int) -> tuple[tasks.Task, Float[np.ndarray, "out"]]:
    """Return text of the base with one component sigma u v^T in one module, and u."""
    model: Any = planted_teacher.student()
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_submodule(MODULE).weight
    u, v = (normalize(torch.randn(side, generator=generator), dim=0) for side in weight.shape)
    with torch.no_grad():
        weight.add_(STRENGTH * torch.linalg.matrix_norm(weight, 2) * torch.outer(u, v))
    rows = planted_teacher._sample_texts(model, seed).tolist()
    lines = [" ".join(map(planted_teacher.token_word, row)) for row in rows]
    return tasks.from_frame(pd.DataFrame({"text": lines}), "text of one component"), u.numpy()


@pytest.mark.slow
def test_a_student_is_aligned_with_the_planted_component_and_random_directions_have_uniform_p(tmp_path: Path) -> None:
    """In 5 of 5 seeds for its largest component, which nothing but the text knows of; its second one learned noise."""
    random = []
    for seed in range(5):
        text, u = planted_text(seed)
        method = ls.LoRA(rank=2, targets=(MODULE,), lr=1e-2)
        run = ls.train(planted_teacher.student(), text, method, out=tmp_path / str(seed), seed=seed, **SETTINGS)
        aligned = ls.align(run, {1: u, 2: u}).set_index("component")
        assert aligned.loc["1", "p"] <= 0.001
        assert aligned.loc["2", "p"] > 0.001
        generator = np.random.default_rng(seed)
        for draw in range(40):
            direction = generator.standard_normal(len(u))
            random.append(ls.align(run, {1: direction}, draws=200, seed=draw)["p"].item())
    assert stats.kstest(random, "uniform").pvalue > 0.01
