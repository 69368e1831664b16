"""Tests of planted ranks: statistics computed by hand, their figure, and the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from planted import plant

from lorascope import plots
from lorascope.adapters import delta
from lorascope.analysis.planted_ranks import mean_rank_error, rank_correlation, recovered_ranks
from lorascope.papers.setups import planted_teacher
from lorascope.schema import module_table

RANKS = {"h.0.q": 1, "h.0.up": 3, "h.1.q": 0, "h.1.up": 4}


def run_with(folder, id, ranks, seed=0, truth=None, **meta):
    values = {("rank", module): {0: 2.0, 9: float(rank)} for module, rank in ranks.items()}
    values |= {("planted_rank", module): {0: float(rank)} for module, rank in (truth or {}).items()}
    factors = {module: (np.zeros((4, rank)), np.zeros((rank, 3))) for module, rank in ranks.items()}
    return plant(folder, id, values, seed=seed, factors=factors, **meta)


def test_recovery_statistics_match_values_by_hand(tmp_path):
    found = recovered_ranks(run_with(tmp_path, "a", {"h.0.q": 1, "h.0.up": 2, "h.1.q": 4}, truth=RANKS))
    # The planted ranks are 1, 3, 0, 4 and the found ranks 1, 2, 4, 0; the last module has no adapter.
    assert mean_rank_error(found) == pytest.approx((0 + 1 + 4 + 4) / 4)
    assert rank_correlation(found) == pytest.approx(np.corrcoef([2, 3, 1, 4], [2, 3, 4, 1])[0, 1])
    assert rank_correlation(recovered_ranks(run_with(tmp_path, "b", RANKS, truth=RANKS))) == pytest.approx(1)
    even = run_with(tmp_path, "c", dict.fromkeys(RANKS, 2), truth=RANKS)
    assert rank_correlation(recovered_ranks(even)) == 0


def test_planted_figure_shows_mean_found_rank_per_planted_rank(tmp_path):
    truth = {"h.0.q": 1, "h.0.up": 1, "h.1.q": 4, "h.1.up": 4}
    runs = [
        run_with(tmp_path, f"r{seed}", dict(zip(truth, found, strict=True)), seed, truth)
        for seed, found in enumerate([(0, 2, 3, 5), (1, 3, 3, 3)])
    ]
    chart = plots.planted({"it": runs})
    assert dict(zip(chart.data["planted"], chart.data["value"], strict=True)) == {1: 1.5, 4: 3.5}
    chart.mpl()


@pytest.fixture
def small_teacher(monkeypatch, tmp_path):
    monkeypatch.setenv("LORASCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planted_teacher, "TEXTS", 120)
    for made in (planted_teacher.task, planted_teacher.planted_ranks):
        made.cache_clear()
    yield
    for made in (planted_teacher.task, planted_teacher.planted_ranks):
        made.cache_clear()


def test_base_is_written_without_output(small_teacher, capfd):
    assert transformers.utils.logging.is_progress_bar_enabled()
    planted_teacher.base()
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_teacher_update_has_the_planted_ranks_and_singular_values(small_teacher):
    base, model, truth = planted_teacher.student(), planted_teacher.teacher(3), planted_teacher.planted_ranks(3)
    assert sum(truth.values()) == planted_teacher.BUDGET * len(truth)
    assert list(truth) == module_table.match(module_table.describe(base), "all-linear")
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    for name, update in delta.deltas(model, before):
        sigma = update.singular_values()
        size = planted_teacher.STRENGTH * float(torch.linalg.matrix_norm(before[f"{name}.weight"], 2))
        expected = np.zeros(len(sigma))
        expected[: truth.get(name, 0)] = size
        assert sigma == pytest.approx(expected, abs=1e-5)
    assert planted_teacher.planted_ranks(4) != truth
    assert planted_teacher.task(3).hash != planted_teacher.task(4).hash
