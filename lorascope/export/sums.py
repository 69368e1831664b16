"""Weighted sum of adapters of one base, and how their updates interfere in it.

The sum is a LoRA whose rank is the sum of their ranks, so it is exact before it is cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorascope.export.conversion import require_adapter, write_lora
from lorascope.export.lora_layers import ONLY_PEFT, layers_of, require_own_names
from lorascope.export.pipeline_names import naming
from lorascope.files.printable import printable
from lorascope.files.whole_files import require_absent
from lorascope.runs.adapter import Adapter
from lorascope.runs.lora_config import exact_products
from lorascope.runs.result import Result
from lorascope.updates import LowRank


class Term(NamedTuple):
    """Term of a weighted sum of adapters: the update of one adapter, and its weight."""

    weight: float
    product: LowRank


def sum_adapters(
    adapters: Sequence[Result],
    out: str | Path,
    weights: Sequence[float] | None = None,
    budget: float | None = None,
    format: str = "peft",
    component: str | None = None,
) -> Path:
    """Write the weighted sum of adapters of one base.

    Parameters
    ----------
    adapters : sequence of Adapter
        Adapters whose updates are products of two factors.
    out : path
        New folder or file.
    weights : sequence of float, optional
        Weight of each adapter; 1 by default.
    budget : float or int, optional
        Components to keep, see ``select_components``; all by default, which is exact.
    format, component
        See `convert`.

    Returns
    -------
    path
        The folder or file.

    Raises
    ------
    FileExistsError
        The path exists.
    ValueError
        There are fewer than two adapters, the weights do not fit, an update is not a product of two factors, or several
        adapters contain further weights, such as heads, which have no sum, or their modules have the names of different
        formats.
    """
    path = Path(out)
    require_absent(path)
    opened = list(map(require_adapter, adapters))
    factors = _weights(opened, weights)
    for adapter in opened:
        if adapter.files.others:
            raise ValueError(f"cannot sum {adapter.reference}: it contains further weights, such as a head")
    _require_one_naming(opened)
    _warn_of_other_bases(opened)
    terms: dict[str, list[Term]] = {}
    stored: dict[str, Any] = {}  # of the first adapter with the module, whose dtypes the sum gets
    for adapter, weight in zip(opened, factors, strict=True):
        require_own_names(adapter)
        for module, product in exact_products(adapter, adapter.updates()).items():
            terms.setdefault(module, []).append(Term(weight, product))
            shape = terms[module][0].product.shape
            if product.shape != shape:
                shapes = f"{shape} and {product.shape}"
                raise ValueError(f"cannot sum adapters of different bases: {printable(module)} has shapes {shapes}")
            stored.setdefault(module, adapter.files.parts[module])
    # The sum has the names and the configuration of the first adapter, but the modules of all.
    first = opened[0]
    merged = Adapter(type(first.files)(**{**vars(first.files), "parts": stored}), first.base)
    updates = {module: _sum(module_terms) for module, module_terms in terms.items()}
    source = " + ".join(f"{weight:g} x {adapter.label}" for adapter, weight in zip(opened, factors, strict=True))
    return write_lora(layers_of(merged, updates, budget, component=component, source=source), path, format)


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each adapter; raise a ValueError unless they define a sum."""
    if len(adapters) < 2:
        raise ValueError(f"a sum needs at least two adapters, got {len(adapters)}")
    if weights is None:
        return [1.0] * len(adapters)
    values = list(map(float, weights))
    if len(values) != len(adapters) or not np.isfinite(values).all() or not any(values):
        raise ValueError(f"weights must be {len(adapters)} finite numbers, one per adapter and not all 0, got {values}")
    return values


def _warn_of_other_bases(adapters: Sequence[Adapter]) -> None:
    """Warn if the adapters name different bases, which may still be two names of one model."""
    bases, names = set(), []
    for adapter in adapters:
        if base := adapter.files.config.get("base_model_name_or_path"):
            bases.add(base)
            names.append(f"{printable(base)} ({printable(adapter.label)})")
    if len(bases) > 1:
        warnings.warn(
            f"the adapters name different bases, {', '.join(names)}: their sum is meaningful only for one model",
            stacklevel=3,  # at the call of `sum_adapters`
        )


def _require_one_naming(adapters: Sequence[Adapter]) -> None:
    """Raise a ValueError if the modules of two adapters have names of different kinds, or different meanings."""
    first = adapters[0]
    for other in adapters[1:]:
        first_names, other_names = naming(first), naming(other)
        if first_names != other_names:
            pair = f"{printable(first.label)} ({first_names}) and {printable(other.label)} ({other_names})"
            raise ValueError(f"cannot sum {pair}: their modules have different names; convert one first")
        for setting in ONLY_PEFT:
            if first.files.config.get(setting) != other.files.config.get(setting):
                pair = f"{printable(first.label)} and {printable(other.label)}"
                raise ValueError(f"cannot sum {pair}: they differ in {setting}")


def _sum(terms: Sequence[Term]) -> LowRank:
    """Return the weighted sum: B side by side, with the scales, and A below each other."""
    # In float64, because adapters may have different dtypes; the file gets that of the first one if it is exact.
    factors_B, factors_A = [], []
    for weight, product in terms:
        factors_B.append(weight * product.scale * np.asarray(product.B, np.float64))
        factors_A.append(np.asarray(product.A, np.float64))
    return LowRank(np.hstack(factors_B), np.vstack(factors_A))


def interference(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> pd.DataFrame:
    """Tabulate how the updates of adapters interfere in their weighted sum.

    Parameters
    ----------
    adapters : sequence of Adapter
        Adapters whose updates are products of two factors.
    weights : sequence of float, optional
        Weight of each adapter; 1 by default.

    Returns
    -------
    DataFrame
        One row per pair: ``one, other, shared`` (modules that both adapt), ``cosine`` of the updates as one vector over
        all modules, and ``energy``: the squared norm of the weighted sum relative to the sum of the squared norms of
        its terms, below 1 if they cancel and above 1 if they add up.

    Raises
    ------
    ValueError
        There are fewer than two adapters, the weights do not fit, or an update is not a product of two factors.
    """
    factors = _weights(adapters, weights)
    products, squares = [], []
    for adapter in adapters:
        updates = exact_products(adapter, adapter.updates())
        products.append(updates)
        squares.append(sum(update.norm() ** 2 for update in updates.values()))
    rows = []
    for i, j in combinations(range(len(adapters)), 2):
        # Sorted, so that floating-point sums do not depend on the hash seed of strings.
        shared = sorted(products[i].keys() & products[j].keys())
        inner = sum(products[i][module].inner(products[j][module]) for module in shared)
        norms = np.sqrt(squares[i] * squares[j])
        # ‖w₁U₁ + w₂U₂‖² = w₁²‖U₁‖² + w₂²‖U₂‖² + 2 w₁w₂ ⟨U₁, U₂⟩
        separate = factors[i] ** 2 * squares[i] + factors[j] ** 2 * squares[j]
        energy = 1 + 2 * factors[i] * factors[j] * inner / separate if separate else np.nan
        cosine = inner / norms if norms else np.nan
        rows.append((adapters[i].label, adapters[j].label, len(shared), cosine, energy))
    return pd.DataFrame(rows, columns=["one", "other", "shared", "cosine", "energy"])
