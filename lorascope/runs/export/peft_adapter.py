"""Adapter of another tool as a PEFT folder: cut to a budget, converted from its format, or summed with others.

The sum of adapters is a LoRA whose rank is the sum of their ranks, so it is exact before it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors.numpy import save

from lorascope.files.printable import printable
from lorascope.files.safetensors_io import write_bytes, write_json
from lorascope.runs.adapter import Adapter
from lorascope.runs.export.rank_budget import select_from, truncate
from lorascope.runs.folders import new_folder, require_absent
from lorascope.runs.formats.peft_lora import CONFIG, WEIGHTS
from lorascope.runs.formats.stored_update import PREFIX, StoredLoRA, StoredTensor
from lorascope.runs.lora_config import exact_products, peft_keywords
from lorascope.updates import LowRank

# Keys of the configuration that stay; all others describe how the adapter was trained.
_KEPT = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "modules_to_save", "bias")
_README = """---
base_model: {base}
library_name: peft
---

A LoRA adapter, written by lorascope from {sources}{cut}.
"""


def write_adapter(
    adapter: Adapter,
    path: Path,
    updates: Mapping[str, LowRank],
    budget: float | None = None,
    scores: Mapping[str, Float[np.ndarray, "_"]] | None = None,
    sources: str = "",
) -> Path:
    """Write updates of the modules of an adapter as a new PEFT folder.

    Parameters
    ----------
    adapter : Adapter
        Adapter whose module names, base model and further weights are written.
    path : path
        New folder.
    updates : mapping module -> LowRank
        Updates to write, by modules of the adapter.
    budget, scores
        Components to keep, see ``select_components``; all by default.
    sources : str
        What was summed, for the README; the label of the adapter by default.

    Raises
    ------
    ValueError
        A module is not one LoRA layer, such as one expert of several in one tensor.
    """
    unfit = next((name for name in updates if not isinstance(adapter.files.parts[name], StoredLoRA)), None)
    if unfit is not None:
        kind = f"{printable(unfit)} is stored as {adapter.files.kind}"
        raise ValueError(f"cannot export {printable(adapter.label)} as LoRA: {kind}")
    kept = dict(updates)
    if budget is not None:
        ranks = {name: update.rank for name, update in kept.items() if update.rank}
        kept = truncate(kept, select_from(kept, ranks, budget, scores))
    config = {name: adapter.files.config[name] for name in _KEPT if adapter.files.config.get(name) is not None}
    config |= {"peft_type": "LORA", "inference_mode": True, "lora_dropout": 0.0}
    config |= peft_keywords(adapter, {name: update.rank for name, update in kept.items()}, kept)
    tensors = dict(_other_tensors(adapter))
    for module, update in kept.items():
        stored = adapter.files.parts[module]
        assert isinstance(stored, StoredLoRA)
        embedded = ".lora_embedding_" in stored.A.name
        for side, tensor, factor in (("A", stored.A, update.A), ("B", stored.B, update.B)):
            ending = f"lora_embedding_{side}" if embedded else f"lora_{side}.weight"
            tensors[f"{PREFIX}{module}.{ending}"] = _as_stored(tensor, factor)
    cut = "" if budget is None else f", cut to {sum(update.rank for update in kept.values())} components"
    about = _README.format(base=adapter.meta.model, sources=printable(sources or adapter.label), cut=cut)
    with new_folder(path) as draft:
        write_bytes(draft / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_json(draft / CONFIG, config)
        write_bytes(draft / "README.md", about.encode())
    return path


def _as_stored(tensor: StoredTensor, factor: Any) -> np.ndarray:
    """Return a factor in float32, with the kernel dimensions of a convolution."""
    kernel = tensor.file.shape(tensor.name)[2:]
    outer, inner = factor.shape
    return np.ascontiguousarray(factor, np.float32).reshape(outer, inner // math.prod(kernel), *kernel)


def _other_tensors(adapter: Adapter) -> Mapping[str, np.ndarray]:
    names = set(adapter.files.others)
    return {
        name: np.ascontiguousarray(file[name])
        for file in adapter.files.files for name in file if name.removeprefix(PREFIX) in names
    }  # fmt: skip


def sum_adapters(
    adapters: Sequence[Adapter],
    out: str | Path,
    weights: Sequence[float] | None = None,
    budget: float | None = None,
) -> Path:
    """Write the weighted sum of adapters of one base as a PEFT folder.

    Parameters
    ----------
    adapters : sequence of Adapter
        Adapters whose updates are products of two factors.
    out : path
        New folder.
    weights : sequence of float, optional
        Weight of each adapter; 1 by default.
    budget : float or int, optional
        Components to keep, see ``select_components``; all by default, which is exact.

    Returns
    -------
    path
        The folder.

    Raises
    ------
    FileExistsError
        The folder exists.
    ValueError
        There are fewer than two adapters, the weights do not fit, an update is not a product of two factors, or several
        adapters contain further weights, such as heads, which have no sum.
    """
    path = Path(out)
    require_absent(path)
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(adapters) < 2 or len(factors) != len(adapters):
        raise ValueError(f"weights must be one number per adapter, of >= 2, got {len(factors)} for {len(adapters)}")
    headed = [adapter.label for adapter in adapters if adapter.files.others]
    if headed:
        raise ValueError(f"cannot sum {printable(headed[0])}: it contains further weights, such as a head")
    terms: dict[str, list[tuple[float, LowRank]]] = {}
    whose: dict[str, Adapter] = {}
    for adapter, weight in zip(adapters, factors, strict=True):
        for module, product in exact_products(adapter, adapter.updates()).items():
            terms.setdefault(module, []).append((weight, product))
            if product.shape != terms[module][0][1].shape:
                shapes = f"{terms[module][0][1].shape} and {product.shape}"
                raise ValueError(f"cannot sum adapters of different bases: {printable(module)} has shapes {shapes}")
            whose.setdefault(module, adapter)
    summed = {module: _sum(each) for module, each in terms.items()}
    parts = {module: whose[module].files.parts[module] for module in summed}
    first = adapters[0]
    together = Adapter(type(first.files)(**{**vars(first.files), "parts": parts}), first.base)
    listed = " + ".join(f"{weight:g} x {adapter.label}" for adapter, weight in zip(adapters, factors, strict=True))
    return write_adapter(together, path, summed, budget, sources=listed)


def _sum(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Return the weighted sum: B side by side, with the scales, and A below each other."""
    B = np.hstack([weight * product.scale * np.asarray(product.B, np.float64) for weight, product in terms])
    return LowRank(B, np.vstack([np.asarray(product.A, np.float64) for _, product in terms]))


def interference(adapters: Sequence[Adapter]) -> pd.DataFrame:
    """Tabulate how the updates of adapters interfere in their sum.

    Returns
    -------
    DataFrame
        One row per pair: ``one, other, shared`` (modules that both adapt), ``cosine`` of the updates as one vector over
        all modules, and ``energy``: the squared norm of the sum relative to the sum of the squared norms, below 1 if
        they cancel and above 1 if they add up.
    """
    products = [exact_products(adapter, adapter.updates()) for adapter in adapters]
    squares = [sum(update.norm() ** 2 for update in each.values()) for each in products]
    rows = []
    for (i, one), (j, other) in combinations(enumerate(products), 2):
        shared = one.keys() & other.keys()
        inner = sum(one[module].inner(other[module]) for module in shared)
        size = np.sqrt(squares[i] * squares[j])
        energy = 1 + 2 * inner / (squares[i] + squares[j]) if squares[i] + squares[j] else np.nan
        cosine = inner / size if size else np.nan
        rows.append((adapters[i].label, adapters[j].label, len(shared), cosine, energy))
    return pd.DataFrame(rows, columns=["one", "other", "shared", "cosine", "energy"])
