"""Numbers of one module: a row of ``Result.summary``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lorascope.files.lazy_pandas import pandas as pd

MEASURES = ("update_norm", "relative_update", "learned_norm", "weight_norm", "stable_rank", "effective_rank")
_DTYPES = {"layer": "Int16", "rank": "Int64"}


@dataclass
class ModuleSummary:
    """Position, rank, norms, stable and effective rank of one module; NaN or None if unknown."""

    module: str
    stack: str
    layer: int | None
    role: str
    rank: int | None
    update_norm: float = np.nan
    relative_update: float = np.nan
    learned_norm: float = np.nan
    weight_norm: float = np.nan
    stable_rank: float = np.nan
    effective_rank: float = np.nan
    exact: bool = True


def table_of(kind: type, rows: Iterable[Any]) -> pd.DataFrame:
    """Return dataclass instances of one kind as a table, with nullable integers for layers and ranks."""
    table = pd.DataFrame(list(map(vars, rows)), columns=[column.name for column in fields(kind)])
    dtypes = {column.name: "float64" for column in fields(kind) if column.type == "float"}
    dtypes |= {name: dtype for name, dtype in _DTYPES.items() if name in table}
    return table.astype(dtypes)
