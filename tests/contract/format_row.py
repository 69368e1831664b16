"""Row of the contract of adapter formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Written = dict[str, np.ndarray]


@dataclass(frozen=True)
class FormatRow:
    """A format: how to write an adapter (returns the dense update of each module), and what it is called.

    ``spare`` is a regular expression for the names of tensors that are stored but not needed.
    """

    write: Callable[[Path, Path], Written]
    kind: str
    exact: bool = True
    modules: tuple[str, ...] = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    spare: str = ""
