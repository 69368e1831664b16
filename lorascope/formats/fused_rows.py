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
    """Rows of a stored update, in the order of the ranges (first, end): a module that a library joins with others."""

    whole: StoredUpdate
    ranges: tuple[tuple[int, int], ...]
    scale: float
    transposed: bool

    @property
    def has_thin_factors(self) -> bool:
        return self.whole.has_thin_factors

    @property
    def shape(self) -> tuple[int, int]:
        return sum(stop - start for start, stop in self.ranges), self.whole.shape[1]

    @property
    def rank(self) -> int:
        return min(self.whole.rank, *self.shape)

    @property
    def size(self) -> int:
        """Number of stored values; those that several modules share are divided by their rows."""
        return self.whole.size * self.shape[0] // self.whole.shape[0]

    def factors(self) -> dict[str, Any]:
        """Load the factors."""
        return self.update().to_factors()

    def update(self) -> Update:
        """Load the factors, and return the update."""
        update = self.whole.update()
        if isinstance(update, LowRank):
            return LowRank(self._rows(update.B), update.A, update.scale)
        return Dense(self._rows(update.dense()))

    def _rows(self, matrix: np.ndarray) -> np.ndarray:
        return np.concatenate([matrix[start:stop] for start, stop in self.ranges])

    def _tensors(self) -> list[StoredTensor]:
        return self.whole._tensors()


def split_rows(
    path: Path, part: StoredUpdate, modules: Sequence[str], base: PretrainedWeights
) -> dict[str, StoredUpdate]:
    """Split an update into those of the modules that its rows belong to, in their order.

    Raises
    ------
    ValueError
        The shapes of the modules do not fit.
    """
    shapes = [base.shape(module) for module in modules]
    stops = [int(stop) for stop in np.cumsum([shape[0] for shape in shapes])]
    check_fit(path, " and ".join(modules), part.shape, (stops[-1], shapes[0][1]))
    return {
        module: RowsPart(part, ((stop - shape[0], stop),), part.scale, part.transposed)
        for module, shape, stop in zip(modules, shapes, stops, strict=True)
    }


def swap_halves(path: Path, part: StoredUpdate, module: str, base: PretrainedWeights) -> RowsPart:
    """Return an update with the two halves of its rows swapped.

    Raises
    ------
    ValueError
        The shape of the module does not fit.
    """
    check_fit(path, module, part.shape, base.shape(module))
    rows = part.shape[0]
    return RowsPart(part, ((rows // 2, rows), (0, rows // 2)), part.scale, part.transposed)
