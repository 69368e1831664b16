"""Numbers about dW of recorded runs equal those of the dense difference of the weights, for each method."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rich.console import Console
from trainers import fresh

import lorascope as ls
from lorascope import plots
from lorascope.analysis import adapter_similarity, spectra
from lorascope.diagnosis.inspection import inspect
from lorascope.diagnosis.inspection_screen import inspection_screen
from lorascope.diagnosis.null import null_table
from lorascope.updates import effective_rank, stable_rank

FAST = {"steps": 4, "batch_size": 8, "eval_every": 0, "test_size": 16, "warmup": 0, "progress": False, "device": "cpu"}


def trained(method, bert, task, out, **settings):
    """Return a run, and the dense change of every module with a weight, read through its forward pass."""
    model = fresh(bert, task)
    base = {name: weight.detach().double().numpy() for name, weight in fresh(bert, task).named_parameters()}
    run = ls.train(model, task, method, out=out, **FAST | settings)
    changes = {}
    for name, module in model.eval().named_modules():
        if isinstance(module, torch.nn.Linear):
            inner = module.in_features
            with torch.no_grad():
                whole = module(torch.eye(inner)) - module(torch.zeros(inner))
            changes[name] = whole.T.double().numpy() - base[f"{name}.weight"]
    return run, changes


@pytest.mark.parametrize("observe", [[], [ls.observe.norms(every=2)]], ids=["unobserved", "norms"])
@pytest.mark.parametrize("name", ["lora", "dora", "vera", "pissa", "fourierft", "adalora"])
def test_norms_and_ranks_equal_those_of_the_dense_change(name, observe, bert, task, tmp_path):
    method = ls.METHODS[name].example()
    run, changes = trained(method, bert, task, tmp_path / "run", observe=observe)
    table, sigmas, values = run.summary().set_index("module"), run.spectra, spectra.singular_values(run)
    assert run.ranks()
    for module in run.ranks():
        sigma = np.linalg.svd(changes[module], compute_uv=False)
        row = table.loc[module]
        assert row["update_norm"] == pytest.approx(np.linalg.norm(sigma), rel=1e-4, abs=1e-7)
        if name != "dora" or observe:
            assert row["effective_rank"] == pytest.approx(effective_rank(sigma), rel=0.01)
            assert row["stable_rank"] == pytest.approx(stable_rank(sigma), rel=1e-3)
            for spectrum in (sigmas[module], values[module]):
                count = min(len(spectrum), len(sigma))
                np.testing.assert_allclose(spectrum[:count], sigma[:count], rtol=1e-3, atol=1e-3 * sigma[0])
                assert np.linalg.norm(spectrum) == pytest.approx(np.linalg.norm(sigma), rel=1e-4)
        else:
            assert np.isnan(row["effective_rank"])
            assert module not in sigmas
            assert module not in values


def test_dora_run_says_what_is_unknown_without_recorded_spectra(bert, task, tmp_path):
    run, changes = trained(ls.DoRA(rank=2, lr=1e-2), bert, task, tmp_path / "run", observe=[])
    inspection = inspect(run)
    (finding,) = (finding for finding in inspection.details if finding.id == "LS106")
    assert "ranks of dW are unknown in 4 modules" in finding.message
    assert inspection.modules["effective_rank"].isna().all()
    total = np.sqrt(sum(np.linalg.norm(changes[module]) ** 2 for module in run.ranks()))
    assert inspection.norm == pytest.approx(total, rel=1e-4)
    assert null_table(inspection)["effective_rank_p"].isna().all()
    screen = inspection_screen(inspection, Console(width=80))
    assert " of 2" not in screen
    assert "lorascope plot update_norm" in screen
    with pytest.raises(ValueError, match=r"singular values of updates: train with observe=\[ls\.observe\.norms\(\)\]"):
        plots.spectrum(run)


def test_dora_run_with_recorded_spectra_shows_the_rank_of_the_whole_update(bert, task, tmp_path):
    run, changes = trained(ls.DoRA(rank=2, lr=1e-2), bert, task, tmp_path / "run", observe=[ls.observe.norms(every=2)])
    inspection = inspect(run)
    assert not any(finding.id == "LS106" for finding in inspection.details)
    module = inspection.modules.dropna(subset=["rank"]).nlargest(1, "update_norm").iloc[0]
    assert module["effective_rank"] > 3 > module["rank"]
    assert " of 2" not in inspection_screen(inspection, Console(width=80))
    assert null_table(inspection)["effective_rank_p"].isna().all()
    name = max(run.ranks(), key=lambda name: np.linalg.norm(changes[name]))
    rank = effective_rank(np.linalg.svd(changes[name], compute_uv=False))
    assert f"{rank:.1f}" in plots.spectrum(run, module=name).caption


def test_caption_says_which_updates_are_only_of_the_direction(bert, task, tmp_path):
    observe = [ls.observe.norms(every=2), ls.observe.factors(every=2)]
    run, _ = trained(ls.DoRA(rank=2, lr=1e-2), bert, task, tmp_path / "run", observe=observe)
    path = ls.export.to_peft(run, tmp_path / "adapter")
    sentence = "without W₀: only s B A, without the magnitudes."
    module = min(run.ranks())
    alone, based = ls.load(path), ls.load(path, base=bert)
    shown = {
        plots.spectrum(run, module=module): False,
        plots.update_norm(run): False,
        plots.settling(run): True,
        plots.spectrum(alone, module=module): True,
        plots.spectrum(based, module=module): False,
    }
    for chart, expected in shown.items():
        assert all((sentence in panel.caption) is expected for panel in chart.panels), chart


def test_dora_export_with_its_base_has_the_norm_of_the_run(bert, task, tmp_path):
    run, changes = trained(ls.DoRA(rank=2, lr=1e-2), bert, task, tmp_path / "run")
    exported = ls.load(ls.export.to_peft(run, tmp_path / "adapter"), base=bert)
    runs = {"run": run, "export": exported}
    for label, opened in runs.items():
        table = opened.summary().set_index("module")
        for module in run.ranks():
            assert table.loc[module, "update_norm"] == pytest.approx(np.linalg.norm(changes[module]), rel=1e-4), label
    shared = adapter_similarity.compare_modules(runs)
    first, second = (inspect(opened) for opened in runs.values())
    assert first.norm == pytest.approx(second.norm, rel=1e-4)
    assert first.size["modules"] == second.size["modules"] == len(run.ranks())
    assert shared["norm_ratio"].to_numpy() == pytest.approx(1.0, rel=1e-4)
    assert shared["cosine"].isna().all()
