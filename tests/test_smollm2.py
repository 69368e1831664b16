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

from lorascope.analysis.factor_embeddings import factored_updates
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
    found = drawing.train(str(tmp_path), jobs=1)

    def starts(recipe):
        runs = [run for domain in found[recipe].values() for run in domain]
        return {factored_updates(run.updates(0))["model.layers.1.mlp.up_proj"].A.tobytes() for run in runs}

    assert len(starts(drawing.ONE_A)) == 1
    assert len(starts(drawing.OWN_A)) == 4
    charts = drawing.draw(found)
    page = (Path(drawing.__file__).parents[1] / "docs" / "smollm2.md").read_text(encoding="utf-8")
    assert re.findall(r"figures/(smollm2-\w+)\.png", page) == list(charts)
    lines = list(drawing.describe(found))
    assert lines[0].startswith("shared A, movies: accuracy ")
    assert lines[-1].endswith("%")
    (shared,) = [line for line in lines if line.startswith("factors, shared")]
    assert re.search(r"A +raw +1\.00 ", shared)
    for chart in charts.values():
        saved = drawing.save_small(chart, tmp_path / "chart.png")
        assert saved.stat().st_size > 10_000
        assert Image.open(saved).text  # the ids of the runs
