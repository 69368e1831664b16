"""Reader of PEFT OFT folders.

Each module has ``oft_R.weight`` (blocks, b (b - 1) / 2): the upper triangles of skew-symmetric blocks Q, which define
a block-diagonal rotation R of the inputs, W = W_0 R^T. Embeddings store ``oft_embedding_R.weight`` and rotate their
vectors. R is the Cayley transform (I - Q) (I + Q)^-1, or the first terms of its series I + 2 Q + 2 Q^2 + ..., whose
last term PEFT does not double. One block may be shared by all (``block_share``). With ``coft``, blocks are scaled down
to a norm of ``eps`` / sqrt(blocks). The update W - W_0 requires the base model.

Source: Qiu et al. (arXiv 2306.07280), equations 1 and 2, as in PEFT.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.typed_json import Finite
from lorascope.formats.peft_format import Arrays, PeftFormat, PeftModule
from lorascope.updates import Dense

_EMBEDDING = "oft_embedding_R"


class OFT(PeftFormat, frozen=True):
    """PEFT's OFT: rotations of the inputs by blocks."""

    kind, needs = "OFT", "base"
    tensors = {"oft_R": "blocks n", _EMBEDDING: "blocks n"}
    coft: bool = False
    eps: Finite = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    peft_version: Any = None

    def required(self, module: PeftModule) -> dict[str, str]:
        name = _EMBEDDING if _EMBEDDING in module.tensors else "oft_R"
        return {name: self.tensors[name]}

    def check(self, module: PeftModule) -> None:
        (name,) = self.required(module)
        rotated = module.shape[0 if name == _EMBEDDING else 1]
        stored, size = (module.sizes["blocks"], module.sizes["n"]), _block_size(module.sizes["n"])
        blocks = 1 if self.block_share else rotated // size
        if rotated % size or stored != (blocks, size * (size - 1) // 2):
            rows = f"the triangles of blocks on the diagonal of {rotated} rows"
            raise module.error(f"{name} of {printable(module.name)} must have {rows}, got shape {stored}")

    def notes(self) -> tuple[str, ...]:
        # PEFT writes its version since 0.18, and 0.17 doubled the last term of the series as well.
        if self.peft_version or not self.use_cayley_neumann:
            return ()
        return ("PEFT before 0.18 trained with another last term of the rotation; PEFT now applies the one used here",)

    def update(self, arrays: Arrays, W0: np.ndarray) -> Dense:
        if _EMBEDDING in arrays:  # PEFT multiplies vectors by R, but weights by its transpose
            return Dense(rotate(W0.T, self.rotations(arrays[_EMBEDDING]).swapaxes(1, 2)).T - W0)
        return Dense(rotate(W0, self.rotations(arrays["oft_R"])) - W0)

    def rotations(self, triangles: Float[np.ndarray, "blocks n"]) -> Float[np.ndarray, "blocks size size"]:
        """Compute the rotations whose skew-symmetric matrices have these upper triangles, row by row."""
        size = _block_size(triangles.shape[1])
        Q = np.zeros((len(triangles), size, size))
        Q[:, *np.triu_indices(size, 1)] = triangles
        Q -= Q.swapaxes(1, 2)
        if self.coft:
            # The norm of all blocks together is at most eps.
            norms, largest = np.linalg.norm(Q, axis=(1, 2), keepdims=True), self.eps / math.sqrt(len(Q))
            # 1e-300 only avoids the warning of a division by zero, whose result is not used.
            Q = np.where(norms <= largest, Q, Q * (largest / np.maximum(norms, 1e-300)))
        if not self.use_cayley_neumann:
            return cayley(Q)
        terms, identity = self.num_cayley_neumann_terms, np.eye(size)
        R = identity + 2 * Q if terms > 1 else np.broadcast_to(identity, Q.shape)
        # Every term but the first and the last is doubled, as in the series.
        if terms > 2:
            power = Q @ Q
            R = R + 2 * power
            for _ in range(3, terms - 1):
                power = power @ Q
                R = R + 2 * power
            R = R + power @ Q
        return R


def _block_size(n: int) -> int:
    """Return the size of a matrix with ``n`` entries above its diagonal."""
    return (1 + math.isqrt(1 + 8 * n)) // 2


def cayley(Q: Float[np.ndarray, "blocks size size"]) -> Float[np.ndarray, "blocks size size"]:
    """Compute the Cayley transform (I - Q) (I + Q)^-1 of OFT's skew-symmetric matrices."""
    identity = np.eye(Q.shape[-1])
    return np.linalg.solve((identity + Q).swapaxes(1, 2), (identity - Q).swapaxes(1, 2)).swapaxes(1, 2)


def rotate(
    W: Float[np.ndarray, "rows columns"], R: Float[np.ndarray, "blocks size size"]
) -> Float[np.ndarray, "rows columns"]:
    """Rotate a weight W as OFT does, W blockdiag(R)^T; a single block is repeated."""
    blocks = W.reshape(len(W), -1, R.shape[-1]).swapaxes(0, 1)
    return (blocks @ R.swapaxes(1, 2)).swapaxes(0, 1).reshape(W.shape)
