"""Reader of PEFT HRA folders.

Each module has ``hra_u`` (in, r), whose columns of unit length reflect the inputs one after the other:
W = W_0 (I - 2 u_1 u_1^T) (I - 2 u_2 u_2^T) ... With ``apply_GS`` the columns are orthonormalized first, which makes
W = W_0 (I - 2 U U^T). The update W - W_0 has rank r and requires the base model.

Source: Yuan et al. (arXiv 2405.17484), equations 5 and 6, as in PEFT.
"""

from __future__ import annotations

import numpy as np

from lorascope.formats.peft_format import Arrays, PeftFormat, Sizes
from lorascope.updates import LowRank


class HRA(PeftFormat, frozen=True):
    """PEFT's HRA: Householder reflections of the inputs of each weight."""

    kind, needs = "HRA", "base"
    tensors = {"hra_u": "in r"}
    apply_GS: bool = False

    def rank(self, sizes: Sizes) -> int:
        return min(sizes["r"], *self.shape(sizes))

    def update(self, arrays: Arrays, W0: np.ndarray) -> LowRank:
        U = arrays["hra_u"]
        if self.apply_GS:
            U = np.linalg.qr(U)[0]  # its signs do not matter
            return LowRank(-2 * W0 @ U, U.T)
        U = U / np.linalg.norm(U, axis=0)
        # Each reflection adds one component: W (I - 2 u u^T) = W - 2 (W u) u^T.
        B = np.empty((len(W0), U.shape[1]))
        for number, u in enumerate(U.T):
            B[:, number] = -2 * (W0 @ u + B[:, :number] @ (U[:, :number].T @ u))
        return LowRank(B, U.T)
