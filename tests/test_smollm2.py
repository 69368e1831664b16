"""One run of every method on the first blocks of a real decoder and real text; the oracle is in ``cells``."""

from __future__ import annotations

import importlib
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cells import check
from examples import EXAMPLES
from PIL import Image

from lorascope.inputs import models, tasks

pytestmark = [pytest.mark.real, pytest.mark.slow]

BLOCKS = 2  # the same number as in the tiny models of ``families``
# Learning rates that suit a trained model. Adapprox does not factor its embedding of 28 million weights: too slow.
OWN = {
    "full": {"lr": 1e-3},
    "lisa": {"lr": 1e-3},
    "adapprox": {"lr": 1e-3, "dense": "embed", "min_dim": 64},
    "alora": {"score_rows": 2},
}


@pytest.fixture(scope="module")
def smollm2():
    """Return the first blocks of SmolLM2, and four hundred sentences."""
    rows = tasks.load("sentiment").table.iloc[::48]  # sorted by the hash that defines the splits
    task = tasks.from_frame(rows[["text", "label", "group"]], "sentences")
    return models.load("smollm2", blocks=BLOCKS), task


@pytest.mark.parametrize("method", EXAMPLES)
def test_method_on_smollm2(method, smollm2, tmp_path):
    settings = {"batch_size": 2, "eval_size": 6, "test_size": 6, "max_length": 24}
    example = replace(EXAMPLES[method], **OWN.get(method, {}))
    check("llama", example, *smollm2, tmp_path / "run", **settings)
    shutil.rmtree(tmp_path / "run")  # a fully trained model is stored there twice


def test_figures_script_of_the_full_model_draws_small_runs(smollm2, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "figures")
    drawing = importlib.import_module("smollm2")
    small = {"batch_size": 2, "eval_every": 0, "eval_size": 6, "test_size": 6, "max_length": 24}
    for name, value in {"MODEL": partial(models.load, "smollm2", blocks=BLOCKS), "SETTINGS": small, "STEPS": 2}.items():
        monkeypatch.setattr(drawing, name, value)
    monkeypatch.setattr(drawing, "SEEDS", (0, 1))
    runs = drawing.train(str(tmp_path), jobs=1)
    charts = drawing.draw(runs)
    page = (Path(drawing.__file__).parents[1] / "docs" / "smollm2.md").read_text(encoding="utf-8")
    assert re.findall(r"figures/(smollm2-\w+)\.png", page) == list(charts)
    assert " Random factors of the same shapes: 15." in charts["smollm2-ranks"].caption
    # Equal singular values would give the rank, and those of random factors are nearly equal.
    assert 15.8 < drawing.random_effective_rank((576, 1536), 16) < 16
    assert drawing.random_effective_rank((9, 7), 1) == pytest.approx(1.0)
    # Seeds have separate initial A's, of which two steps change little.
    outputs, inputs = charts["smollm2-directions"].panels
    assert inputs.data["overlap"].abs().max() < 0.1 < outputs.data["overlap"].max() <= 1
    for norms in charts["smollm2-norms"].panels:
        assert (2 ** norms.data["log"]).mean() == pytest.approx(1)
    for chart in charts.values():
        saved = drawing.save_small(chart, tmp_path / "chart.png")
        assert saved.stat().st_size > 10_000
        assert Image.open(saved).text  # the ids of the runs
