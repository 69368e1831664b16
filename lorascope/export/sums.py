"""Weighted sum of adapters of one base, and how their updates interfere in it.

The sum is a LoRA whose rank is the sum of their ranks, so it is exact before it is cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from lorascope.export.lora_layers import ONLY_PEFT, layers_of, require_own_names
from lorascope.export.pipeline_names import naming
from lorascope.export.writers import require_adapter, write_lora
from lorascope.files.printable import printable
from lorascope.runs.adapter import Adapter
from lorascope.runs.folders import require_absent
from lorascope.runs.lora_config import exact_products
from lorascope.runs.result import Result
from lorascope.updates import LowRank


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
    opened = [require_adapter(each) for each in adapters]
    factors = _weights(opened, weights)
    headed = [adapter.label for adapter in opened if adapter.files.others]
    if headed:
        raise ValueError(f"cannot sum {printable(headed[0])}: it contains further weights, such as a head")
    _require_one_naming(opened)
    _warn_of_other_bases(opened)
    terms: dict[str, list[tuple[float, LowRank]]] = {}
    whose: dict[str, Adapter] = {}
    for adapter, weight in zip(opened, factors, strict=True):
        require_own_names(adapter)
        for module, product in exact_products(adapter, adapter.updates()).items():
            terms.setdefault(module, []).append((weight, product))
            if product.shape != terms[module][0][1].shape:
                shapes = f"{terms[module][0][1].shape} and {product.shape}"
                raise ValueError(f"cannot sum adapters of different bases: {printable(module)} has shapes {shapes}")
            whose.setdefault(module, adapter)
    summed = {module: _sum(each) for module, each in terms.items()}
    parts = {module: whose[module].files.parts[module] for module in summed}
    first = opened[0]
    together = Adapter(type(first.files)(**{**vars(first.files), "parts": parts}), first.base)
    listed = " + ".join(f"{weight:g} x {adapter.label}" for adapter, weight in zip(opened, factors, strict=True))
    return write_lora(layers_of(together, summed, budget, component=component, source=listed), path, format)


def _weights(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    """Return the weight of each adapter; raise a ValueError unless they define a sum."""
    if len(adapters) < 2:
        raise ValueError(f"a sum needs at least two adapters, got {len(adapters)}")
    found = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(found) != len(adapters) or not np.isfinite(found).all() or not any(found):
        raise ValueError(f"weights must be {len(adapters)} finite numbers, one per adapter and not all 0, got {found}")
    return found


def _warn_of_other_bases(adapters: Sequence[Adapter]) -> None:
    """Warn if the adapters name different bases, which may still be two names of one model."""
    named = [(adapter.files.config.get("base_model_name_or_path"), adapter.label) for adapter in adapters]
    if len({base for base, _ in named if base}) > 1:
        listed = ", ".join(f"{printable(base)} ({printable(label)})" for base, label in named if base)
        warnings.warn(
            f"the adapters name different bases, {listed}: their sum is meaningful only for one model",
            stacklevel=3,
        )


def _require_one_naming(adapters: Sequence[Adapter]) -> None:
    """Raise a ValueError if the modules of two adapters have names of different kinds, or different meanings."""
    first = adapters[0]
    for other in adapters[1:]:
        one, two = (naming(each) for each in (first, other))
        if one != two:
            pair = f"{printable(first.label)} ({one}) and {printable(other.label)} ({two})"
            raise ValueError(f"cannot sum {pair}: their modules have different names; convert one first")
        setting = next((key for key in ONLY_PEFT if first.files.config.get(key) != other.files.config.get(key)), None)
        if setting is not None:
            pair = f"{printable(first.label)} and {printable(other.label)}"
            raise ValueError(f"cannot sum {pair}: they differ in {setting}")


def _sum(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return the weighted sum: B side by side, with the scales, and A below each other."""
    B = np.hstack([weight * product.scale * np.asarray(product.B, np.float64) for weight, product in terms])
    return LowRank(B, np.vstack([np.asarray(product.A, np.float64) for _, product in terms]))


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
    products = [exact_products(adapter, adapter.updates()) for adapter in adapters]
    squares = [sum(update.norm() ** 2 for update in each.values()) for each in products]
    rows = []
    for (i, one), (j, other) in combinations(enumerate(products), 2):
        shared = one.keys() & other.keys()
        inner = sum(one[module].inner(other[module]) for module in shared)
        size = np.sqrt(squares[i] * squares[j])
        alone = factors[i] ** 2 * squares[i] + factors[j] ** 2 * squares[j]
        energy = 1 + 2 * factors[i] * factors[j] * inner / alone if alone else np.nan
        cosine = inner / size if size else np.nan
        rows.append((adapters[i].label, adapters[j].label, len(shared), cosine, energy))
    return pd.DataFrame(rows, columns=["one", "other", "shared", "cosine", "energy"])
