"""Use of the rank that an adapter allocates: the components with 90% of the energy of each module's update.

The count depends on the shape, even if training left no pattern: random factors of rank 8 on a wide matrix need 7
components. So a module is full only if it needs as many as the random factors of its shape, and its effective rank is
below theirs. Random factors are ``B A`` with independent normal entries, whose spectra are the same at any norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import filterfalse
from typing import Any, NamedTuple

import numpy as np

from lorascope.array_types import Float, Int
from lorascope.files.printable import count_phrase
from lorascope.updates.linalg import stable_and_effective_ranks

SHARE = 0.9
"""Fraction of the energy, the squared singular values, that the used components have."""
LEVEL = 0.05
"""Expected fraction of false findings among the full modules, after Benjamini and Hochberg."""
_DRAWS = 199  # a p-value is then 0.005 or more, which a tenth of the candidates can pass together
_FEWEST = 2  # components: a single one is always used


@dataclass(frozen=True)
class ModuleUse:
    """Use of the rank of one module.

    Parameters
    ----------
    module : str
    rank : int
        Allocated components.
    used : int
        Smallest number of components with 90% of the energy.
    effective_rank : float
    shape : (int, int)
        (out, in).
    """

    module: str
    rank: int
    used: int
    effective_rank: float
    shape: tuple[int, int]

    @property
    def is_half_unused(self) -> bool:
        """Whether half of the rank or less has 90% of the energy."""
        return self.rank > 0 and 2 * self.used <= self.rank


@dataclass(frozen=True)
class RankUse:
    """Use of the ranks of an adapter; a sum counts the components of all modules.

    Parameters
    ----------
    modules : sequence of ModuleUse
        Modules whose spectrum is known, in the order of the axes.
    """

    modules: Sequence[ModuleUse]

    @property
    def used(self) -> int:
        """Components with 90% of the energy of their module."""
        return sum(module.used for module in self.modules)

    @property
    def allocated(self) -> int:
        """Sum of the ranks."""
        return sum(module.rank for module in self.modules)

    @cached_property
    def random(self) -> float:
        """Mean number of components that random factors of the same shapes and ranks would use."""
        return sum(_random_use(module).mean_used for module in self.modules)

    @cached_property
    def half_unused(self) -> list[ModuleUse]:
        """Modules that use half of their rank or less, those with the most unused components first."""
        modules = [module for module in self.modules if module.is_half_unused]
        return sorted(modules, key=lambda module: module.used - module.rank)

    @cached_property
    def candidates(self) -> list[ModuleUse]:
        """Modules that use as many components as random factors of their shape, full or not."""
        wide = [module for module in self.modules if module.rank >= _FEWEST and module.used]
        return [module for module in wide if module.used >= _random_use(module).median_used]

    @cached_property
    def full(self) -> list[ModuleUse]:
        """Candidates whose effective rank is below that of random factors, at a false discovery rate of 5%."""
        p_values = []
        for module in self.candidates:
            as_low = _random_use(module).effective_ranks <= module.effective_rank
            p_values.append((1 + np.count_nonzero(as_low)) / (_DRAWS + 1))
        count = len(p_values)
        passing = np.sort(p_values) <= LEVEL * np.arange(1, count + 1) / max(count, 1)
        passed = int(np.flatnonzero(passing).max(initial=-1)) + 1
        order = np.argsort(p_values, kind="stable")[:passed]
        return [self.candidates[index] for index in sorted(order)]

    @property
    def needs_half(self) -> bool:
        """Whether all modules together use half of their rank or less."""
        return 0 < 2 * self.used <= self.allocated

    def describe(self) -> str:
        """Return the number of components in use next to that of random factors."""
        energy = f"{self.used} of {self.allocated} components have {SHARE:.0%} of the energy"
        return f"{energy}; random factors: {self.random:.0f}"

    def describe_full(self) -> str:
        """Return the number of full modules, or of those that random factors explain as well."""
        count = f"of {count_phrase(len(self.modules), 'module')}"
        if self.full:
            verb = "needs" if len(self.full) == 1 else "need"
            return f"{len(self.full)} {count} {verb} as many components as random factors"
        if self.candidates:
            return f"none {count}; {len(self.candidates)} as even as random factors"
        return f"none {count}"

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: sums, modules by their use, and the criterion."""
        full = {module.module for module in self.full}
        candidates = [module.module for module in self.candidates]
        return {
            "share": SHARE,
            "modules": len(self.modules),
            "used": self.used,
            "allocated": self.allocated,
            "random": self.random,
            "half_unused": list(map(asdict, self.half_unused)),
            "full": list(filter(full.__contains__, candidates)),
            "as_random": list(filterfalse(full.__contains__, candidates)),
        }


class _RandomUse(NamedTuple):
    """Use of a rank by random factors: mean and median number of used components, and effective ranks of the draws."""

    mean_used: float
    median_used: float
    effective_ranks: Float[np.ndarray, "draws"]


def _random_use(module: ModuleUse) -> _RandomUse:
    """Return the use of the rank of a module by random factors; 0 and 1 component are used for certain."""
    if module.rank < _FEWEST:
        return _RandomUse(module.rank, module.rank, np.full(_DRAWS, float(module.rank)))
    # The transpose of an update has the same singular values.
    small, large = sorted(module.shape)
    return _draw_use(small, large, module.rank)


@lru_cache(maxsize=256)
def _draw_use(small: int, large: int, rank: int) -> _RandomUse:
    spectra = random_spectra((small, large), rank, _DRAWS, np.random.default_rng(0))
    used = used_components(spectra)
    effective_ranks = [effective for _, effective in stable_and_effective_ranks(list(spectra))]
    return _RandomUse(float(used.mean()), float(np.median(used)), np.array(effective_ranks))


def used_components(spectra: Float[np.ndarray, "draws k"]) -> Int[np.ndarray, "draws"]:
    """Count the components with 90% of the energy in spectra of one length, as ``updates.energy_rank`` does for one."""
    energy = np.cumsum(spectra**2, axis=1)
    return np.count_nonzero(energy < (SHARE - 1e-12) * energy[:, -1:], axis=1) + 1


def random_spectra(
    shape: tuple[int, int], rank: int, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws k"]:
    """Draw the singular values of ``B A`` with independent normal B (out, rank) and A (rank, in).

    ``R_B R_A^T`` has the same singular values; its triangular factors are drawn directly (Bartlett, 1933), so the size
    of the module does not matter.
    """
    left, right = _triangle(shape[0], rank, draws, rng), _triangle(shape[1], rank, draws, rng)
    return np.linalg.svd(left @ right.swapaxes(1, 2), compute_uv=False)


def _triangle(size: int, rank: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draws k rank"]:
    """Draw R of the QR decomposition of normal matrices (size, rank), with positive diagonals."""
    height = min(size, rank)
    R = np.triu(rng.standard_normal((draws, height, rank)), 1)
    freedom = size - np.arange(height)
    R[:, np.arange(height), np.arange(height)] = np.sqrt(rng.chisquare(freedom, (draws, height)))
    return R
