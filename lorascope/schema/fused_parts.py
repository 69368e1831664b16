"""Parts of fused weights: the rows of queries, keys and values in one matrix, by the architecture of the model.

A part is named after the matrix and its role, such as ``transformer.h.0.attn.c_attn[q]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

PART_ROLES = ("q", "k", "v")
"""Roles of the parts of a matrix with the role qkv, in the order of their rows."""

# Architectures by the order of the rows, as their attention splits the output of the matrix.
_IN_ORDER = ("gpt2", "openai-gpt", "phi3", "mpt")
_BY_HEAD = ("gpt_neox", "bloom", "persimmon")


class PartRows(NamedTuple):
    """Rows of a part: those from ``start`` to ``stop`` in each of ``groups`` equal groups of rows, such as heads."""

    role: str
    groups: int
    start: int
    stop: int

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return self.groups * (self.stop - self.start)


def name_of_part(fused: str, role: str) -> str:
    """Return the name of a part of a fused weight."""
    return f"{fused}[{role}]"


def split_part_name(name: str) -> tuple[str, str] | None:
    """Return the fused weight and the role that the name of a part has, None for another name."""
    fused, bracket, role = name.removesuffix("]").rpartition("[")
    return (fused, role) if bracket and name.endswith("]") else None


def part_roles(names: Iterable[str]) -> tuple[str, ...]:
    """Return the roles of the parts of fused weights among names of modules, sorted."""
    roles = set()
    for name in names:
        split_name = split_part_name(name)
        if split_name is not None:
            roles.add(split_name[1])
    return tuple(sorted(roles))


def split_rows_by_role(fused: str, rows: int, config: Any) -> list[PartRows]:
    """Return the rows of queries, keys and values in a fused weight, from the configuration of its model.

    Raises
    ------
    ValueError
        The order of the rows is not known for the architecture, or their number does not fit its heads.
    """
    kind = getattr(config, "model_type", "")
    if kind not in (*_IN_ORDER, *_BY_HEAD):
        architectures = ", ".join([*_IN_ORDER, *_BY_HEAD])
        raise ValueError(
            f"cannot split {fused!r} into q, k, v: its architecture must be one of {architectures}, got {kind!r}; "
            'use the target "qkv", the whole matrix'
        )
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if rows != (heads + 2 * key_heads) * size:
        count = heads + 2 * key_heads
        raise ValueError(f"cannot split {fused!r} into q, k, v: its {rows} rows do not fit {count} heads of {size}")
    # Keys and values may have fewer heads than queries (grouped queries).
    groups, widths = 1, (heads * size, key_heads * size, key_heads * size)
    if kind in _BY_HEAD:
        groups, widths = heads, (size, size, size)
    part_rows, stop = [], 0
    for role, width in zip(PART_ROLES, widths, strict=True):
        start, stop = stop, stop + width
        part_rows.append(PartRows(role, groups, start, stop))
    return part_rows
