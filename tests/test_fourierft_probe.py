"""Tests of the FourierFT probe: equal parameters where the arms claim them."""

from __future__ import annotations

from tiny import tiny

from lorascope.adapters.delta import attached_deltas
from lorascope.papers import fourierft


def test_arms_with_equal_parameters_have_equal_counts():
    model_of = {"num_hidden_layers": 1, "hidden_size": 384, "num_attention_heads": 12}
    counts = {}
    for arm in fourierft.arms():
        model = tiny("bert", **model_of)
        arm.method.attach(model)
        counts[arm.label] = [sum(p.numel() for p in delta.parameters()) for delta in attached_deltas(model).values()]
    assert counts[fourierft.DEFAULT] == counts[fourierft.EQUAL] == [1536] * 2
    assert counts[fourierft.MANY] == counts[fourierft.LARGE] == [6144] * 2
    assert counts[fourierft.FEW] == [48] * 2
    for label in (fourierft.RANDOM, fourierft.ORTHOGONAL, fourierft.ZEROS):
        assert counts[label] == counts[fourierft.DEFAULT]
