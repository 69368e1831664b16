"""Blocks of singular components: the basis of neighbors with nearly equal singular values is arbitrary."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lorascope.array_types import Float
from lorascope.updates import Update

TIED = 0.05
"""Relative difference of two neighboring singular values below which they are in one block."""


class ComponentBlock(NamedTuple):
    """Components of one module's update that are measured together, usually a single one.

    Parameters
    ----------
    module : str
    component : str
        Number of the component, from 1, or of the first and the last one, such as ``"3-4"``.
    U, sigma, V : array (out, k), (k,), (in, k)
        Left singular vectors, singular values and right singular vectors.
    """

    module: str
    component: str
    U: Float[np.ndarray, "out k"]
    sigma: Float[np.ndarray, "k"]
    V: Float[np.ndarray, "in k"]

    @property
    def name(self) -> str:
        """Name of the block: its module and its components."""
        return f"{self.module} {self.component}"

    @property
    def norm(self) -> float:
        """Frobenius norm of the block; of a single component, its singular value."""
        return float(np.linalg.norm(self.sigma))


def tied_components(sigma: Float[np.ndarray, "k"]) -> list[slice]:
    """Divide singular values, the largest first, into blocks: neighbors that differ by less than 5%."""
    gaps = np.flatnonzero(sigma[1:] <= (1 - TIED) * sigma[:-1]) + 1
    ends = [0, *gaps.tolist(), len(sigma)]
    return [slice(first, last) for first, last in pairwise(ends) if first < last]


def component_blocks(module: str, update: Update) -> list[ComponentBlock]:
    """Divide an update into blocks of components, the largest first; components of singular value 0 are omitted."""
    U, sigma, V = update.svd()
    # The decomposition pads an update of lower rank.
    rank = int(np.count_nonzero(sigma > 0))
    blocks = []
    for block in tied_components(sigma[:rank]):
        component = str(block.start + 1)
        if block.stop > block.start + 1:
            component += f"-{block.stop}"
        blocks.append(ComponentBlock(module, component, U[:, block], sigma[block], V[:, block]))
    return blocks
