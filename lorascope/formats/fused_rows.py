"""Updates of modules that an adapter joins in one, such as query, key and value of Flux: rows of one stored update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.formats.peft_factors import check_fit
from lorascope.formats.pretrained_weights import PretrainedWeights
from lorascope.formats.stored_update import StoredTensor, StoredUpdate
from lorascope.updates import Dense, LowRank, Update


@dataclass(frozen=True)
class RowsPart(StoredUpdate):
    """Fused rows of a stored update that belong to one module, in the order of the ranges (first, end)."""

    joined: StoredUpdate
    ranges: tuple[tuple[int, int], ...]
    scale: float
    transposed: bool

    @property
    def has_thin_factors(self) -> bool:
        return self.joined.has_thin_factors

    @property
    def shape(self) -> tuple[int, int]:
        return sum(stop - start for start, stop in self.ranges), self.joined.shape[1]

    @property
    def rank(self) -> int:
        return min(self.joined.rank, *self.shape)

    @property
    def size(self) -> int:
        """Number of stored values; those that several modules share are divided by their rows."""
        return self.joined.size * self.shape[0] // self.joined.shape[0]

    def factors(self) -> dict[str, Any]:
        return self.update().to_factors()

    def update(self) -> Update:
        update = self.joined.update()
        if isinstance(update, LowRank):
            return LowRank(self._rows(update.B), update.A, update.scale)
        return Dense(self._rows(update.dense()))

    def _rows(self, matrix: np.ndarray) -> np.ndarray:
        return np.concatenate([matrix[start:stop] for start, stop in self.ranges])

    def _tensors(self) -> list[StoredTensor]:
        return self.joined._tensors()


def split_rows(
    path: Path, update: StoredUpdate, modules: Sequence[str], base: PretrainedWeights
) -> dict[str, StoredUpdate]:
    """Split a fused update into those of the modules that its rows belong to, in their order.

    Raises
    ------
    ValueError
        The shapes of the modules do not fit.
    """
    updates: dict[str, StoredUpdate] = {}
    stop = 0
    for module in modules:
        start, stop = stop, stop + base.shape(module)[0]
        updates[module] = RowsPart(update, ((start, stop),), update.scale, update.transposed)
    check_fit(path, " and ".join(modules), update.shape, (stop, base.shape(modules[0])[1]))
    return updates


def swap_halves(path: Path, update: StoredUpdate, module: str, base: PretrainedWeights) -> RowsPart:
    """Return an update whose rows fuse two halves, such as shift and scale, with the halves swapped.

    Raises
    ------
    ValueError
        The shape of the module does not fit.
    """
    check_fit(path, module, update.shape, base.shape(module))
    rows = update.shape[0]
    return RowsPart(update, ((rows // 2, rows), (0, rows // 2)), update.scale, update.transposed)
