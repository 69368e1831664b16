"""How much the loss feels each coefficient of FourierFT, against the weight's gradient and against a small move."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_sensitivity import FAST, LOOK, Copying, check_training_is_unchanged, gradients, measured
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


def by_the_weights_gradient(found, G):
    """dL/dc from G = dL/dW: its transform at the entries, or the slope along both vectors of another basis."""
    j, k = found.entries
    if isinstance(found, delta.Delta) and hasattr(found, "left"):
        left, right = fourier.bases(tuple(G.shape), SEED, "random")
        slope = torch.from_numpy(left).T @ G @ torch.from_numpy(right)
        return ALPHA / math.sqrt(2 * G.numel()) * slope[j, k]
    return found.alpha / G.numel() * torch.fft.fft2(G).real[j, k]


@pytest.mark.parametrize("case", list(METHODS))
def test_it_is_the_gradient_of_the_weight_in_the_basis_of_the_coefficients(case, task, tmp_path, request):
    run = trained(case, task, request, tmp_path / "run", observe=[observe.coefficients(**LOOK), Copying()])
    kept, batches, _ = Copying.kept
    deltas = dict(delta.attached_deltas(kept))
    delta.fold(kept)
    for name, G in gradients(kept, list(deltas), batches).items():
        expected = by_the_weights_gradient(deltas[name], G.double()).numpy()
        assert expected.any()
        assert measured(run, "coefficient_gradient", name) == near(expected, terms=TINY, growth=TEXT)
        c = deltas[name].coefficients.detach().double().numpy()
        felt = np.abs(c * expected)
        assert measured(run, "coefficient_importance", name) == near(felt, terms=TINY, growth=TEXT)


def test_it_is_what_a_small_move_of_a_coefficient_costs(task, tmp_path, request):
    """In float64, to the square of the move; the mean of both batches."""
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


def test_training_goes_on_bit_for_bit(task, tmp_path, request):
    family, method = METHODS["transform"]
    look = observe.coefficients(every=1, batches=1, rows=4)
    check_training_is_unchanged(look, request.getfixturevalue(family), task, method, tmp_path)


def test_other_methods_have_no_coefficients(task, tmp_path, bert):
    looks = [observe.coefficients(batches=1, rows=4)]
    run = ls.train(models.load(bert, task=task), task, LoRA(), observe=looks, out=tmp_path / "lora", **FAST)
    assert not run.table["quantity"].str.startswith("coefficient").any()


def test_one_table_tells_all_of_every_coefficient(task, tmp_path, request):
    """Radius and mirrors by counting from the middle of the spectrum."""
    looks = [observe.coefficients(**LOOK), observe.factors()]
    run = trained("Conv1D", task, request, tmp_path / "run", observe=looks)
    seen = run.table[run.table["quantity"] == "coefficient_importance"]
    assert seen.groupby("step").size().to_dict() == {0: 320, 2: 320, 4: 320}
    found = analysis.spectrum(run)
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


def test_what_was_not_recorded_is_not_there(task, tmp_path, request):
    found = analysis.spectrum(trained("transform", task, request, tmp_path / "run"))
    assert len(found) == 160
    assert found[["gradient", "importance"]].isna().all(axis=None)
    assert found["coefficient"].notna().all()
