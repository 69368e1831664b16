"""Tests of the expressiveness study: training compared with a manual version, and planted courses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorascope.papers import expressiveness_figures
from lorascope.papers import fourierft_expressiveness as study
from lorascope.papers.fourierft_expressiveness import FOURIER, SLOW, Course, Points
from lorascope.updates import fourier


@pytest.mark.parametrize("label", study.ADAPTERS)
def test_every_adapter_has_128_parameters(label):
    delta = study.ADAPTERS[label][0](3)
    assert sum(parameter.numel() for parameter in delta.parameters()) == 128
    assert delta.weight().shape == (64, 64)


def test_points_are_clusters_on_a_circle_and_depend_on_the_seed():
    x, y = study.points(0)
    assert y.tolist() == [label for label in range(8) for _ in range(30)]
    centers = x.reshape(8, 30, 2).mean(dim=1).numpy()
    angles = 2 * np.pi * np.arange(8) / 8
    np.testing.assert_allclose(centers, 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1), atol=0.4)
    assert float((x.reshape(8, 30, 2).std(dim=1)).mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(x, study.points(0).x)
    assert not torch.equal(x, study.points(1).x)


def test_training_changes_only_the_adapter():
    state = torch.random.get_rng_state()
    first, second = study.network(4), study.learn(SLOW, 4, epochs=3).network
    assert torch.equal(state, torch.random.get_rng_state())
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(second.named_parameters())[name])
    assert not any(weight.requires_grad for weight in first.parameters())
    assert first[2].bias is None


def _by_hand(seed, epochs):
    """Train FourierFT with the inverse FFT of a complex spectrum, and return the accuracy after each epoch."""
    model, (x, y) = study.network(seed), study.points(seed)
    rows, columns = fourier.entries((64, 64), 128, 777)
    c = torch.randn(128, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    optimizer = torch.optim.Adam([c], lr=1e-2)
    accuracy = []
    for epoch in range(epochs + 1):
        spectrum = torch.zeros(64, 64, dtype=torch.complex64).index_put(
            (torch.from_numpy(rows), torch.from_numpy(columns)), c.to(torch.complex64)
        )
        update = 300 * torch.fft.ifft2(spectrum).real
        hidden = F.relu(F.linear(F.relu(model[0](x)), model[2].weight + update))
        logits = model[4](hidden)
        accuracy.append((logits.argmax(1) == y).double().mean().item())
        if epoch < epochs:
            optimizer.zero_grad()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
    return accuracy


def test_fourier_training_matches_manual_training():
    np.testing.assert_allclose(study.learn(FOURIER, 2, epochs=20).accuracy, _by_hand(2, 20), atol=2.1 / 240)


def test_training_stops_when_all_points_are_correct():
    course = study.learn(FOURIER, 2)
    assert course.accuracy[-1] == 1.0
    assert max(course.accuracy[:-1]) < 1.0
    assert course.epochs == len(course.accuracy) - 1 < study.EPOCHS
    x, y = study.points(2)
    assert torch.equal(course.network(x).argmax(dim=1), y)


def test_curves_match_planted_courses():
    """Courses are correct after a number of epochs; accuracy stays 1 from then on."""
    network = study.network(0)
    soon = [30, 40, 50, 60, 70]
    found = {
        (FOURIER, seed): Course([0.5] * (soon[seed] - 1) + [0.75, 1.0], network)
        for seed in expressiveness_figures.SEEDS
    }
    found |= {(SLOW, seed): Course([0.25, 0.5, 0.25], network) for seed in expressiveness_figures.SEEDS}
    values = {
        (row.recipe, row.epoch): row.value for row in expressiveness_figures.accuracy_curves(found).data.itertuples()
    }
    assert values[FOURIER, 0] == 0.5
    assert values[FOURIER, 40] == pytest.approx((1 + 1 + 0.5 * 3) / 5)
    assert values[FOURIER, 60] == pytest.approx((4 + 0.5) / 5)  # the last seed is correct only at epoch 70
    assert {epoch for _, epoch in values} == {0, 20, 40, 60}


class _Signs(nn.Module):
    """Network that predicts class 0 left of the line x = 0, else class 1."""

    def forward(self, x):
        return torch.stack([-x[:, 0] - 0.01, x[:, 0]], dim=1)


def test_regions_equal_the_predictions_of_the_network(tmp_path):
    shown = Points(torch.tensor([[-3.1, 0.0], [2.0, 1.0], [9.0, -9.0]]), torch.tensor([0, 0, 1]))
    drawn = expressiveness_figures.regions({"signs": _Signs()}, shown)
    chart = drawn.rows()[0][0]
    assert chart.title == "signs: 67% correct"
    assert (chart.data["class"] == (chart.data["x"] >= 0)).all()
    assert len(chart.data) == 57**2
    assert (chart.y.order[0], chart.x.order[0]) == (7.0, -7.0)
    dots = chart.marks[1].data
    assert dots.values.tolist() == [[-3.0, 0.0, "correct"], [2.0, 1.0, "misclassified"], [7.0, -7.0, "correct"]]
    assert drawn.save(tmp_path / "regions.png").exists()
