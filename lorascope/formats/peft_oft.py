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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from lorascope.array_types import Float
from lorascope.files.printable import printable
from lorascope.files.safetensors_io import TensorFile
from lorascope.files.typed_json import Finite, to_typed, unreadable
from lorascope.formats.peft_factors import StoredFactors, check_shapes, from_base, peft_factors, require_base
from lorascope.formats.peft_lora import CONFIG, peft_kind
from lorascope.formats.pretrained_weights import PretrainedWeights, named_base
from lorascope.formats.readers import reads
from lorascope.formats.stored_update import AdapterFiles
from lorascope.updates import Dense
from lorascope.updates.linalg import as_float64


class OFTConfig(msgspec.Struct, frozen=True):
    """Settings used from ``adapter_config.json``, with PEFT's defaults."""

    coft: bool = False
    eps: Finite = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5


@reads(lambda config, names: peft_kind(config) == "OFT", "OFT (PEFT)", needs="base")
def read_oft(
    path: Path, config: Mapping[str, Any], files: tuple[TensorFile, ...], base: PretrainedWeights | None
) -> AdapterFiles:
    """Read the modules of an opened OFT folder."""
    settings = to_typed(config, OFTConfig, path / CONFIG)
    weights = require_base(path, config, base, "OFT")
    found, others = peft_factors(path, files, "oft_R|oft_embedding_R")
    parts = {}
    for module, factors in found.items():
        (name,) = factors
        embedding = name == "oft_embedding_R"
        sizes = check_shapes(path, module, factors, {name: "blocks n"})
        sides = weights.shape(module, embedding)
        rotated = sides[0] if embedding else sides[1]
        size = (1 + math.isqrt(1 + 8 * sizes["n"])) // 2
        blocks = 1 if settings.block_share else rotated // size
        if size * (size - 1) // 2 != sizes["n"] or rotated % size or sizes["blocks"] != blocks:
            must = f"{name} of {printable(module)} must have the triangles of blocks on the diagonal of {rotated} rows"
            raise unreadable(path, f"{must}, got shape {(sizes['blocks'], sizes['n'])}")

        build = from_base(weights, module, sides, partial(_rotation_change, name, size, settings), embedding)
        parts[module] = StoredFactors(factors, sides, min(sides), build, transposed=embedding, thin=False)
    old = settings.use_cayley_neumann and not config.get("peft_version")
    notes = ("PEFT before 0.18 trained with another last term of the rotation; PEFT now applies the one used here",)
    needs_base = named_base(config) is None
    return AdapterFiles(path, dict(config), parts, others, files, "OFT", needs_base, notes if old else ())


def _rotation_change(name: str, size: int, settings: OFTConfig, arrays: dict[str, np.ndarray], W0: np.ndarray) -> Dense:
    R = rotations(as_float64(arrays[name]), size, settings)
    if name == "oft_embedding_R":  # PEFT multiplies vectors by R, but weights by its transpose
        return Dense(rotate(W0.T, R.swapaxes(1, 2)).T - W0)
    return Dense(rotate(W0, R) - W0)


def rotations(
    triangles: Float[np.ndarray, "blocks n"], size: int, settings: OFTConfig
) -> Float[np.ndarray, "blocks size size"]:
    """Compute the rotations whose skew-symmetric matrices have these upper triangles, row by row."""
    Q = np.zeros((len(triangles), size, size))
    Q[:, *np.triu_indices(size, 1)] = triangles
    Q -= Q.swapaxes(1, 2)
    if settings.coft:
        norms, largest = np.linalg.norm(Q, axis=(1, 2), keepdims=True), settings.eps / math.sqrt(len(Q))
        Q = np.where(norms <= largest, Q, Q * (largest / np.maximum(norms, 1e-300)))
    identity = np.eye(size)
    if not settings.use_cayley_neumann:
        return np.linalg.solve((identity + Q).swapaxes(1, 2), (identity - Q).swapaxes(1, 2)).swapaxes(1, 2)
    terms = settings.num_cayley_neumann_terms
    R = identity + 2 * Q if terms > 1 else np.broadcast_to(identity, Q.shape)
    if terms > 2:
        power = Q @ Q
        R = R + 2 * power
        for _ in range(3, terms - 1):
            power = power @ Q
            R = R + 2 * power
        R = R + power @ Q
    return R


def rotate(
    W: Float[np.ndarray, "rows columns"], R: Float[np.ndarray, "blocks size size"]
) -> Float[np.ndarray, "rows columns"]:
    """Compute W blockdiag(R)^T; a single block is repeated."""
    blocks = W.reshape(len(W), -1, R.shape[-1]).swapaxes(0, 1)
    return (blocks @ R.swapaxes(1, 2)).swapaxes(0, 1).reshape(W.shape)
