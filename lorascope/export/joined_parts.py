"""Updates of parts of fused weights as updates of the fused weights, which PEFT adapts as a whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorascope.runs.result import Result
from lorascope.schema.fused_parts import split_part_name
from lorascope.updates import LowRank


def join_weight_parts(run: Result, updates: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Replace the products of parts of each fused weight by one product for the weight.

    Its A has the rows of all parts, and its B is zero where the row or the component belongs to another part. Its rank
    is therefore the sum of their ranks.

    Raises
    ------
    ValueError
        The kind is not LoRA: PEFT would change the other rows of the weight as well.
    """
    joined: dict[str, Any] = {}
    parts_by_weight: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, update in updates.items():
        split_name = split_part_name(name)
        if split_name is None or run.meta.weight_parts is None:
            joined[name] = update
            continue
        if kind != "LoRA":
            raise ValueError(
                f"cannot export {run.reference} as {kind}: PEFT adapts all rows of {split_name[0]!r}, and only a LoRA "
                'can be zero in the others; train with the target "qkv"'
            )
        joined[split_name[0]] = None  # in the order of the model
        parts_by_weight[split_name[0]][name] = update
    for fused, products in parts_by_weight.items():
        joined[fused] = _join_products(run, fused, products)
    return joined


def _join_products(run: Result, fused: str, products: Mapping[str, LowRank]) -> LowRank:
    modules = run.modules
    rows = int(modules["out_features"][modules["module"] == fused].iloc[0])
    scale = next(iter(products.values())).scale
    A = np.concatenate([product.A for product in products.values()])
    B = np.zeros((rows, len(A)), A.dtype)
    stop = 0
    for name, product in products.items():
        start, stop = stop, stop + product.rank
        # Parts of different ranks have different scales. The factor is exactly 1 for equal ones.
        B[_indices(run, name, rows), start:stop] = product.B * (product.scale / scale)
    return LowRank(B, A, scale)


def _indices(run: Result, name: str, rows: int) -> np.ndarray:
    """Return the rows of the fused weight that a part has, in its order."""
    assert run.meta.weight_parts is not None
    groups, start, stop = run.meta.weight_parts[name]
    return np.arange(rows).reshape(groups, -1)[:, start:stop].reshape(-1)


def join_hosts(hosts: Mapping[str, str]) -> dict[str, str]:
    """Return the classes of adapted modules, also those of the fused weights whose parts are adapted."""
    joined = dict(hosts)
    for name, host in hosts.items():
        split_name = split_part_name(name)
        if split_name is not None:
            joined[split_name[0]] = host
    return joined
