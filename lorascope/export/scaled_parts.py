"""Adapter with parts at other scales, such as the best scales of a dial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd
from lorascope.runs.result import Result
from lorascope.updates import LowRank

WHOLE = "whole"


def scale_products(run: Result, products: Mapping[str, LowRank], scales: Mapping[str, float]) -> dict[str, LowRank]:
    """Scale parts of a run's updates; parts that overlap multiply.

    Parameters
    ----------
    run : Result
        Run whose modules have positions.
    products : mapping module -> LowRank
        Its updates.
    scales : mapping part -> scale
        Parts as a dial names them: ``"whole"``, a module, a role, a layer (``"layer 0"``, ``"encoder layer 0"``), or a
        module with the number of its singular component, from 1.

    Raises
    ------
    ValueError
        A part is unknown, or is an intruder dimension, which is not a component of its update.
    """
    positions = run.modules.set_index("module").loc[list(products)]
    layers = (positions["stack"] + " layer " + positions["layer"].astype(str)).str.strip()
    scaled = dict(products)
    for part, scale in scales.items():
        module, _, component = part.rpartition(" ")
        if module in products and component.isdecimal():
            scaled[module] = _scale_component(scaled[module], part, int(component), scale)
            continue
        modules = positions.index[(positions.index == part) | (positions["role"] == part) | (layers == part)]
        if part == WHOLE:
            modules = positions.index
        if modules.empty:
            allowed = "whole, a module, a role, a layer or a component of this run"
            raise ValueError(f"cannot scale {part!r} of {run.reference}: it must be {allowed}")
        for name in modules:
            product = scaled[name]
            scaled[name] = LowRank(product.B, product.A, product.scale * scale)
    return scaled


def _scale_component(product: LowRank, part: str, component: int, scale: float) -> LowRank:
    U, sigma, V = product.svd()
    if not 1 <= component <= len(sigma):
        raise ValueError(f"cannot scale {part!r}: its number must be from 1 to {len(sigma)}")
    sigma = sigma.copy()
    sigma[component - 1] *= scale
    # Both factors get the root, as those of a truncated update do.
    root = np.sqrt(sigma)
    return LowRank(U * root, root[:, None] * V.T)


def parse_scales(text: str, run: Result) -> dict[str, float]:
    """Return the scales that a command line names: ``whole=0.75``, several with commas, or the table of a dial.

    Raises
    ------
    ValueError
        A scale is not a number, or the table cannot be read; see :func:`read_scales`.
    """
    if "=" not in text or Path(text).exists():
        return read_scales(text, run)
    scales = {}
    for pair in text.split(","):
        part, _, scale = pair.rpartition("=")
        try:
            scales[part] = float(scale)
        except ValueError:
            raise ValueError(f"--scales must be PART=SCALE or a table of lorascope dial, got {pair!r}") from None
    return scales


def read_scales(path: str | Path, run: Result) -> dict[str, float]:
    """Read the best scales from the table of a dial; see ``Dial.save``.

    Raises
    ------
    ValueError
        The table is not that of a dial, or belongs to another run.
    """
    table = pd.read_csv(path, dtype={"part": str, "run": str})
    if missing := {"part", "best_scale", "run"} - set(table):
        raise ValueError(f"cannot read scales from {path}: it has no column {min(missing)}; write it with Dial.save")
    if (ids := set(table["run"])) != {run.id}:
        raise ValueError(f"scales of {path} belong to run {', '.join(sorted(map(str, ids)))}, not to {run.reference}")
    scaled = table[table["best_scale"].notna() & (table["best_scale"] != 1)]
    return dict(zip(scaled["part"], scaled["best_scale"].astype(float), strict=True))
