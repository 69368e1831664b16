"""Test the sensitivity of the loss to FourierFT coefficients against weight gradients and small changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_sensitivity import FAST, LOOK, Copying, gradients, measured
from tolerance import TEXT, TINY, near

import lorascope as ls
from lorascope import observe
from lorascope.adapters import delta
from lorascope.analysis import fourier as analysis
from lorascope.inputs import models
from lorascope.methods import FourierFT, LoRA
from lorascope.updates import fourier

ALPHA, SEED = 40, 5
METHODS = {
    "waves": ("bert", FourierFT(lr=1e-1, coefficients=2)),
    "transform": ("bert", FourierFT(lr=1e-1, coefficients=40)),
    "Conv1D": ("gpt2", FourierFT(lr=1e-1, coefficients=40, targets="all-linear")),
    "random basis": ("bert", FourierFT(lr=1e-1, coefficients=40, basis="random", entry_seed=SEED, alpha=ALPHA)),
}


def trained(case, task, request, out, **settings):
    family, method = METHODS[case]
    model = models.load(request.getfixturevalue(family), task=task)
    return ls.train(model, task, method, out=out, **FAST | settings)


def gradient_from_weights(found, G):
    """Compute dL/dc from G = dL/dW, by its transform at the entries or by the vectors of another basis."""
    j, k = found.entries
    if isinstance(found, delta.Delta) and hasattr(found, "left"):
        left, right = fourier.bases(tuple(G.shape), SEED, "random")
        slope = torch.from_numpy(left).T @ G @ torch.from_numpy(right)
        return ALPHA / math.sqrt(2 * G.numel()) * slope[j, k]
    return found.alpha / G.numel() * torch.fft.fft2(G).real[j, k]


@pytest.mark.parametrize("case", list(METHODS))
def test_coefficient_gradient_is_the_transformed_weight_gradient(case, task, tmp_path, request):
    run = trained(case, task, request, tmp_path / "run", observe=[observe.coefficients(**LOOK), Copying()])
    kept, batches, _ = Copying.kept
    deltas = dict(delta.attached_deltas(kept))
    delta.fold(kept)
    for name, G in gradients(kept, list(deltas), batches).items():
        expected = gradient_from_weights(deltas[name], G.double()).numpy()
        assert expected.any()
        assert measured(run, "coefficient_gradient", name) == near(expected, terms=TINY, growth=TEXT)
        c = deltas[name].coefficients.detach().double().numpy()
        importance = np.abs(c * expected)
        assert measured(run, "coefficient_importance", name) == near(importance, terms=TINY, growth=TEXT)


def test_coefficient_gradient_matches_a_finite_difference(task, tmp_path, request):
    """The gradient matches a central difference in float64, averaged over both batches."""
    run = trained("transform", task, request, tmp_path / "run", observe=[observe.coefficients(**LOOK), Copying()])
    kept, batches, _ = Copying.kept
    kept.double().eval()
    module, found = next(iter(delta.attached_deltas(kept).items()))
    losses = []
    with torch.no_grad():
        for move in (1e-3, -2e-3):
            found.coefficients[7] += move
            losses.append(float(sum(kept(**batch).loss for batch in batches)) / len(batches))
    gradient = measured(run, "coefficient_gradient", module)[7]
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(gradient, rel=1e-3)


def test_other_methods_have_no_coefficients(task, tmp_path, bert):
    looks = [observe.coefficients(batches=1, rows=4)]
    run = ls.train(models.load(bert, task=task), task, LoRA(), observe=looks, out=tmp_path / "lora", **FAST)
    assert not run.table["quantity"].str.startswith("coefficient").any()


def test_spectrum_table_describes_every_coefficient(task, tmp_path, request):
    """Radius and mirror entries match a count from the center of the spectrum."""
    looks = [observe.coefficients(**LOOK), observe.factors()]
    run = trained("Conv1D", task, request, tmp_path / "run", observe=looks)
    seen = run.table[run.table["quantity"] == "coefficient_importance"]
    assert seen.groupby("step").size().to_dict() == {0: 320, 2: 320, 4: 320}
    found = analysis.list_coefficients(run)
    assert set(found["module"]) == set(run.updates())
    assert found["mirrored"].any()
    for module, rows in found.groupby("module"):
        last, first = run.updates()[module], run.updates(0)[module]
        assert rows["coefficient"].to_numpy() == pytest.approx(last.coefficients)
        assert rows["start"].to_numpy() == pytest.approx(first.coefficients)
        assert np.array_equal(rows[["row", "column"]].to_numpy().T, last.entries)
        for quantity in ("gradient", "importance"):
            assert rows[quantity].to_numpy() == pytest.approx(measured(run, f"coefficient_{quantity}", module))
        places = list(zip(*last.entries.tolist(), strict=True))
        d1, d2 = last.shape
        opposite = [(-j % d1, -k % d2) for j, k in places]
        assert rows["mirrored"].tolist() == [
            other != place and other in places for place, other in zip(places, opposite, strict=True)
        ]
        signed = [(j if 2 * j < d1 else j - d1, k if 2 * k < d2 else k - d2) for j, k in places]
        assert rows["radius"].to_numpy() == pytest.approx([math.hypot(*place) for place in signed])


def test_spectrum_table_without_records_has_missing_values(task, tmp_path, request):
    found = analysis.list_coefficients(trained("transform", task, request, tmp_path / "run"))
    assert len(found) == 160
    assert found[["gradient", "importance"]].isna().all(axis=None)
    assert found["coefficient"].notna().all()
