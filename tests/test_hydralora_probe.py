"""Tests of the HydraLoRA probe: cosines compared with dense matrices, equal parameters, and its arms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny

import lorascope as ls
from lorascope.adapters.delta import attached_deltas
from lorascope.analysis.head_similarity import cosines, update_inner
from lorascope.papers import hydralora


def test_cosines_of_updates_equal_cosines_of_dense_matrices():
    draw = np.random.default_rng(0)
    B = draw.standard_normal((3, 5, 2))
    for A in (draw.standard_normal((2, 4)), draw.standard_normal((3, 2, 4))):
        dense = np.array([(b @ a).ravel() for b, a in zip(B, np.broadcast_to(A, (3, 2, 4)), strict=True)])
        unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
        assert cosines(update_inner(A, B)) == pytest.approx(unit @ unit.T, abs=1e-12)
    assert cosines(update_inner(A[0], B[[0, 0]])) == pytest.approx(np.ones((2, 2)))


@pytest.mark.parametrize(("rank", "number"), [(4, 4), (2, 6)])
def test_equal_rank_gives_lora_the_same_number_of_parameters(rank, number):
    method = replace(hydralora.routed_method(), rank=rank, num_experts=number)
    assert replace(hydralora.routed_method(), rank=4, num_experts=4) == hydralora.routed_method()
    counts = []
    for other in (method, ls.LoRA(rank=hydralora.equal_rank(method), targets=("ffn_in", "ffn_out"))):
        model = tiny("bert")
        other.attach(model)
        counts.append(sum(p.numel() for delta in attached_deltas(model).values() for p in delta.parameters()))
    assert counts[0] == counts[1] > 0


def test_arms_differ_only_in_the_ablated_part():
    arms = {arm.label: arm for arm in hydralora.arms()}
    routed, even, split, lora = (
        arms[label].method for label in (hydralora.ROUTED, hydralora.EVEN, hydralora.SPLIT, hydralora.LORA)
    )
    assert replace(even, router="learned") == replace(split, shared_a=True) == routed
    assert lora.alpha / lora.rank == routed.alpha / routed.rank
    assert f"LoRA, rank {lora.rank}, feed-forward" == hydralora.LORA
    assert len({arm.task.hash for arm in arms.values()}) == 2
