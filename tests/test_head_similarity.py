"""Test of the similarity of experts: cosines compared with dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from lorascope.analysis.head_similarity import cosines, update_inner


def test_cosines_of_updates_equal_cosines_of_dense_matrices():
    draw = np.random.default_rng(0)
    B = draw.standard_normal((3, 5, 2))
    for A in (draw.standard_normal((2, 4)), draw.standard_normal((3, 2, 4))):
        dense = np.array([(b @ a).ravel() for b, a in zip(B, np.broadcast_to(A, (3, 2, 4)), strict=True)])
        unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
        assert cosines(update_inner(A, B)) == pytest.approx(unit @ unit.T, abs=1e-12)
    assert cosines(update_inner(A[0], B[[0, 0]])) == pytest.approx(np.ones((2, 2)))
